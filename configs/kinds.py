"""Kinds of configuration values: each tests a value (`accepts`) and says in words what it accepts (`str`)."""

import dataclasses
import importlib
import re
from typing import Any, NamedTuple, Protocol

MOST_INT = 2**31 - 1
MOST_FLOAT = 1e38  # Largest order of magnitude in float32.
STORAGE = ("gs",)  # Schemes of paths of work directories.
# Control characters, and half characters: bytes of the command line that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Kind(Protocol):
    """A kind of configuration value; `str` completes the sentence "expected ..."."""

    def accepts(self, value: Any) -> bool:
        """Returns whether `value`, of any type, can be used."""


class Key(NamedTuple):
    """A configuration key."""

    default: Any
    kind: Kind
    text: str  # Its meaning.
    unit: str = ""


class Section(dict):
    """Keys and sections by name, with a text about all of them."""

    def __init__(self, text: str, /, **keys: "Key | Section"):
        super().__init__(keys)
        self.text = text


@dataclasses.dataclass(frozen=True)
class Int:
    """Integers within bounds."""

    least: int = 0
    most: int = MOST_INT

    def accepts(self, value: Any) -> bool:
        return type(value) is int and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"an integer from {self.least} to {'2^31 - 1' if self.most == MOST_INT else self.most}"


@dataclasses.dataclass(frozen=True)
class Float:
    """Numbers within bounds."""

    least: float = 0
    most: float = MOST_FLOAT

    def accepts(self, value: Any) -> bool:
        return type(value) in (int, float) and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"a number from {self.least:g} to {self.most:g}"


@dataclasses.dataclass(frozen=True)
class Bool:
    """True or False."""

    def accepts(self, value: Any) -> bool:
        return type(value) is bool

    def __str__(self) -> str:
        return "true or false"


class Choice:
    """One of a few values of one type."""

    def __init__(self, *names: str | int):
        self.names = names

    def accepts(self, value: Any) -> bool:
        return type(value) is type(self.names[0]) and value in self.names

    def __str__(self) -> str:
        return " or ".join(map(repr, self.names))


@dataclasses.dataclass(frozen=True)
class Text:
    """Text without control characters."""

    def accepts(self, value: Any) -> bool:
        return type(value) is str and not _UNPRINTABLE.search(value)

    def __str__(self) -> str:
        return "text without control characters"


_LONGEST_PATH = 1000  # Systems have limits of their own, and folders nested deeper are walked by recursion.


@dataclasses.dataclass(frozen=True)
class Path(Text):
    """A path of this machine, or of a kind of storage, such as gs://BUCKET/run."""

    schemes: tuple[str, ...] = ()

    def accepts(self, value: Any) -> bool:
        if not super().accepts(value) or len(value) > _LONGEST_PATH:
            return False
        scheme = re.match(r"\s*([^/]*)://", value)
        return not scheme or scheme[1] in self.schemes

    def __str__(self) -> str:
        places = ["a path of this machine", *(f"{scheme}://BUCKET/..." for scheme in self.schemes)]
        return f"{' or '.join(places)}, of at most {_LONGEST_PATH} characters"


@dataclasses.dataclass(frozen=True)
class Registered(Text):
    """A name in a registry, "module:ATTRIBUTE", which is the truth: the module itself checks the name."""

    registry: str

    def names(self) -> tuple[str, ...]:
        """Returns the registered names; imports the module."""
        module, _, attribute = self.registry.partition(":")
        return tuple(getattr(importlib.import_module(module), attribute))


@dataclasses.dataclass(frozen=True)
class Pair:
    """(least, greatest) of a range of numbers."""

    kind: Int | Float

    def accepts(self, value: Any) -> bool:
        return type(value) is tuple and len(value) == 2 and all(map(self.kind.accepts, value)) and value[0] <= value[1]

    def __str__(self) -> str:
        return f"(least, greatest), each {self.kind}"


@dataclasses.dataclass(frozen=True)
class Tuple:
    """From `least` to `most` values of a kind."""

    kind: Kind
    least: int = 0
    most: int = 1000

    def accepts(self, value: Any) -> bool:
        return type(value) is tuple and self.least <= len(value) <= self.most and all(map(self.kind.accepts, value))

    def __str__(self) -> str:
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"a tuple of {count} values, each {self.kind}"


class Row:
    """A tuple with one value of each kind."""

    def __init__(self, *kinds: Kind):
        self.kinds = kinds

    def accepts(self, value: Any) -> bool:  # Lists come from JSON.
        is_row = type(value) in (tuple, list) and len(value) == len(self.kinds)
        return is_row and all(kind.accepts(each) for kind, each in zip(self.kinds, value, strict=True))

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.kinds))})"


@dataclasses.dataclass(frozen=True)
class Names(Tuple):
    """Distinct names that are not empty."""

    kind: Kind = Text()

    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and len(set(value)) == len(value) and all(name.strip() for name in value)

    def __str__(self) -> str:
        return f"a tuple of {self.least} to {self.most} names, distinct and not empty"


def show(value: Any, most: int = 80) -> str:
    """Returns `repr(value)` in one line, cut to `most` characters."""
    try:
        text = " ".join(repr(value).splitlines()).strip()
    except ValueError:  # Python refuses to print integers of thousands of digits.
        return f"of {type(value).__name__} and too long to print"
    return text if len(text) <= most else f"{text[: most - 3]}..."
