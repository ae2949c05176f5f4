"""Checks of a configuration before anything runs. The keys are defined in `configs/defaults.py`."""

import functools
import operator
import pathlib
from collections.abc import Collection, Iterable

import jax
from etils import epath

from dssn_jax import inference, methods, models, pseudo_labels
from dssn_jax.models import resnet
from input_pipeline import layout
from input_pipeline.errors import did_you_mean
from input_pipeline.pipeline import MIX_PARTNERS
from input_pipeline.sources import SOURCES

DTYPES = ("float32", "bfloat16", "float64")
RESUME = ("exact", "changed")


class ConfigError(Exception):
    """A configuration that cannot be run: the message names the key, what was found and what is known or expected.

    Not a ValueError: ml_collections turns one raised in a config file into a traceback.
    """


def suggest(found: str, known: Iterable[str]) -> str:
    """Returns "; did you mean A or B? known: ..." for an unknown name."""
    known = [str(name) for name in known]
    return f"{did_you_mean(str(found), known) or ';'} known: {', '.join(known)}"


def unreadable_config_file(path: str) -> str:
    """Says that a config file cannot be read, and names those of configs/, as `suggest` does."""
    folder = pathlib.Path(__file__).parent.parent / "configs"
    helpers = {"__init__", "arguments", "defaults", "methods"}
    known = sorted(f"configs/{file.name}" for file in folder.glob("*.py") if file.stem not in helpers)
    return f"config file {path!r} cannot be read{suggest(path, known)}"


def check_choice(what: str, found: str, known: Iterable[str]) -> None:
    """Raises ConfigError when `found` is not one of `known`."""
    known = list(known)
    if found not in known:
        raise ConfigError(f"unknown {what} {found!r}{suggest(found, known)}")


def check_target(path: epath.Path) -> None:
    """Raises ConfigError when the file `path`, of --to, has no folder to be written to."""
    if not path.parent.is_dir():
        raise ConfigError(f"--to={path}: the folder {path.parent} does not exist")


def check_keys(arguments: Iterable[str], defaults) -> None:
    """Raises ConfigError for the first override `--config.KEY=...` in `arguments` whose key is not in `defaults`."""
    for argument in arguments:
        if not argument.startswith("--config."):
            continue
        section, path = defaults, argument.removeprefix("--config.").partition("=")[0]
        for depth, key in enumerate(path.split(".")):
            if not hasattr(section, "keys") or key not in section:
                known = section.keys() if hasattr(section, "keys") else ()
                where = ".".join(["config", *path.split(".")[:depth]])
                raise ConfigError(f"unknown config key {path!r}: {where} has no {key!r}{suggest(key, known)}")
            section = section[key]


def differences(old: dict, new: dict, free: Collection[str] = (), section: str = "config") -> list[str]:
    """Lists the keys in which two configurations (as nested dicts) differ, such as "config.seed: 0, now 1".

    `free` are keys, or sections of keys, that are left out, such as "seed" or "data.shapes".
    """
    found = []
    for key in sorted({*old, *new}):
        path, before, after = f"{section}.{key}", old.get(key), new.get(key)
        if path.removeprefix("config.") in free:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, free, path)
        elif before != after:
            found.append(f"{path}: {before!r}, now {after!r}")
    return found


# Keys, or sections of keys, that may change between a stop and the same run's next start: no step or score depends on
# them, or they say where things lie.
_FREE = (
    "name", "data.source", "data.root", "data.splits", "data.split", "data.folders", "data.val_overlap",
    "data.tfds.data_dir", "data.workers", "data.threads", "data.buffer", "model.pretrained", "model.remat",
    "train.resume", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.pictures", "train.epochs",
    "train.steps", "eval",
)  # fmt: skip


def inexact_changes(old: dict, new: dict) -> list[str]:
    """Lists the differences of two configurations after which a run does not continue as it would have."""
    return differences(old, new, free=_FREE)


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
        ("method.labeler", methods.LABELERS),
        ("method.selection", pseudo_labels.SELECTIONS),
        ("method.labeled_loss", methods.LABELED_LOSSES),
        ("eval.mode", inference.MODES),
        ("train.resume", RESUME),
    ):
        *sections, name = key.split(".")
        check_choice(f"config.{key}", functools.reduce(operator.getitem, sections, config)[name], known)
    if not models.has_stems(config.model.backbone):
        for key, known in (("stem", resnet.STEMS), ("shortcut", resnet.SHORTCUTS)):
            if config.model[key] != known[0]:
                raise ConfigError(
                    f"config.model.{key} is {config.model[key]!r}; {config.model.backbone} has {known[0]!r} alone"
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
    for key in ("data.flip", "views.jitter", "views.grey", "views.blur", "views.cutmix", "teacher.keep_rate"):
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
    if not 0 <= config.model.feature_dropout < 1:
        raise ConfigError(f"config.model.feature_dropout is {config.model.feature_dropout}; expected 0 to below 1")


def _check_method(config) -> None:
    method = config.method
    for key in ("strong_views", "feature_views"):
        if method[key] > 2:
            raise ConfigError(f"config.method.{key} is {method[key]}; expected 0, 1 or 2")
    if method.strong_views and method.labeler == "none":
        raise ConfigError("config.method.labeler is 'none' but config.method.strong_views is not 0: nobody labels them")
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
