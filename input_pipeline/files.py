"""Opens the files that users name: regular files of bounded size alone, so that nothing waits or fills the memory."""

import os
import re
import stat
from typing import BinaryIO

from input_pipeline.errors import DataError

_MOST_BYTES = 1 << 30
_MOST_TEXT_BYTES = 1 << 28
# Line ends and escape codes included; names with these cannot be written to lists or shown.
CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str, most_bytes: int = _MOST_BYTES) -> BinaryIO:
    """Opens a file for reading.

    Raises:
      DataError: a folder, named pipe (which would wait for a writer), socket or device, or a file that is too large.
      OSError: as `open` does.
    """
    try:
        status = os.stat(path)
    except ValueError:
        raise DataError(f"{path}: a path with a NUL character, which no file has") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: {_kind(status)}; expected a file")
    if status.st_size > most_bytes:
        raise DataError(f"{path}: a file of {status.st_size} bytes; expected at most {most_bytes}")
    return open(path, "rb")


def special_file(folder: str) -> str:
    """Returns the path and kind of a file below `folder` that is no regular one, such as a named pipe, or ""."""
    for where, _, names in os.walk(folder):
        for path in (os.path.join(where, name) for name in sorted(names)):
            if os.path.exists(path) and not os.path.isfile(path):
                return f"{path}: {_kind(os.stat(path))}"
    return ""


def _kind(found: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(found.st_mode), "a special file")


def read_text(path: str, what: str) -> str:
    """Returns the content of a UTF-8 text file, with "\\n" for line ends and without the byte order mark.

    Args:
      path: the file.
      what: what its content should be, for messages, such as "a text list".

    Raises:
      DataError: not a regular file, or not such a text.
      FileNotFoundError: no such file.
    """
    problem = f"{path}: cannot be read as {what}"
    try:
        with open_regular(path, _MOST_TEXT_BYTES) as file:
            content = file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{problem}: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")  # Some editors write a byte order mark.
        wrong = text.find("\0")
    except UnicodeDecodeError as error:
        text, wrong = content[: error.start].decode("utf-8-sig", "replace"), error.start
    if wrong >= 0:
        line = text.count("\n", 0, wrong) + 1
        raise DataError(f"{problem}: line {line} has bytes that are no UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")
