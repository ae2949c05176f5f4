"""Checks of a configuration before anything runs.

`configs/defaults.py` defines which values each key accepts; the rules here combine keys, devices and registries.
Networks that are only applied need a valid model on any number of devices; what is trained needs the rest. Modules that
hold a registry check their own section (`models.check`, `method.check`, `optimizer.check`).
"""

import jax
import numpy as np

from configs.checks import ConfigError, check_choice, check_multiple, check_values
from configs.kinds import show
from dssn_jax import models
from dssn_jax.learner.optimizer import OPTIMIZERS
from dssn_jax.methods import method
from input_pipeline.batch import labeled_rows
from input_pipeline.sources.open import SOURCES

_LEAST_CROP = 8  # Smallest crop and sliding window, in pixels.
_LEAST_CUTMIX_SHARE = 1e-3  # Least share of largest boxes that lie inside the crop; others are redrawn.


def validate_model(config) -> None:
    """Raises ConfigError for the first value of any key that is not accepted, or with which no network can be built."""
    check_values(config)
    models.check(config.model)
    for key in ("dtype", "param_dtype"):
        if config.model[key] == "float64" and not jax.config.jax_enable_x64:
            raise ConfigError(f"config.model.{key}=float64 needs the environment variable JAX_ENABLE_X64=1")
    method.check(config)
    _check_class_pixels(config.data)


def _check_class_pixels(data) -> None:
    if data.class_pixels and (len(data.class_pixels) != len(data.classes) or not any(data.class_pixels)):
        raise ConfigError(
            f"config.data.class_pixels is {show(data.class_pixels)}; expected a number for each of the "
            f"{len(data.classes)} classes, not all 0, or () to count them"
        )


def validate_evaluation(config) -> None:
    """Raises ConfigError for the first value with which images cannot be predicted."""
    validate_model(config)
    check_choice("config.data.source", config.data.source, SOURCES)
    if config.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ConfigError("config.model.attention is 'cudnn', which needs an NVIDIA GPU; expected auto or xla")
    for section in ("data", "eval"):
        if 0 < config[section].crop < _LEAST_CROP:
            raise ConfigError(
                f"config.{section}.crop is {config[section].crop}; expected 0 or at least {_LEAST_CROP} pixels"
            )


def validate_crops(config) -> None:
    """Raises ConfigError if the encoder of a valid model cannot take the training crop or the sliding windows."""
    multiple = models.build(config.model, len(config.data.classes)).size_multiple
    check_multiple("config.data.crop", config.data.crop, multiple, config.model.encoder)
    if config.eval.mode == "sliding_window":
        check_multiple("config.eval.crop, the sliding window,", config.eval.crop, multiple, config.model.encoder)


def validate_training(config, device_count: int) -> None:
    """Raises ConfigError for the first value that cannot be trained with on `device_count` devices of all hosts.

    Keys that are 0 for `dssn_jax.auto_config` to choose are accepted.
    """
    validate_evaluation(config)
    check_choice("config.optimizer.name", config.optimizer.name, OPTIMIZERS)
    _check_cutmix(config.views)
    if config.views.paste_classes and config.views.mix_partner != "labeled":
        classes = f"config.views.paste_classes is {config.views.paste_classes}"
        raise ConfigError(f"{classes} and config.views.mix_partner {config.views.mix_partner!r}; expected 'labeled'")
    validate_crops(config)
    _check_batches(config, device_count)


def _check_cutmix(views) -> None:
    """Raises ConfigError if hardly any box of the largest area lies inside the crop."""
    area, aspect = views.cutmix_area[1], np.linspace(*views.cutmix_aspect, 100)
    height, width = np.sqrt(area * aspect), np.sqrt(area / aspect)  # As fractions of the side of the crop.
    if (np.maximum(1 - height, 0) * np.maximum(1 - width, 0)).mean() < _LEAST_CUTMIX_SHARE:
        raise ConfigError(
            f"config.views.cutmix_area is {views.cutmix_area}; hardly any box of {area} of the crop lies inside it with"
            f" an aspect ratio in config.views.cutmix_aspect={views.cutmix_aspect}"
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
        method.check_pairs(config, device_count * micro_batches)
        is_grouped = key == "labeled_batch" and config.method.labeled_loss == "ohem"
        if is_grouped and count // micro_batches % config.method.ohem_group:
            raise ConfigError(
                f"{shown}, in {micro_batches} micro-batches; expected a multiple of config.method.ohem_group "
                f"({config.method.ohem_group})"
            )
