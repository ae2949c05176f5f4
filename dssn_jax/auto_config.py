"""Fills in configuration values that are unset, from the data and the devices, and says why.

| key | also needs | chosen value |
|---|---|---|
| data.crop | | median short side of the training images, as 16 k + 1 or in patches, at most 513 (518, 512) |
| data.labeled_batch, data.unlabeled_batch | | 8 + 8 as in the recipes, or what fits the memory of the devices |
| train.steps | train.epochs=0 | 100 passes over the unlabeled images, within 4000 to 40000 steps |
| train.checkpoint_every | train.epochs=0 | 20 times per run |
| train.eval_every | train.epochs=0 | 20 times per run, or less often so that evaluation is a fifth of the work |
| optimizer.lr (and lr_mults) | | by optimizer, encoder and whether weights are pretrained |
| data.class_pixels | a key that depends on them | the pixels of each class in the labeled masks |

Unset values are 0, or () for `data.class_pixels`.
"""

import math
import os
import pathlib
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from configs import encoders
from configs.checks import ConfigError
from dssn_jax import models
from input_pipeline import class_statistics
from input_pipeline.batch import labeled_rows
from input_pipeline.errors import first_names
from input_pipeline.sources.open import Source, Sources

_BATCH = 8  # config.data.labeled_batch and unlabeled_batch of the published recipes.
_MAX_CROP = 513  # As in the VOC recipe; vision transformers have the nearest multiple of their patch.
_PASSES = 100  # Over the unlabeled images, as in the VOC recipe.
_STEPS = (4000, 40000)  # Least and most; with fewer SGD does not converge. The VOC recipe has 130 000.
_EVALUATIONS, _EVALUATION_SHARE = 20, 0.2  # Most evaluations per run, and the greatest share of its work.
_STEP_COST = 7  # Cost of a DSSN step per image, in forward passes, backward pass included.
# Control groups of Linux, version 2 and 1: the files with the limit and the use of memory, and the entry of memory.stat
# with cached files, which are counted as used but can be dropped.
_CONTAINER = pathlib.Path("/sys/fs/cgroup")
_CONTAINER_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
_MEMORY_SHARE = 0.85  # Planned share of the memory: libraries need some, and compilers plan differently.


class Rates(NamedTuple):
    """A learning rate with the factors of groups of parameters, and where they come from."""

    lr: float
    lr_mults: tuple[tuple[str, float], ...]
    origin: str


# (optimizer.name, whether weights are pretrained) -> rates, and those of vision transformers where they differ.
_RATES = {
    ("sgd", True): Rates(0.002, (("decoder/", 10.0),), "pretrained weights, as on VOC"),
    ("sgd", False): Rates(0.02, (), "random weights, as on CamVid"),
    ("adamw", True): Rates(6e-5, (("decoder/", 10.0),), "pretrained weights, as SegFormer (Xie et al., NeurIPS 2021)"),
    ("adamw", False): Rates(1e-3, (), "random weights, the usual rate of Adam"),
}
_VIT_RATES = {
    ("adamw", True): Rates(
        encoders.PRETRAINED_LR, encoders.PRETRAINED_LR_MULTS, "a pretrained vision transformer, as UniMatch V2"
    ),
    ("adamw", False): Rates(5e-4, (), "a vision transformer from random weights, a usual rate"),
}


class Memory(NamedTuple):
    """Device memory of a training step, in bytes."""

    state: int
    fixed: int
    pixel: int  # Per pixel of each labeled or unlabeled image.
    gpu_pixel: int | None = None  # The same on a GPU, where it is known to differ.


