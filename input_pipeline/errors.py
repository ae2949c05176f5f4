"""Errors that end the program with one line, and what their messages share."""

import difflib
from collections.abc import Callable, Iterable, Sequence


class UserError(Exception):
    """Base of the errors that a user can mend: the command line prints the message alone, without a traceback."""

    exit_code = 1


class DataError(UserError):
    """Data that cannot be used: the message names the file (and line), what it holds and what is expected.

    Holds its message as the only argument, so that it survives pickling between processes unchanged.
    """

    def __init__(self, message: str):
        super().__init__(message)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5, part: bool = False) -> str:
    """Returns "; did you mean 'A' or 'B'?" for an unknown name, or "" if none of `known` is close.

    Close are the matches of `difflib` with a similarity of at least `cutoff`; with `part`, names that contain `name`
    come first, if there are any.
    """
    known = list(known)
    close = [each for each in known if name in each] if part and name else []
    close = close or difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def first_names(names: Sequence, most: int = 3, show: Callable = str) -> str:
    """Returns "a, b, c and 4 more": the first `most` of `names`, each formatted by `show`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(show(name) for name in names[:most]) + more
