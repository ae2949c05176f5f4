"""Errors that end the program with one line, and the phrases that their messages share."""

import difflib
from collections.abc import Callable, Iterable, Sequence


class UserError(Exception):
    """Base of all errors that the user can fix: the command line prints the message alone, without a traceback."""

    exit_code = 1


class DataError(UserError):
    """Unusable data: the message names the file (and line), what it holds and what is expected.

    The message is the only argument, so that the error survives pickling between processes unchanged.
    """

    def __init__(self, message: str):
        super().__init__(message)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5, containing: bool = False) -> str:
    """Returns "; did you mean 'A' or 'B'?" for an unknown name, or "" if none of `known` is close.

    Close are the matches of `difflib` with a similarity of at least `cutoff`; with `containing`, names that contain
    `name` take precedence, if there are any.
    """
    known = list(known)
    close = [candidate for candidate in known if name in candidate] if containing and name else []
    close = close or difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def first_names(names: Sequence, most: int = 3, show: Callable = str) -> str:
    """Returns "a, b, c and 4 more": the first `most` of `names`, each formatted by `show`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(show(name) for name in names[:most]) + more


def first_lines(messages: Sequence, total: str = "in all", most: int = 5) -> str:
    """Returns the first `most` of `messages`, one per line, and "... 12 in all" if there are more."""
    more = [f"... {len(messages)} {total}"] if len(messages) > most else []
    return "\n".join([*map(str, messages[:most]), *more])