# DSSN in float32, as planned by the compiler for the CPU (`python -m benchmarks.memory`). Other methods, bfloat16,
# model.remat and a frozen encoder need less. Transformers were planned at crop 518, where attention takes more a pixel
# than at smaller crops: w64, Small and Base. The others are Base times the ratio of blocks x heads (7B: of blocks x
# width), with 16 bytes of state per parameter; DINOv3 is taken for DINOv2 of the same size, which has more tokens.
# EfficientNet-Lite1 is taken for Lite2. GPUs keep less of the attention: Base was planned by the compiler for the H100
# (2 + 2 and 4 + 4 images), Small and Large are Base times the ratio of their UniMatch V2 programs
# (docs/results/compiled), and larger ones Large times the ratio of the CPU's numbers.
MEMORY = {
    "resnet10w16": Memory(34 << 20, 13 << 20, 3226),
    "resnet18w16": Memory(38 << 20, 14 << 20, 3388),
    "resnet18": Memory(192 << 20, 66 << 20, 5707),
    "resnet50": Memory(464 << 20, 228 << 20, 9946),
    "resnet101": Memory(682 << 20, 300 << 20, 12997),
    "xception": Memory(628 << 20, 581 << 20, 17270),
    "efficientnet_lite0": Memory(80 << 20, 24 << 20, 7917),
    "efficientnet_lite1": Memory(99 << 20, 31 << 20, 9809),
    "efficientnet_lite2": Memory(99 << 20, 31 << 20, 9809),
    "dinov2_w64": Memory(13 << 20, 0, 2772),
    "dinov2_small": Memory(384 << 20, 0, 20757, 6299),
    "dinov2_base": Memory(1492 << 20, 0, 40931, 11956),
    "dinov2_large": Memory(5103 << 20, 0, 109000, 29702),
    "dinov2_giant": Memory(19166 << 20, 0, 273000, 74394),
    "dinov3_w64": Memory(13 << 20, 0, 2772),
    "dinov3_small": Memory(384 << 20, 0, 20757, 6299),
    "dinov3_small_plus": Memory(487 << 20, 0, 20757, 6299),
    "dinov3_base": Memory(1492 << 20, 0, 40931, 11956),
    "dinov3_large": Memory(5103 << 20, 0, 109000, 29702),
    "dinov3_huge_plus": Memory(14628 << 20, 0, 182000, 49596),
    "dinov3_7b": Memory(104544 << 20, 0, 728000, 198383),
}
_UNKNOWN = MEMORY["dinov2_base"]._replace(gpu_pixel=None)  # More demanding than every convolutional encoder.
_GPUS = ("gpu", "cuda", "rocm")  # Names of jax.Device.platform.
_REGISTERS = "_reg"  # Ends the names of encoders of DINOv2 with four more tokens.

_ALWAYS = ("data.crop", "data.labeled_batch", "data.unlabeled_batch", "optimizer.lr")
_WITHOUT_EPOCHS = ("train.steps", "train.eval_every", "train.checkpoint_every")


def unset_keys(config) -> list[str]:
    """Returns the keys that are unset, for this module to choose."""
    keys = _ALWAYS if config.train.epochs else _ALWAYS + _WITHOUT_EPOCHS
    unset = [key for key in keys if _get(config, key) == 0]
    if class_statistics.users(config) and not config.data.class_pixels:
        unset.append("data.class_pixels")
    return unset


def copy_choices(config, other):
    """Returns a copy of `config` whose unset keys have the values of `other`, a configuration of the same run."""
    config = config.copy_and_resolve_references()
    for key in unset_keys(config):
        section, name = key.split(".")
        config[section][name] = other[section][name]
        if key == "optimizer.lr":
            config.optimizer.lr_mults = other.optimizer.lr_mults
    return config


def fill_in(config, sources: Sources, devices: list[jax.Device]) -> tuple[object, list[str]]:
    """Returns a copy of `config` with a value for each of `unset_keys`, and one line per key that says why."""
    keys, reasons = unset_keys(config), []
    config = config.copy_and_resolve_references()
    if "data.crop" in keys:
        reasons.append(_choose_crop(config, sources))
    if "data.labeled_batch" in keys or "data.unlabeled_batch" in keys:
        reasons += _choose_batches(config, len(sources.unlabeled), devices, memory_of(devices))
    if "optimizer.lr" in keys:
        reasons.append(_choose_learning_rate(config))
    if any(key in keys for key in _WITHOUT_EPOCHS):
        reasons += _choose_steps(config, sources)
    if "data.class_pixels" in keys:
        reasons.append(_count_class_pixels(config, sources.labeled))
    return config, reasons


