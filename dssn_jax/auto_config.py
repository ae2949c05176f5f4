"""Values that a configuration leaves to the data and the devices: those that are 0. Each choice has its reason.

| key | where 0 | chosen by |
|---|---|---|
| data.crop | | the median of the short sides of labeled and unlabeled images, as 16 k + 1, at most 513 |
| data.labeled_batch, data.unlabeled_batch | | the recipes' 8 + 8 (supervised: 16), or what fits the devices' memory |
| train.steps | and train.epochs=0 | 100 passes over the unlabeled images, within 4000 to 40000 steps |
| train.checkpoint_every | and train.epochs=0 | 20 a run |
| train.eval_every | and train.epochs=0 | 20 a run, or as many as are a fifth of the work |
| optimizer.lr (and lr_multi) | | whether the weights are pretrained: recipes of VOC and of CamVid |
"""

import math
import os
import pathlib
import statistics
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from input_pipeline.sources.open import Source, Sources

_BATCH = 8  # Labeled, and unlabeled, images a step in every published recipe.
_MOST_CROP = 513  # That of the VOC recipe.
_PASSES, _STEPS = 100, (4000, 40000)  # Of the VOC recipe; it has 130 000 steps. Fewer than 4000 end before SGD does.
_EVALUATIONS, _EVALUATION_WORK = 20, 0.2  # In a run, at most; and the part of its work that they may be.
_STEP_WORK = 7  # Forward passes that a DSSN step is worth, an image: student and teacher, views, and the way back.
_PRETRAINED, _RANDOM = (0.002, 10.0), (0.02, 1.0)  # lr, lr_multi of configs/pascal.py and of configs/camvid.py.
_USED = 0.85  # Part of the memory that is planned with: libraries need some, and plans differ between compilers.


class Memory(NamedTuple):
    """What a training step needs on a device, bytes."""

    state: int
    fixed: int
    pixel: int  # For each pixel of each labeled or unlabeled image.


# DSSN in float32, of the plan of the compiler for the CPU (`python -m benchmarks.memory`). Other methods, bfloat16 and
# model.remat need less.
MEMORY = {
    "resnet10w16": Memory(34 << 20, 13 << 20, 3226),
    "resnet18w16": Memory(38 << 20, 14 << 20, 3388),
    "resnet18": Memory(192 << 20, 66 << 20, 5707),
    "resnet50": Memory(464 << 20, 228 << 20, 9946),
    "resnet101": Memory(682 << 20, 300 << 20, 12997),
    "xception": Memory(628 << 20, 581 << 20, 17270),
}

_ALWAYS = ("data.crop", "data.labeled_batch", "data.unlabeled_batch", "optimizer.lr")
_WITHOUT_EPOCHS = ("train.steps", "train.eval_every", "train.checkpoint_every")


def pending(config) -> list[str]:
    """Returns the keys whose value is left to be chosen."""
    keys = _ALWAYS if config.train.epochs else _ALWAYS + _WITHOUT_EPOCHS
    return [key for key in keys if _get(config, key) == 0]


def adopt(config, other):
    """Returns `config` with the values that `other`, of the same run, has for what is left to be chosen."""
    config = config.copy_and_resolve_references()
    for key in pending(config):
        section, name = key.split(".")
        config[section][name] = other[section][name]
        if key == "optimizer.lr":
            config.optimizer.lr_multi = other.optimizer.lr_multi
    return config


def choose(config, sources: Sources, devices: list[jax.Device]) -> tuple[object, list[str]]:
    """Returns `config` with a value for each of `pending`, and a line for each that says why."""
    keys, reasons = pending(config), []
    config = config.copy_and_resolve_references()
    if "data.crop" in keys:
        reasons.append(_choose_crop(config, sources))
    if "data.labeled_batch" in keys or "data.unlabeled_batch" in keys:
        reasons += _choose_batches(config, len(sources.unlabeled), len(devices), memory_of(devices))
    if "optimizer.lr" in keys:
        reasons.append(_choose_learning_rate(config))
    if any(key in keys for key in _WITHOUT_EPOCHS):
        reasons += _choose_steps(config, sources)
    return config, reasons


def memory_of(devices: list[jax.Device]) -> int:
    """Returns the bytes that a step may use on the smallest of `devices` (and on those of the other processes)."""
    local = [device for device in devices if device.process_index == jax.process_index()]
    limits = [stats["bytes_limit"] for stats in (device.memory_stats() for device in local) if stats]
    smallest = min(limits) if limits else _free_memory() // len(local)
    if jax.process_count() > 1:  # All must choose alike.
        smallest = int(multihost_utils.process_allgather(np.int64(smallest >> 20)).min()) << 20
    return int(_USED * smallest)


