"""Files and folders, on a local disk or on a bucket (`gs://`): written whole or not at all, or growing."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is of an object store, such as gs://BUCKET/FOLDER."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root of the file system on; of an object store as it is."""
    return epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(path))


@contextlib.contextmanager
def whole(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """Gives the path of a new local file, which becomes `path` at the end, or goes if an error is raised."""
    if is_remote(path):  # Objects appear whole.
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
    """A folder of whole files, under `path`, and of files that are appended to, under `growing`.

    On a local disk both are the same. Object stores cannot append: there, growing files lie on the local disk and
    `publish` copies them.
    """

    def __init__(self, path: epath.PathLike, continued: tuple[str, ...] = ()):
        """Makes the folder if it is not there. The growing files named `continued` go on from what it has of them."""
        self.path = epath.Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # Object stores have errors of their own: no such bucket, no credentials.
            raise OSError(f"{path}: this folder cannot be made: {error}") from None
        self._published: dict[pathlib.Path, tuple[int, int]] = {}
        if not is_remote(path):
            self.growing = pathlib.Path(path)
            return
        self.growing = pathlib.Path(tempfile.mkdtemp(prefix="growing_"))
        for name in continued:
            if (self.path / name).exists():
                (self.growing / name).write_bytes((self.path / name).read_bytes())
                self._published[self.growing / name] = _state(self.growing / name)

    def publish(self) -> None:
        """Copies the growing files that changed since the last time, whole, to the folder."""
        if not is_remote(self.path):
            return
        for file in sorted(self.growing.rglob("*")):
            if file.is_file() and self._published.get(file) != (state := _state(file)):
                (self.path / file.relative_to(self.growing).as_posix()).write_bytes(file.read_bytes())
                self._published[file] = state

    def close(self) -> None:
        """Publishes, and removes the local copies."""
        self.publish()
        if is_remote(self.path):
            shutil.rmtree(self.growing, ignore_errors=True)


def _state(file: pathlib.Path) -> tuple[int, int]:
    """Differs when the file has been written to."""
    return file.stat().st_size, file.stat().st_mtime_ns
