"""Errors that end the program with one line, and the phrases that their messages share."""

import difflib
from collections.abc import Callable, Iterable, Sequence


class UserError(Exception):
    """Base of all errors that the user can fix: the command line prints the message alone, without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        """Returns the message as `printable` text, except for its line ends."""
        return "\n".join(printable(line, 4000) for line in super().__str__().split("\n"))


class DataError(UserError):
    """Unusable data: the message names the file (and line), what it holds and what is expected.

    The message is the only argument, so that the error survives pickling between processes unchanged.
    """

    def __init__(self, message: str):
        super().__init__(message)


def printable(text: str, most: int = 1000) -> str:
    r"""Returns text of users or files in one line that is safe to show; the middle of longer text is left out.

    Control characters, line ends and invisible characters become escape sequences, such as \x1b, and bytes of a file
    name that are not UTF-8 too, such as \xff.
    """
    if len(text) > most:
        text = f"{text[: most // 2]}[...]{text[len(text) - most // 2 :]}"
    if text.isprintable():
        return text
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # How Python decodes a byte of a file name that is not UTF-8.
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character if character.isprintable() else repr(character)[1:-1]


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
    """Returns "a, b, c and 4 more": the first `most` of `names`, each formatted by `show` and `printable`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(show(name)) for name in names[:most]) + more


def first_messages(messages: Sequence, total: str = "in all", most: int = 5) -> str:
    """Returns the first `most` of `messages` in one line, and "... 12 in all" if there are more."""
    more = [f"... {len(messages)} {total}"] if len(messages) > most else []
    return "; ".join([*map(str, messages[:most]), *more])
