"""The argument string of a config file: `--config=configs/pascal.py:split=183,backbone=resnet50,method=unimatch`."""

import difflib
from collections.abc import Iterable

from configs import methods


class ConfigError(ValueError):
    """A configuration that cannot be run: the message names the key, what was found and the nearest known values."""


def suggest(found: str, known: Iterable[str]) -> str:
    """Returns "; did you mean A or B? known: ..." for an unknown name."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(found, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
    return f"{hint} known: {', '.join(known)}"


def parse(argument: str | None, **defaults):
    """Parses `key=value,key=value` into a dict over `defaults`, whose types the values take.

    Raises ConfigError for a key that is not in `defaults` or a value that is not of its type.
    """
    values = dict(defaults)
    for item in filter(None, (argument or "").split(",")):
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"config argument {item!r} is not of the form key=value")
        if key not in defaults:
            raise ConfigError(f"unknown config argument {key!r}{suggest(key, defaults)}")
        try:
            values[key] = type(defaults[key])(text)
        except ValueError:
            kind = type(defaults[key]).__name__
            raise ConfigError(f"config argument {key}={text!r} is not of type {kind}") from None
    if "method" in values:
        check_choice("method", values["method"], methods.METHODS)
    return values


def check_choice(what: str, found: str, known: Iterable[str]) -> None:
    """Raises ConfigError when `found` is not one of `known`."""
    if found not in known:
        raise ConfigError(f"unknown {what} {found!r}{suggest(str(found), known)}")


def describe(dataset: str, values: dict) -> str:
    """Returns the name of a run, such as "pascal split=183 backbone=resnet50 method=dssn crop=513"."""
    return " ".join([dataset, *(f"{key}={value}" for key, value in values.items())])