def memory_of(devices: list[jax.Device]) -> int:
    """Returns the bytes that a step may use on the smallest of `devices`, those of other processes included."""
    local = [device for device in devices if device.process_index == jax.process_index()]
    limits = [stats["bytes_limit"] for stats in (device.memory_stats() for device in local) if stats]
    smallest = min(limits) if limits else free_memory() // len(local)
    if jax.process_count() > 1:  # All processes must choose the same values.
        smallest = int(multihost_utils.process_allgather(np.int64(smallest >> 20)).min()) << 20
    return int(_MEMORY_SHARE * smallest)


def images_that_fit(encoder: str, crop: int, limit: int, platform: str = "cpu") -> int:
    """Returns how many images, labeled and unlabeled together, a step can have on a device with `limit` bytes.

    `platform` is that of `jax.Device`. An encoder that is not in `MEMORY` is taken for the Base of DINOv2 on a CPU.
    """
    memory = MEMORY.get(encoder.removesuffix(_REGISTERS), _UNKNOWN)
    pixel = memory.gpu_pixel if platform in _GPUS and memory.gpu_pixel else memory.pixel
    return max(0, (limit - memory.state - memory.fixed) // (pixel * crop**2))


def _choose_crop(config, sources: Sources) -> str:
    sides = [min(source.size(i)) for source in (sources.labeled, sources.unlabeled) for i in range(len(source))]
    median = statistics.median_low(sides)
    multiple = models.build(config.model, len(config.data.classes)).size_multiple
    period, offset = (16, 1) if multiple == 1 else (multiple, 0)
    greatest = period * max(1, round((_MAX_CROP - offset) / period)) + offset
    config.data.crop = min(greatest, period * max(1, round((median - offset) / period)) + offset)
    rounding = "16 k + 1" if multiple == 1 else f"multiple of {multiple}"
    return (
        f"data.crop={config.data.crop}: the median short side of {len(sides)} training images is {median} pixels; the "
        f"nearest {rounding}, at most {greatest}"
    )


def _choose_batches(config, unlabeled: int, devices: list[jax.Device], limit: int) -> list[str]:
    data, factor = config.data, config.method.labeled_batch_factor
    uses_unlabeled = bool(config.method.strong_views or config.method.feature_views)
    shares = len(devices) * config.train.accumulation
    fit = images_that_fit(config.model.encoder, data.crop, limit, devices[0].platform) * shares
    # A batch of labeled images is `factor` times data.labeled_batch.
    most = {"labeled_batch": (fit // 2 if uses_unlabeled else fit) // factor, "unlabeled_batch": fit // 2}
    factors = {"labeled_batch": factor, "unlabeled_batch": 1}
    reasons = []
    pairs = uses_unlabeled and config.views.mix_partner == "reversed"  # Each device needs an even number.
    for key in (key for key in most if data[key] == 0):
        multiple = shares // math.gcd(shares, factors[key])
        paired = key == "unlabeled_batch" and pairs
        multiple *= 2 if paired else 1
        batch, why = _BATCH, [f"the recipes' {_BATCH}"]
        if most[key] < batch:
            batch = most[key]
            times = f" x {factors[key]}" if factors[key] > 1 else ""
            gib, encoder = f"{limit / 2**30:.1f} GiB per device", config.model.encoder
            why = [f"{batch}{times} fit {gib} at crop {data.crop} with {encoder}"]
        if key == "unlabeled_batch" and unlabeled < batch:
            batch, why = unlabeled, [f"there are {unlabeled} unlabeled images"]
        data[key] = max(1, batch // multiple) * multiple
        if data[key] != batch:
            times = f" x {config.train.accumulation} micro-batches" if config.train.accumulation > 1 else ""
            times += " x 2 (config.views.mix_partner=reversed)" if paired else ""
            why.append(f"a multiple of {len(devices)} devices{times}")
        if most[key] < data[key]:
            why.append("which may be too much: config.model.remat=True or a smaller config.data.crop needs less")
        reasons.append(f"data.{key}={data[key]}: {', '.join(why)}")
    return reasons


def _choose_learning_rate(config) -> str:
    optimizer, key = config.optimizer, (config.optimizer.name, bool(config.model.pretrained))
    known = _RATES if encoders.find_family(config.model.encoder) is None else _RATES | _VIT_RATES
    if key not in known:
        raise ConfigError(f"config.optimizer.lr is 0; expected a learning rate for optimizer.name={optimizer.name}")
    rates = known[key]
    optimizer.lr, optimizer.lr_mults = rates.lr, rates.lr_mults
    return f"optimizer.lr={rates.lr:g}, optimizer.lr_mults={rates.lr_mults}: {rates.origin}"


def _choose_steps(config, sources: Sources) -> list[str]:
    train, unlabeled, reasons = config.train, len(sources.unlabeled), []
    if not train.steps:
        passes = _PASSES * math.ceil(unlabeled / config.data.unlabeled_batch)
        train.steps = min(max(passes, _STEPS[0]), _STEPS[1])
        bound = "" if train.steps == passes else f", within {_STEPS[0]} to {_STEPS[1]}"
        reasons.append(
            f"train.steps={train.steps}: {_PASSES} passes over {unlabeled} unlabeled images are {passes} steps{bound}"
        )
    period, why = max(1, train.steps // _EVALUATIONS), f"{_EVALUATIONS} times in {train.steps} steps"
    if not train.checkpoint_every:
        train.checkpoint_every = period
        reasons.append(f"train.checkpoint_every={period}: {why}")
    if not train.eval_every:
        cost = evaluation_cost(config, sources.val)
        least = math.ceil(cost * (1 - _EVALUATION_SHARE) / _EVALUATION_SHARE)
        if period < least:
            period = min(least, train.steps)
            why = f"evaluating {len(sources.val)} images costs about as much as {cost:.0f} steps"
        train.eval_every = period
        reasons.append(f"train.eval_every={period}: {why}")
    return reasons


def _count_class_pixels(config, labeled: Source) -> str:
    data = config.data
    data.class_pixels = tuple(class_statistics.count_pixels(labeled, data).sum(0).tolist())
    share = class_statistics.frequencies(data.class_pixels)
    rarest = first_names([f"{data.classes[i]} {share[i]:.2%}" for i in np.argsort(share, kind="stable")])
    users = ", ".join(class_statistics.users(config))
    return f"data.class_pixels: counted in {len(labeled)} labeled masks, for {users}; the rarest: {rarest}"


def evaluation_cost(config, val: Source) -> float:
    """Returns the approximate cost of evaluating the images of `val`, in training steps."""
    pixels = sum(math.prod(val.size(index)) for index in range(len(val)))
    networks = 2 if config.method.teacher == "ema" else 1
    step = (labeled_rows(config) + config.data.unlabeled_batch) * config.data.crop**2 * _STEP_COST
    return networks * pixels / step


def free_memory() -> int:
    """Returns the free bytes of memory of this machine, or of the container that this process runs in."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = min(free, int(lines["MemAvailable"].split()[0]) << 10)
    return max(0, min([free, *_left_in_container(_CONTAINER)]))


def _left_in_container(folder: pathlib.Path) -> Iterator[int]:
    """Yields the bytes that a container may still use, cached files not counted; nothing without a limit."""
    for limit, usage, cached in _CONTAINER_FILES:
        path = folder / limit
        text = path.read_text().strip() if path.exists() else ""
        if text.isdigit():
            stat = dict(line.split() for line in path.with_name("memory.stat").read_text().splitlines())
            yield int(text) - int((folder / usage).read_text()) + int(stat.get(cached, 0))


def _get(config, key: str):
    section, name = key.split(".")
    return config[section][name]
