"""Aligned Xception-65 of DeepLabV3+, as the original builds it. Names follow its state dicts.

Chollet, CVPR 2017; Chen et al., ECCV 2018. Two details of the original are kept (docs/method.md, "Network"): a block
without a projection adds relu(input), and the low-level features are block2's second separable convolution before ReLU.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dssn_jax.models import layers
from dssn_jax.models.batch_norm import BatchNorm, Train, normalized
from dssn_jax.models.extent import Extent, strided, zero_outside

BATCH_NORM_MOMENTUM = 3e-4  # In PyTorch's sense: the weight of the new statistics.


def from_config(model, **types) -> "Xception":
    """Returns the encoder of `config.model`; `types` are dtype and param_dtype."""
    return Xception(output_stride=model.output_stride, remat=model.remat, **types)


class Xception(nn.Module):
    """Encoder with two feature maps: block2 (stride 4, 256 channels) and conv5 (stride `output_stride`, 2048)."""

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
        """Maps images [B, H, W, 3] to c1 [B, H/4, W/4, 256], c4 [B, H/stride, W/stride, 2048], sizes rounded up."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(layers.conv, **types)
        norm = functools.partial(BatchNorm, momentum=BATCH_NORM_MOMENTUM, **types)
        block = functools.partial(layers.remat(Block) if self.remat else Block, **types)
        separable = functools.partial(SeparableConv, **types)
        dilation = 16 // self.output_stride  # From block 4 on.

        at = functools.partial(strided, extent)
        stride = 2 if self.output_stride == 16 else 1  # For block 3.
        x = zero_outside(x, extent)
        x = normalized(conv(32, 3, stride=2, name="conv1"), norm(name="bn1"), x, train, nn.relu)
        x = zero_outside(x, at(2))
        x = normalized(conv(64, 3, name="conv2"), norm(name="bn2"), x, train, nn.relu)
        x, _ = block(128, stride=2, name="block1")(x, train, at(2))
        x, c1 = block(256, stride=2, name="block2")(x, train, at(4))
        x, _ = block(728, stride=stride, name="block3")(x, train, at(8))
        last = at(8 * stride)
        for i in range(4, 20):
            x, _ = block(728, dilation=dilation, name=f"block{i}")(x, train, last)
        x, _ = block(1024, dilation=dilation, grow_first=False, name="block20")(x, train, last)
        for name, channels in (("conv3", 1536), ("conv4", 1536), ("conv5", 2048)):
            x = separable(channels, dilation=dilation, relu_first=False, name=name)(x, train, last)
        return c1, x


class Block(nn.Module):
    """Three separable convolutions and a shortcut, projected where the size changes."""

    features: int
    stride: int = 1
    dilation: int = 1
    grow_first: bool = True  # Whether the first convolution, not the second, changes the number of channels.
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: Train, extent: Extent | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns the output and the second convolution's features (before any stride)."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        separable = functools.partial(SeparableConv, dilation=self.dilation, **types)
        first = self.features if self.grow_first else x.shape[-1]
        if x.shape[-1] != self.features or self.stride != 1:
            skip = layers.conv(self.features, stride=self.stride, name="skip", **types)
            norm = BatchNorm(BATCH_NORM_MOMENTUM, name="skipbn", **types)
            shortcut = normalized(skip, norm, x, train)
        else:
            shortcut = nn.relu(x)  # The original's first ReLU works in place.
        x = separable(first, name="sepconv1")(x, train, extent)
        middle = separable(self.features, name="sepconv2")(x, train, extent)
        x = separable(self.features, stride=self.stride, name="sepconv3")(middle, train, extent)
        return x + shortcut, middle


class SeparableConv(nn.Module):
    """3x3 depthwise and 1x1 pointwise convolution, each with batch norm; one ReLU before or one after each."""

    features: int
    stride: int = 1
    dilation: int = 1
    relu_first: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: Train, extent: Extent | None = None) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(BatchNorm, momentum=BATCH_NORM_MOMENTUM, **types)
        after = None if self.relu_first else nn.relu
        channels = x.shape[-1]
        if self.relu_first:
            x = nn.relu(x)
        depthwise = layers.conv(
            channels, 3, stride=self.stride, dilation=self.dilation, groups=channels, name="depthwise", **types
        )
        x = normalized(depthwise, norm(name="bn1"), zero_outside(x, extent), train, after)
        pointwise = layers.conv(self.features, name="pointwise", **types)
        return normalized(pointwise, norm(name="bn2"), x, train, after)
