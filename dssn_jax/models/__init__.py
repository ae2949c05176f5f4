"""Networks by name: `build(config.model, num_classes)`."""

import functools

import jax.numpy as jnp

from dssn_jax.models.deeplabv3plus import DeepLabV3Plus
from dssn_jax.models.resnet import ResNet
from dssn_jax.models.xception import Xception

# Name in `config.model.encoder` -> constructor taking output_stride, dtype, param_dtype, remat (and a ResNet's: stem,
# shortcut).
BACKBONES = {
    "resnet10w16": functools.partial(ResNet, stage_sizes=(1, 1, 1, 1), bottleneck=False, width=16),  # For tests.
    "resnet18": functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), bottleneck=False),
    "resnet18w16": functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), bottleneck=False, width=16),  # For the demo.
    "resnet50": functools.partial(ResNet, stage_sizes=(3, 4, 6, 3)),
    "resnet101": functools.partial(ResNet, stage_sizes=(3, 4, 23, 3)),
    "xception": Xception,
}


def has_stems(backbone: str) -> bool:
    """Whether the backbone of that name has a choice of stems and shortcuts: a ResNet has."""
    return BACKBONES[backbone] is not Xception


def build(model, num_classes: int) -> DeepLabV3Plus:
    """Returns the network of `config.model`; its values are checked by `dssn_jax.config.validate`."""
    types = {"dtype": jnp.dtype(model.dtype), "param_dtype": jnp.dtype(model.param_dtype)}
    options = {"stem": model.stem, "shortcut": model.shortcut} if has_stems(model.backbone) else {}
    backbone = BACKBONES[model.backbone](output_stride=model.output_stride, remat=model.remat, **options, **types)
    return DeepLabV3Plus(
        backbone=backbone,
        num_classes=num_classes,
        aspp_dilations=tuple(model.aspp_dilations),
        channels=model.decoder_channels,
        feature_dropout=method.feature_dropout,
        **types,
    )
