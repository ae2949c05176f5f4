"""Checks of a configuration before anything runs; `configs/defaults.py` defines the keys.

Networks that are only applied need a valid model on any number of devices; what is trained needs the rest. Modules that
hold a registry check their own section (`models.check`, `method.check`, `optimizer.check`).
"""

import functools
import operator

import jax

from configs.checks import ConfigError, check_choice
from dssn_jax import models
from dssn_jax.learner.optimizer import OPTIMIZERS
from dssn_jax.methods import method
from input_pipeline import layout
from input_pipeline.batch import labeled_rows
from input_pipeline.pipeline import MIX_PARTNERS
from input_pipeline.sources.open import SOURCES

DTYPES = ("float32", "bfloat16", "float64")
EVAL_MODES = ("original", "sliding_window", "center_crop")

_CHOICES = {
    "data.source": SOURCES,
    "data.val_overlap": layout.OVERLAP,
    "data.folders.unmasked": layout.UNMASKED,
    "views.mix_partner": MIX_PARTNERS,
    "optimizer.name": OPTIMIZERS,
    "train.resume": ("exact", "changed"),
}
# Least value of each key. Where it is 0, that may mean that `dssn_jax.auto_config` chooses a value.
_EVAL_LEAST = {"data.crop": 0, "data.threads": 1, "eval.crop": 0, "eval.batch": 1, "eval.buckets": 1}
_TRAINING_LEAST = {
    "data.labeled_batch": 0, "data.unlabeled_batch": 0, "data.buffer": 1, "data.workers": 0, "method.strong_views": 0,
    "method.feature_views": 0, "method.labeled_batch_factor": 1, "method.ohem_group": 1, "method.ohem_min_kept": 0,
    "optimizer.lr": 0, "train.epochs": 0, "train.steps": 0, "train.accumulation": 1, "train.log_every": 1,
    "train.eval_every": 0, "train.checkpoint_every": 0, "train.pictures": 0,
}  # fmt: skip
# Greatest value of keys whose least value is 0.
_GREATEST = {
    "data.flip": 1, "views.jitter": 1, "views.gray": 1, "views.blur": 1, "views.cutmix": 1, "ema.decay": 1,
    "views.brightness": 7, "views.contrast": 7, "views.saturation": 7, "views.hue": 0.5,
}  # fmt: skip
_RANGES = ("data.scale", "views.blur_sigma", "views.operations", "views.cutmix_area", "views.cutmix_aspect")


def validate_model(config) -> None:
    """Raises ConfigError for the first value with which no network can be built."""
    classes = len(config.data.classes)
    if not 1 < classes <= 255:
        raise ConfigError(f"config.data.classes has {classes} names; expected 2 to 255")
    models.check(config.model)
    _check_least(config, {"model.decoder_channels": 1})
    for key in ("dtype", "param_dtype"):
        check_choice(f"config.model.{key}", config.model[key], DTYPES)
        if config.model[key] == "float64" and not jax.config.jax_enable_x64:
            raise ConfigError(f"config.model.{key}=float64 needs the environment variable JAX_ENABLE_X64=1")
    check_choice("config.method.teacher", config.method.teacher, method.TEACHERS)


def validate_evaluation(config) -> None:
    """Raises ConfigError for the first value with which images cannot be predicted."""
    validate_model(config)
    check_choice("config.data.source", config.data.source, SOURCES)
    check_choice("config.eval.mode", config.eval.mode, EVAL_MODES)
    _check_least(config, _EVAL_LEAST)
    if not config.eval.scales or min(config.eval.scales) <= 0:
        raise ConfigError(f"config.eval.scales is {tuple(config.eval.scales)}; expected positive numbers")


def validate_training(config, device_count: int) -> None:
    """Raises ConfigError for the first value that cannot be trained with on `device_count` devices of all hosts.

    Keys that are 0 for `dssn_jax.auto_config` to choose are accepted.
    """
    validate_evaluation(config)
    for key, known in _CHOICES.items():
        check_choice(f"config.{key}", _get(config, key), known)
    _check_least(config, _TRAINING_LEAST)
    for key, greatest in _GREATEST.items():
        if not 0 <= _get(config, key) <= greatest:
            raise ConfigError(f"config.{key} is {_get(config, key)}; expected 0 to {greatest}")
    for key in _RANGES:
        pair = tuple(_get(config, key))
        if len(pair) != 2 or not 0 <= pair[0] <= pair[1]:
            raise ConfigError(f"config.{key} is {pair}; expected (least, greatest)")
    if config.data.scale[0] <= 0:
        raise ConfigError(f"config.data.scale is {tuple(config.data.scale)}; expected positive numbers")
    if not 0 <= config.method.feature_dropout < 1:
        raise ConfigError(f"config.method.feature_dropout is {config.method.feature_dropout}; expected 0 to below 1")
    method.check(config)
    _check_crop(config)
    _check_batches(config, device_count)


def _check_crop(config) -> None:
    multiple = models.build(config.model, len(config.data.classes)).size_multiple
    if config.data.crop % multiple:
        raise ConfigError(
            f"config.data.crop is {config.data.crop}; {config.model.encoder} needs a multiple of {multiple}"
        )


def _check_batches(config, device_count: int) -> None:
    rows, factor = {"labeled_batch": labeled_rows(config)}, config.method.labeled_batch_factor
    if config.method.strong_views or config.method.feature_views:
        rows["unlabeled_batch"] = config.data.unlabeled_batch
    micro_batches = config.train.accumulation
    for key, count in rows.items():
        shown = f"config.data.{key} is {config.data[key]}"
        if count != config.data[key]:
            shown += f", which makes {count} images per step (config.method.labeled_batch_factor={factor})"
        if count % (device_count * micro_batches):
            expected = f"{device_count} devices"
            if micro_batches > 1:
                expected += f" x {micro_batches} micro-batches (config.train.accumulation)"
            raise ConfigError(f"{shown}; expected a multiple of {expected}")
        is_grouped = key == "labeled_batch" and config.method.labeled_loss == "ohem"
        if is_grouped and count // micro_batches % config.method.ohem_group:
            raise ConfigError(
                f"{shown}, in {micro_batches} micro-batches; expected a multiple of config.method.ohem_group "
                f"({config.method.ohem_group})"
            )


def _check_least(config, least_values: dict) -> None:
    for key, least in least_values.items():
        if _get(config, key) < least:
            raise ConfigError(f"config.{key} is {_get(config, key)}; expected at least {least}")


def _get(config, key: str):
    return functools.reduce(operator.getitem, key.split("."), config)
