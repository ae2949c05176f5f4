"""Checks the values of a configuration before anything runs. The keys are defined in `configs/defaults.py`."""

import functools
import operator

import jax

from configs.checks import ConfigError, check_choice
from dssn_jax import models
from dssn_jax.evaluation import inference
from dssn_jax.methods import method as methods
from dssn_jax.methods import pseudo_labels
from dssn_jax.models import resnet
from input_pipeline import layout
from input_pipeline.pipeline import MIX_PARTNERS
from input_pipeline.sources.open import SOURCES

DTYPES = ("float32", "bfloat16", "float64")
RESUME = ("exact", "changed")


def validate(config, device_count: int) -> None:
    """Raises ConfigError for the first value that cannot be run on `device_count` devices (of all hosts).

    What is 0 to be chosen later (`dssn_jax.automatic`) passes.
    """
    _check_choices(config)
    _check_numbers(config)
    _check_method(config)
    _check_batches(config, device_count)
    check_x64(config.model)


def check_x64(model) -> None:
    """Raises ConfigError when a `config.model` asks for float64 and JAX would give it float32."""
    for key in ("dtype", "param_dtype"):
        if model[key] == "float64" and not jax.config.jax_enable_x64:
            raise ConfigError(f"config.model.{key}=float64 needs the environment variable JAX_ENABLE_X64=1")


def _check_choices(config) -> None:
    for key, known in (
        ("data.source", SOURCES),
        ("data.val_overlap", layout.OVERLAP),
        ("data.folders.unmasked", layout.UNMASKED),
        ("views.mix_partner", MIX_PARTNERS),
        ("model.backbone", models.BACKBONES),
        ("model.stem", resnet.STEMS),
        ("model.shortcut", resnet.SHORTCUTS),
        ("model.output_stride", (8, 16)),
        ("model.dtype", DTYPES),
        ("model.param_dtype", DTYPES),
        ("method.teacher", methods.LABELERS),
        ("method.selection", pseudo_labels.SELECTIONS),
        ("method.labeled_loss", methods.LABELED_LOSSES),
        ("eval.mode", inference.MODES),
        ("train.resume", RESUME),
    ):
        *sections, name = key.split(".")
        check_choice(f"config.{key}", functools.reduce(operator.getitem, sections, config)[name], known)
    if not models.has_stems(config.model.encoder):
        for key, known in (("stem", resnet.STEMS), ("shortcut", resnet.SHORTCUTS)):
            if config.model[key] != known[0]:
                raise ConfigError(
                    f"config.model.{key} is {config.model[key]!r}; {config.model.encoder} has {known[0]!r} alone"
                )


def _check_numbers(config) -> None:
    if not 1 < len(config.data.classes) <= 255:
        raise ConfigError(f"config.data.classes has {len(config.data.classes)} names; expected 2 to 255")
    for key, least in (
        ("data.crop", 0), ("data.labeled_batch", 0), ("data.unlabeled_batch", 0), ("data.threads", 1),
        ("data.buffer", 1), ("data.workers", 0), ("model.decoder_channels", 1), ("method.strong_views", 0),
        ("method.feature_views", 0), ("method.ohem_group", 1), ("method.ohem_min_kept", 0), ("optimizer.lr", 0),
        ("train.epochs", 0), ("train.steps", 0), ("train.accumulation", 1), ("train.log_every", 1),
        ("train.eval_every", 0), ("train.checkpoint_every", 0), ("train.pictures", 0), ("eval.crop", 0),
        ("eval.batch", 1), ("eval.buckets", 1),
    ):  # fmt: skip
        section, name = key.split(".")
        if config[section][name] < least:
            raise ConfigError(f"config.{key} is {config[section][name]}; expected at least {least}")
    for key in ("data.flip", "views.jitter", "views.gray", "views.blur", "views.cutmix", "ema.decay"):
        section, name = key.split(".")
        if not 0 <= config[section][name] <= 1:
            raise ConfigError(f"config.{key} is {config[section][name]}; expected 0 to 1")
    for key, most in (("brightness", 7), ("contrast", 7), ("saturation", 7), ("hue", 0.5)):
        if not 0 <= config.views[key] <= most:
            raise ConfigError(f"config.views.{key} is {config.views[key]}; expected 0 to {most}")
    for key in ("data.scale", "views.blur_sigma", "views.operations", "views.cutmix_area", "views.cutmix_aspect"):
        section, name = key.split(".")
        pair = tuple(config[section][name])
        if len(pair) != 2 or not 0 <= pair[0] <= pair[1]:
            raise ConfigError(f"config.{key} is {pair}; expected (least, greatest)")
    if not config.eval.scales or min(config.eval.scales) <= 0:
        raise ConfigError(f"config.eval.scales is {tuple(config.eval.scales)}; expected positive numbers")
    if config.data.scale[0] <= 0:
        raise ConfigError(f"config.data.scale is {tuple(config.data.scale)}; expected positive numbers")
    if not 0 <= config.method.feature_dropout < 1:
        raise ConfigError(f"config.method.feature_dropout is {config.method.feature_dropout}; expected 0 to below 1")


def _check_method(config) -> None:
    method = config.method
    for key in ("strong_views", "feature_views"):
        if method[key] > 2:
            raise ConfigError(f"config.method.{key} is {method[key]}; expected 0, 1 or 2")
    if method.strong_views and method.teacher == "none":
        raise ConfigError("config.method.teacher is 'none' but config.method.strong_views is not 0: nobody labels them")
    for key, views in (("image_contrast_weight", "strong_views"), ("feature_contrast_weight", "feature_views")):
        if method[key] and method[views] != 2:
            raise ConfigError(f"config.method.{key} is {method[key]}, which needs config.method.{views}=2")


def _check_batches(config, device_count: int) -> None:
    keys = ["labeled_batch"]
    if config.method.strong_views or config.method.feature_views:
        keys.append("unlabeled_batch")
    parts = config.train.accumulation
    for key in keys:
        if config.data[key] % (device_count * parts):
            expected = f"{device_count} devices" + (
                f" x {parts} parts (config.train.accumulation)" if parts > 1 else ""
            )
            raise ConfigError(f"config.data.{key} is {config.data[key]}; expected a multiple of {expected}")
    if config.method.labeled_loss == "ohem" and config.data.labeled_batch // parts % config.method.ohem_group:
        raise ConfigError(
            f"config.data.labeled_batch is {config.data.labeled_batch}, in {parts} parts; expected a multiple of "
            f"config.method.ohem_group ({config.method.ohem_group})"
        )
