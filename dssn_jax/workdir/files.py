"""Atomic files and append-only files, on a local disk or in an object store (`gs://`)."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path is in an object store, such as gs://BUCKET/FOLDER."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path; paths in an object store are unchanged."""
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
    part = pathlib.Path(path).with_name(f".{pathlib.Path(path).name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Folder:
    """A work directory `path`, with a local folder `append_dir` for the files that are appended to.

    On a local disk both are the same. Object stores cannot append: there, `append_dir` is a temporary folder that
    `sync` copies to `path`.
    """

    def __init__(self, path: epath.PathLike, continued: tuple[str, ...] = ()):
        """Creates the folder if needed. Files named in `continued` are appended to if they exist in it already."""
        self.path = epath.Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # Object stores raise errors of their own: no such bucket, no credentials.
            raise OSError(f"{path}: cannot create this folder: {error}") from None
        self._synced: dict[pathlib.Path, tuple[int, int]] = {}
        if not is_remote(path):
            self.append_dir = pathlib.Path(path)
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
        """Syncs, and removes the temporary folder."""
        try:
            self.sync()
        finally:
            if is_remote(self.path):
                shutil.rmtree(self.append_dir, ignore_errors=True)


def _fingerprint(file: pathlib.Path) -> tuple[int, int]:
    """Returns the size and the time of modification, which change when the file is written to."""
    return file.stat().st_size, file.stat().st_mtime_ns