def images_that_fit(backbone: str, crop: int, limit: int) -> int:
    """Returns how many images, labeled and unlabeled together, a step may have on a device with `limit` bytes."""
    memory = MEMORY[backbone]
    return max(0, (limit - memory.state - memory.fixed) // (memory.pixel * crop**2))


def _choose_crop(config, sources: Sources) -> str:
    sides = [min(source.size(index)) for source in sources[:2] for index in range(len(source))]
    median = statistics.median_low(sides)
    config.data.crop = min(_MOST_CROP, 16 * max(1, round((median - 1) / 16)) + 1)
    return (
        f"data.crop={config.data.crop}: the median short side of {len(sides)} training images is {median} pixels; the "
        f"nearest 16 k + 1, at most {_MOST_CROP}"
    )


def _choose_batches(config, unlabeled: int, devices: int, limit: int) -> list[str]:
    data, parts = config.data, config.train.accumulation
    multiple = devices * parts
    supervised = not (config.method.strong_views or config.method.feature_views)
    fit = images_that_fit(config.model.encoder, data.crop, limit) * multiple
    most = {"labeled_batch": fit if supervised else fit // 2, "unlabeled_batch": fit // 2}
    wanted = {"labeled_batch": _BATCH * (2 if supervised else 1), "unlabeled_batch": _BATCH}
    reasons = []
    for key in (key for key in wanted if data[key] == 0):
        why = [f"the recipes' {wanted[key]}"]
        batch = min(wanted[key], most[key])
        if most[key] < wanted[key]:
            why = [f"{most[key]} fit {limit / 2**30:.1f} GiB a device at crop {data.crop} with {config.model.encoder}"]
        if key == "unlabeled_batch" and unlabeled < batch:
            batch, why = unlabeled, [f"there are {unlabeled} unlabeled images"]
        data[key] = max(1, batch // multiple) * multiple
        if data[key] != batch:
            why.append(f"a multiple of {devices} devices" + (f" x {parts} parts" if parts > 1 else ""))
        if most[key] < data[key]:
            why.append("which may be too much: config.model.remat=True or a smaller config.data.crop needs less")
        reasons.append(f"data.{key}={data[key]}: {', '.join(why)}")
    return reasons


def _choose_learning_rate(config) -> str:
    optimizer, pretrained = config.optimizer, bool(config.model.pretrained)
    optimizer.lr, optimizer.lr_multi = _PRETRAINED if pretrained else _RANDOM
    which = "pretrained weights, as on VOC" if pretrained else "random weights, as on CamVid"
    return f"optimizer.lr={optimizer.lr:g}, optimizer.lr_multi={optimizer.lr_multi:g}: {which}"


def _choose_steps(config, sources: Sources) -> list[str]:
    train, unlabeled, reasons = config.train, len(sources.unlabeled), []
    if not train.steps:
        passes = _PASSES * math.ceil(unlabeled / config.data.unlabeled_batch)
        train.steps = min(max(passes, _STEPS[0]), _STEPS[1])
        bound = "" if train.steps == passes else f", within {_STEPS[0]} to {_STEPS[1]}"
        reasons.append(
            f"train.steps={train.steps}: {_PASSES} passes over {unlabeled} unlabeled images are {passes} steps{bound}"
        )
    every, why = max(1, train.steps // _EVALUATIONS), f"{_EVALUATIONS} times in {train.steps} steps"
    if not train.checkpoint_every:
        train.checkpoint_every = every
        reasons.append(f"train.checkpoint_every={every}: {why}")
    if not train.eval_every:
        evaluation = evaluation_steps(config, sources.val)
        least = math.ceil(evaluation * (1 - _EVALUATION_WORK) / _EVALUATION_WORK)
        if every < least:
            every = min(least, train.steps)
            why = f"an evaluation of {len(sources.val)} images is about the work of {evaluation:.0f} steps"
        train.eval_every = every
        reasons.append(f"train.eval_every={every}: {why}")
    return reasons


def evaluation_steps(config, val: Source) -> float:
    """Returns about how many training steps an evaluation of `val` is worth."""
    pixels = sum(math.prod(val.size(index)) for index in range(len(val)))
    networks = 2 if config.method.teacher == "teacher" else 1
    step = (config.data.labeled_batch + config.data.unlabeled_batch) * config.data.crop**2 * _STEP_WORK
    return networks * pixels / step


def _free_memory() -> int:
    """Bytes of memory that this machine, or the container on it, has left."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo, group = pathlib.Path("/proc/meminfo"), pathlib.Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = min(free, int(lines["MemAvailable"].split()[0]) << 10)
    if group.exists() and group.read_text().strip().isdigit():
        free = min(free, int(group.read_text()))
    return free


def _get(config, key: str):
    section, name = key.split(".")
    return config[section][name]
