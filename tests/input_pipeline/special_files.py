"""Files that no program should read as data: making one is quick, opening it may wait or fail."""

import os
import socket


def make_special(path, kind: str) -> None:
    """Replaces `path` by a "pipe", "socket", "device" (a link to one), "folder" or "loop" (a link to itself)."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # Names of sockets are short.
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)


SPECIAL = {
    "pipe": "a named pipe; expected a file",
    "socket": "a socket; expected a file",
    "device": "a device; expected a file",
    "folder": "a folder; expected a file",
    "loop": "Too many levels of symbolic links",
}
