"""Arguments of a config file: `--config=configs/pascal.py:split=183,encoder=dinov2_base,method=unimatch_v2`."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import defaults, encoders, methods
from configs.checks import ConfigError, check_choice, check_values, suggest
from configs.kinds import Text, show


def parse(argument: str | None, **default_values) -> dict:
    """Parses `key=value,key=value` to a dict on top of `default_values`, whose types the values take.

    A crop that is not given is that of `default_values`, or the side nearest to it that the encoder takes.

    Raises ConfigError for a key without default, a value of another type, or an unknown method.
    """
    values, given = dict(default_values), set()
    for item in filter(None, (argument or "").split(",")):
        key, equals, text = item.partition("=")
        if not (key and equals):
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
        given.add(key)
    if values["method"] != default_values["method"]:
        check_choice("method", values["method"], methods.METHODS)
    if "crop" in values.keys() - given and "encoder" in values:
        values["crop"] = encoders.nearest_crop(values["encoder"], values["crop"])
    return values


def recipe(dataset: str, values: dict, classes: Sequence[str]) -> ConfigDict:
    """Returns the defaults with the arguments of a config file, for the data set's own settings to follow.

    A file that sets keys of `config.views` or `config.data` passes the result to `finish`. Vision transformers have the
    recipe of their family (`configs/encoders.py`) already.

    Args:
      dataset: name of the data set, for the name of the run and the published schedule.
      values: parsed arguments, with at least encoder, method and crop; decoder is optional.
      classes: class names.

    Raises ConfigError for a value that a key does not accept.
    """
    config = defaults.get_config()
    config.name = describe(dataset, values)
    config.data.split = values.get("split", "")
    config.data.classes = tuple(classes)
    config.data.crop = values["crop"]
    config.model.encoder = values["encoder"]
    config.model.decoder = values.get("decoder") or encoders.decoder_for(values["encoder"])
    methods.apply(config, values["method"])
    encoders.apply(config, dataset)
    methods.apply_last(config)
    check_values(config)  # Before the data set's settings compute with them.
    return config


def finish(config: ConfigDict) -> ConfigDict:
    """Returns `config`, with the data set's settings, after the method's own for views and data took their place.

    So settings of the data set are replaced by those of the encoder's family, these by those of the method's entry in
    `configs/methods.py`, and these by the command line.
    """
    methods.apply_last(config)
    return config


def describe(dataset: str, values: dict) -> str:
    """Returns the name of a run, such as "pascal split=183 encoder=resnet50 method=dssn crop=513".

    A decoder that is not given is left out.
    """
    shown = {key: value for key, value in values.items() if value or key != "decoder"}
    return " ".join([dataset, *(f"{key}={value}" for key, value in shown.items())])
