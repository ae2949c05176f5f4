"""ResNet encoders with a choice of stem and shortcut, dilated to a fixed output stride.

He et al., CVPR 2016; the dilated form is torchvision's `replace_stride_with_dilation`. The deep stems and the average
shortcut are variants C and D of He et al., "Bag of Tricks", CVPR 2019. Names follow the state dicts of the original,
torchvision and timm.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dssn_jax.models import layers
from dssn_jax.models.batch_norm import BatchNorm, Train, normalized
from dssn_jax.models.extent import Extent, strided, zero_outside

# deep: three 3x3 convolutions with 64, 64 and 128 channels (the original; timm's resnet50s). 7x7: one convolution
# (torchvision). deep_narrow: three with 32, 32 and 64 channels (timm's resnet50c and resnet50d).
STEMS = ("deep", "7x7", "deep_narrow")
# Shortcut where a block changes size: a strided 1x1 convolution, or 2x2 average pooling, then a 1x1 (timm's resnet50d).
SHORTCUTS = ("strided", "average")
VARIANTS = tuple({"stem": stem, "shortcut": shortcut} for stem in STEMS for shortcut in SHORTCUTS)


def from_config(model, **options) -> "ResNet":
    """Returns the encoder of `config.model`; `options` are further fields of `ResNet`."""
    return ResNet(
        stem=model.stem, shortcut=model.shortcut, output_stride=model.output_stride, remat=model.remat, **options
    )


class ResNet(nn.Module):
    """Encoder with two feature maps: stage 1 (stride 4) and stage 4 (stride `output_stride`)."""

    stage_sizes: tuple[int, int, int, int]
    bottleneck: bool = True
    width: int = 64  # Channels inside the blocks of the first stage; doubles with each stage.
    stem: str = "deep"  # A name of STEMS.
    shortcut: str = "strided"  # A name of SHORTCUTS.
    output_stride: int = 16
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    size_multiple = 1
    supports_padding = True
    input_size = 33

    @property
    def strides(self) -> tuple[int, int]:
        return 4, self.output_stride

    @nn.compact
    def __call__(self, x: jax.Array, train: Train, extent: Extent | None = None) -> tuple[jax.Array, jax.Array]:
        """Maps images [B, H, W, 3] to c1 [B, H/4, W/4, C1], c4 [B, H/stride, W/stride, C4], sizes rounded up."""
        x, extent = self._stem(x, train, extent)
        block = functools.partial(layers.remat(Block) if self.remat else Block, bottleneck=self.bottleneck)
        block = functools.partial(block, dtype=self.dtype, param_dtype=self.param_dtype)
        dilation, current_stride, features = 1, 4, []
        for stage, size in enumerate(self.stage_sizes):
            stride = 1 if stage == 0 else 2
            first_dilation = dilation  # Where dilation replaces a stride, the first block keeps the previous dilation.
            if current_stride * stride > self.output_stride:
                dilation, stride = dilation * stride, 1
            current_stride *= stride
            for i in range(size):
                x = block(
                    width=self.width * 2**stage,
                    stride=stride if i == 0 else 1,
                    dilation=first_dilation if i == 0 else dilation,
                    project=i == 0 and (stage > 0 or x.shape[-1] != self._channels(stage)),
                    average=(2 if stage > 0 else 1) if self.shortcut == "average" else None,
                    name=f"layer{stage + 1}_{i}",
                )(x, train, extent)
                extent = strided(extent, stride if i == 0 else 1)
            features.append(x)
        return features[0], features[-1]

    def _channels(self, stage: int) -> int:
        return self.width * 2**stage * (Block.expansion if self.bottleneck else 1)

    def _stem(self, x: jax.Array, train: Train, extent: Extent | None):
        conv = functools.partial(layers.conv, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = functools.partial(BatchNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        half, quarter = strided(extent, 2), strided(extent, 4)
        x = zero_outside(x, extent)
        if self.stem == "7x7":
            last = conv(self.width, 7, stride=2, name="conv1")
        else:
            width = self.width // 2 if self.stem == "deep_narrow" else self.width
            x = normalized(conv(width, 3, stride=2, name="conv1_0"), norm(name="conv1_1"), x, train, nn.relu)
            x = normalized(conv(width, 3, name="conv1_3"), norm(name="conv1_4"), zero_outside(x, half), train, nn.relu)
            x = zero_outside(x, half)
            last = conv(2 * width, 3, name="conv1_6")
        x = normalized(last, norm(name="bn1"), x, train, nn.relu)
        return layers.max_pool(zero_outside(x, half)), quarter


class Block(nn.Module):
    """Residual block: 1x1, 3x3, 1x1 (bottleneck, stride on the 3x3) or two 3x3 convolutions."""

    width: int
    stride: int
    dilation: int
    project: bool  # Whether the shortcut has a 1x1 convolution.
    average: int | None  # Side of the average pooling before it; None: the convolution itself is strided.
    bottleneck: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    expansion = 4  # Ratio of a bottleneck's output channels to its width.

    @nn.compact
    def __call__(self, x: jax.Array, train: Train, extent: Extent | None = None) -> jax.Array:
        conv = functools.partial(layers.conv, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = functools.partial(BatchNorm, dtype=self.dtype, param_dtype=self.param_dtype)
        spatial = {"stride": self.stride, "dilation": self.dilation}
        channels = self.width * (self.expansion if self.bottleneck else 1)
        if self.project and self.average:
            shortcut = layers.average_pool(x, self.average, self.stride, extent)
            shortcut = normalized(conv(channels, name="downsample_1"), norm(name="downsample_2"), shortcut, train)
        elif self.project:
            shortcut = conv(channels, stride=self.stride, name="downsample_0")
            shortcut = normalized(shortcut, norm(name="downsample_1"), x, train)
        else:
            shortcut = x
        if self.bottleneck:
            y = normalized(conv(self.width, name="conv1"), norm(name="bn1"), x, train, nn.relu)
            middle = conv(self.width, 3, **spatial, name="conv2")
            y = normalized(middle, norm(name="bn2"), zero_outside(y, extent), train, nn.relu)
            return normalized(conv(channels, name="conv3"), norm(name="bn3"), y, train, nn.relu, shortcut)
        first = conv(self.width, 3, **spatial, name="conv1")
        y = normalized(first, norm(name="bn1"), zero_outside(x, extent), train, nn.relu)
        last = conv(channels, 3, dilation=self.dilation, name="conv2")
        return normalized(
            last, norm(name="bn2"), zero_outside(y, strided(extent, self.stride)), train, nn.relu, shortcut
        )
