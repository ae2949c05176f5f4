"""Atomic files, append-only files and locks, on a local disk or in an object store (`gs://`)."""

import contextlib
import fcntl
import logging
import os
import pathlib
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from typing import TextIO

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from configs import checks
from dssn_jax import distributed
from input_pipeline.errors import UserError, printable
from input_pipeline.files import open_regular

LOCK = ".lock"

logger = logging.getLogger("dssn")


class LockedError(UserError):
    """A work directory that another process trains in."""


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path is in an object store, such as gs://BUCKET/FOLDER."""
    return "://" in os.fspath(path)


def read_bytes(path: epath.PathLike) -> bytes:
    """Returns the content of a file; on a disk, of a regular file alone: a named pipe would wait for a writer.

    Raises DataError or OSError.
    """
    if is_remote(path):
        return epath.Path(path).read_bytes()
    with name_in_errors(path), open_regular(os.fspath(path)) as file:
        return file.read()


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path; paths in an object store are unchanged."""
    checks.check_storage(os.fspath(path))
    return epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(path))


@contextlib.contextmanager
def atomic_write(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """Yields the path of a temporary local file that replaces `path` on exit; on an exception `path` is unchanged."""
    if is_remote(path):  # Object stores write a whole object or nothing.
        with tempfile.TemporaryDirectory() as folder:
            part = pathlib.Path(folder) / epath.Path(path).name
            yield part
            epath.Path(path).write_bytes(part.read_bytes())
        return
    part = pathlib.Path(path).with_name(f".{uuid.uuid4().hex}.part")
    try:
        with name_in_errors(path):
            yield part
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def name_in_errors(path: epath.PathLike) -> Iterator[None]:
    """Adds `path` to an OSError without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or not error.strerror:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def lock(folder: pathlib.Path) -> TextIO:
    """Locks `folder/.lock`, which names the holder, until the returned file is closed or the process ends in any way.

    On a file system without locks there is a warning instead. Raises LockedError if another process holds the lock.
    """
    with name_in_errors(folder / LOCK):
        file = (folder / LOCK).open("a+", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = printable(file.read(200).strip()) or "another process"
        file.close()
        raise LockedError(
            f"{folder}: {holder} trains in this work directory; wait until it ends, stop it, or use another --workdir"
        ) from None
    except OSError as error:
        logger.warning(
            "%s: this file system has no locks (%s): two runs here would not notice each other", folder, error
        )
        return file
    with name_in_errors(folder / LOCK):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


class Folder:
    """A work directory `path` that is written to, with a local folder `append_dir` for the files that are appended to.

    On a local disk both are the same, and the first process holds a lock. Object stores cannot append: there,
    `append_dir` is a temporary folder that `sync` copies to `path`, and nothing is locked.
    """

    def __init__(self, path: epath.PathLike, continued: tuple[str, ...] = ()):
        """Creates the folder if needed. Files named in `continued` are appended to if they exist in it already.

        Raises LockedError in all processes of the run if another process trains in the folder.
        """
        self.path = epath.Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # Object stores raise errors of their own: no such bucket, no credentials.
            raise OSError(f"{path}: cannot create this folder: {error}") from None
        self._synced: dict[pathlib.Path, tuple[int, int]] = {}
        if not is_remote(path):
            self.append_dir = pathlib.Path(path)
            self._lock = _lock_in_first(self.append_dir)
            return
        self.append_dir = pathlib.Path(tempfile.mkdtemp(prefix="append_dir_"))
        for name in continued:
            if (self.path / name).exists():
                (self.append_dir / name).write_bytes((self.path / name).read_bytes())
                self._synced[self.append_dir / name] = _fingerprint(self.append_dir / name)

    def sync(self) -> None:
        """Copies the files of `append_dir` that changed since the last call to the object store."""
        if not is_remote(self.path):
            return
        for file in sorted(self.append_dir.rglob("*")):
            if file.is_file() and self._synced.get(file) != (fingerprint := _fingerprint(file)):
                (self.path / file.relative_to(self.append_dir).as_posix()).write_bytes(file.read_bytes())
                self._synced[file] = fingerprint

    def close(self) -> None:
        """Syncs, and removes the temporary folder; releases the lock."""
        try:
            self.sync()
        finally:
            if is_remote(self.path):
                shutil.rmtree(self.append_dir, ignore_errors=True)
            elif self._lock is not None:
                self._lock.close()


def _lock_in_first(folder: pathlib.Path) -> TextIO | None:
    """Locks `folder` in the first process of the run; raises in every process if that fails."""
    file, error = None, None
    if distributed.is_first():
        try:
            file = lock(folder)
        except (LockedError, OSError) as raised:
            error = raised
    failed = error is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
    if failed:
        raise error or LockedError(f"{folder}: not locked by the first process, whose message has the reason")
    return file


def _fingerprint(file: pathlib.Path) -> tuple[int, int]:
    """Returns the size and the time of modification, which change when the file is written to."""
    return file.stat().st_size, file.stat().st_mtime_ns
