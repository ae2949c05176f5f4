"""Recipes by family of encoder: what a vision transformer changes in the recipe of a data set.

The files of the data sets hold the recipes of convolutional encoders, which are DSSN's. Encoders of DINOv2 and DINOv3
take those of UniMatch V2 (Yang et al., TPAMI 2025) instead; docs/encoders.md has the table. UniMatch V2 was published
with DINOv2 alone: with DINOv3 only the crop differs.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import defaults

# The rates of fine-tuning: every parameter that gets a gradient decays, biases and norms too.
PRETRAINED_LR = 5e-6
PRETRAINED_LR_MULTS = (("decoder/", 40.0),)


class Family(NamedTuple):
    """Encoders of one kind; their names begin with that of the family. All are vision transformers."""

    patch: int  # Crops are multiples of it, in pixels.
    decoder: str = "dpt"


# Name -> family. Images are normalized with the mean and standard deviation of ImageNet, which are the defaults.
FAMILIES = {"dinov2": Family(patch=14), "dinov3": Family(patch=16)}

# Beginning of the names of encoders whose weights expect another normalization -> mean and standard deviation.
# EfficientNet-Lite's were trained on (pixel - 127) / 128.
_NORMALIZATIONS = {"efficientnet_lite": ((127 / 255,) * 3, (128 / 255,) * 3)}


class Schedule(NamedTuple):
    """Batch and length of the published runs on a data set."""

    batch: int  # Labeled images per step, and as many unlabeled ones, over all devices.
    epochs: int  # Over the unlabeled images.
    # Images in an epoch of the supervised baseline, whose labeled list is repeated up to it. Longer lists (1_2 of
    # ADE20K) would have longer epochs.
    supervised: int


SCHEDULES = {
    "pascal": Schedule(16, 60, 3000),
    "cityscapes": Schedule(8, 180, 3000),
    "ade20k": Schedule(8, 60, 6000),
    "coco": Schedule(16, 20, 30000),
}

# Key -> value, for every data set and method. Jitter, blur and the range of scales are the defaults.
_SETTINGS = {
    "optimizer.name": "adamw",
    "optimizer.lr": PRETRAINED_LR,
    "optimizer.lr_mults": PRETRAINED_LR_MULTS,
    "optimizer.weight_decay": 0.01,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    # Without batch norm the teacher can label from the first step on, and dropout on labeled images has no effect.
    "ema.decay": 0.996,
    "ema.ramp": True,
    "ema.warmup_steps": 0,
    "ema.warmup_epochs": 0,
    "ema.batch_stats_epochs": 0,
    "method.perturb_labeled": False,
    "views.mix_partner": "reversed",
    "eval.windows": "inside",
}

# Method -> further keys. Without batch norm the student in evaluation mode is the student.
_METHOD_SETTINGS = {
    "fixmatch": {"method.teacher": "ema"},
    "dssn": {"method.feature_perturb": "complementary"},
}


def find_family(encoder: str) -> Family | None:
    """Returns the family of an encoder; None for convolutional ones, whose recipes are in the data sets' files."""
    return FAMILIES.get(encoder.partition("_")[0])


def normalization(encoder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation, of RGB in [0, 1], of the images that the weights of an encoder expect."""
    known = (value for prefix, value in _NORMALIZATIONS.items() if encoder.startswith(prefix))
    return next(known, (defaults.IMAGENET_MEAN, defaults.IMAGENET_STD))


def nearest_crop(encoder: str, crop: int) -> int:
    """Returns the side nearest to `crop` that the encoder takes, in pixels; 0 stays 0 (chosen from the images).

    So 513 and 801 become 518 and 798 for DINOv2, as in UniMatch V2, and 512 and 800 for DINOv3.
    """
    family = find_family(encoder)
    return max(1, round(crop / family.patch)) * family.patch if family and crop else crop


def decoder_for(encoder: str) -> str:
    """Returns the decoder of the recipes with this encoder."""
    family = find_family(encoder)
    return family.decoder if family else "deeplabv3plus"


def apply(config: ConfigDict, dataset: str) -> None:
    """Fills in what the recipes of `config.model.encoder` change on `dataset`; at most normalization for CNNs.

    The method must have been filled in before. A data set without a published recipe keeps its batch and length.
    """
    config.data.mean, config.data.std = normalization(config.model.encoder)
    if find_family(config.model.encoder) is None:
        return
    name, settings = config.method.name, dict(_SETTINGS)
    settings |= _METHOD_SETTINGS.get(name, {})
    if dataset in SCHEDULES:
        settings |= _schedule(SCHEDULES[dataset], name)
    config.update_from_flattened_dict(settings)


def _schedule(schedule: Schedule, method: str) -> Mapping[str, int]:
    """Returns the keys of a schedule. The baseline has the published number of steps: its epochs are shorter."""
    batch, epochs, images = schedule
    settings = {"data.labeled_batch": batch, "data.unlabeled_batch": batch, "train.epochs": epochs}
    if method == "supervised":
        settings["train.steps"] = epochs * (images // (2 * batch))  # method.labeled_batch_factor is 2.
    return settings
