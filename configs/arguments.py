"""Arguments of a config file: `--config=configs/pascal.py:split=183,encoder=resnet50,method=unimatch`."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import defaults, methods
from configs.checks import ConfigError, check_choice, check_values, suggest
from configs.kinds import Text, show


def parse(argument: str | None, **default_values) -> dict:
    """Parses `key=value,key=value` to a dict on top of `default_values`, whose types the values take.

    Raises ConfigError for a key without default, a value of another type, or an unknown method.
    """
    values = dict(default_values)
    for item in filter(None, (argument or "").split(",")):
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"config argument {show(item)} is not of the form key=value")
        if key not in default_values:
            raise ConfigError(f"unknown config argument {show(key)}{suggest(key, default_values)}")
        if not Text().accepts(text):
            raise ConfigError(f"config argument {key}={show(text)}; expected {Text()}")
        try:
            values[key] = type(default_values[key])(text)
        except ValueError:
            kind = type(default_values[key]).__name__
            raise ConfigError(f"config argument {key}={show(text)} is not of type {kind}") from None
    check_choice("method", values["method"], methods.METHODS)
    return values


def recipe(dataset: str, values: dict, classes: Sequence[str], splits: Sequence[str] = ()) -> ConfigDict:
    """Returns the defaults with the arguments of a config file, for the data set's own settings to follow.

    Args:
      dataset: name of the data set, for the name of the run.
      values: parsed arguments, with at least encoder, method and crop.
      classes: class names.
      splits: names of the published splits, if the argument split must be one of them.

    Raises ConfigError for a value that a key does not accept.
    """
    if splits:
        check_choice("split", values["split"], splits)
    config = defaults.get_config()
    config.name = describe(dataset, values)
    config.data.split = values.get("split", "")
    config.data.classes = tuple(classes)
    config.data.crop = values["crop"]
    config.model.encoder = values["encoder"]
    methods.apply(config, values["method"])
    check_values(config)  # Before the data set's settings compute with them.
    return config


def describe(dataset: str, values: dict) -> str:
    """Returns the name of a run, such as "pascal split=183 encoder=resnet50 method=dssn crop=513"."""
    return " ".join([dataset, *(f"{key}={value}" for key, value in values.items())])
