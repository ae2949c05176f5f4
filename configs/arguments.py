"""The argument string of a config file: `--config=configs/pascal.py:split=183,encoder=resnet50,method=unimatch`."""

from configs import methods
from configs.checks import ConfigError, check_choice, suggest


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


def describe(dataset: str, values: dict) -> str:
    """Returns the name of a run, such as "pascal split=183 encoder=resnet50 method=dssn crop=513"."""
    return " ".join([dataset, *(f"{key}={value}" for key, value in values.items())])
