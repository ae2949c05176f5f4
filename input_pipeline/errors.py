"""The one error of the input pipeline, and what its messages share."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """Data that cannot be used: the message names the file (and line), what was found and what is expected.

    Holds its message as the only argument, so that it comes unchanged through the pickling between processes.
    """

    def __init__(self, message: str):
        super().__init__(message)


def did_you_mean(found: str, known: Iterable[str], cutoff: float = 0.5, part: bool = False) -> str:
    """Returns "; did you mean A or B?" for an unknown name, or "" if none of `known` is near.

    Near is what `difflib` finds at least `cutoff` alike; or, with `part`, what holds `found`, if anything does.
    """
    known = list(known)
    near = [name for name in known if found in name] if part and found else []
    near = near or difflib.get_close_matches(found, known, n=3, cutoff=cutoff)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
