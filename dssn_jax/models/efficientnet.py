"""EfficientNet-Lite encoders, dilated to a fixed output stride.

Tan and Le, ICML 2019; the Lite variants are Google's for small devices: ReLU6, no squeeze-and-excitation. Padding is
TensorFlow's SAME, epsilon and momentum of batch norm are TensorFlow's. Names follow timm's `tf_efficientnet_lite*`.
The features are those of the last stage, as in DeepLabV3+ on MobileNetV2: the 1x1 convolution to 1280 channels before
the ImageNet classifier is not part of the encoder. Stochastic depth, which ImageNet training used, is left out.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dssn_jax.models import layers
from dssn_jax.models.batch_norm import BatchNorm, Train, normalized
from dssn_jax.models.convolution import conv_general_dilated
from dssn_jax.models.extent import Extent, strided, zero_outside
from dssn_jax.models.platforms import Padding

BATCH_NORM = {"momentum": 0.01, "epsilon": 1e-3}  # Momentum in PyTorch's sense; 0.99 in TensorFlow's.
STEM_CHANNELS = 32


class StageSpec(NamedTuple):
    """A row of the table of EfficientNet-B0."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    StageSpec(repeats=1, kernel=3, stride=1, expansion=1, channels=16),
    StageSpec(repeats=2, kernel=3, stride=2, expansion=6, channels=24),
    StageSpec(repeats=2, kernel=5, stride=2, expansion=6, channels=40),
    StageSpec(repeats=3, kernel=3, stride=2, expansion=6, channels=80),
    StageSpec(repeats=3, kernel=5, stride=1, expansion=6, channels=112),
    StageSpec(repeats=4, kernel=5, stride=2, expansion=6, channels=192),
    StageSpec(repeats=1, kernel=3, stride=1, expansion=6, channels=320),
)
LOW_LEVEL_STAGE = 1  # Stride 4.
# Name -> fields of `EfficientNetLite`: factors of the channels and of the repeats of `STAGES`.
SIZES = {
    "efficientnet_lite0": {"width": 1.0, "depth": 1.0},
    "efficientnet_lite1": {"width": 1.0, "depth": 1.1},
    "efficientnet_lite2": {"width": 1.1, "depth": 1.2},
}


def from_config(model, **options) -> "EfficientNetLite":
    """Returns the encoder of `config.model`; `options` are further fields of `EfficientNetLite`."""
    return EfficientNetLite(output_stride=model.output_stride, remat=model.remat, **options)


class EfficientNetLite(nn.Module):
    """Encoder with two feature maps: stage 1 (stride 4) and stage 6 (stride `output_stride`), neither with a ReLU."""

    width: float = 1.0
    depth: float = 1.0
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
        """Maps images [B, H, W, 3] to c1 [B, H/4, W/4, C1], c6 [B, H/stride, W/stride, C6], sizes rounded up."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x, padding = same_padding(zero_outside(x, extent), 3, 2, 1, extent)
        stem = _conv(STEM_CHANNELS, 3, strides=2, padding=padding, name="conv_stem", **types)
        x = normalized(stem, BatchNorm(name="bn1", **BATCH_NORM, **types), x, train, nn.relu6)
        extent, current_stride, dilation, features = strided(extent, 2), 2, 1, []
        for stage, spec in enumerate(self.stages()):
            first_dilation = dilation  # Where dilation replaces a stride, the first block keeps the previous dilation.
            if current_stride * spec.stride > self.output_stride:
                dilation, spec = dilation * spec.stride, spec._replace(stride=1)
            current_stride *= spec.stride
            dilations = (first_dilation, *[dilation] * (spec.repeats - 1))
            x = Stage(spec, dilations, self.remat, name=f"blocks_{stage}", **types)(x, train, extent)
            extent = strided(extent, spec.stride)
            features.append(x)
        return features[LOW_LEVEL_STAGE], features[-1]

    def stages(self) -> list[StageSpec]:
        """Returns `STAGES` scaled by width and depth; the first and the last keep their number of blocks."""
        stages = [spec._replace(channels=round_channels(spec.channels * self.width)) for spec in STAGES]
        inner = [spec._replace(repeats=math.ceil(spec.repeats * self.depth)) for spec in stages[1:-1]]
        return [stages[0], *inner, stages[-1]]


class Stage(nn.Module):
    """Blocks of one stage; the first is strided and changes the number of channels."""

    spec: StageSpec
    dilations: tuple[int, ...]  # One per block.
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: Train, extent: Extent | None = None) -> jax.Array:
        block = functools.partial(layers.remat(Block) if self.remat else Block, param_dtype=self.param_dtype)
        for i, dilation in enumerate(self.dilations):
            spec = self.spec._replace(stride=self.spec.stride if i == 0 else 1)
            x = block(spec, dilation, residual=i > 0, dtype=self.dtype, name=str(i))(x, train, extent)
            extent = strided(extent, spec.stride)
        return x


class Block(nn.Module):
    """Inverted residual: 1x1 expansion (where there is one), depthwise and linear 1x1 convolution, each normalized."""

    spec: StageSpec
    dilation: int
    residual: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: Train, extent: Extent | None = None) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(BatchNorm, **BATCH_NORM, **types)
        kernel, stride, expands = self.spec.kernel, self.spec.stride, self.spec.expansion > 1
        expansion, reduction = ("conv_pw", "conv_pwl") if expands else (None, "conv_pw")
        norms = iter(("bn1", "bn2", "bn3"))
        y = x
        if expands:
            wide = _conv(x.shape[-1] * self.spec.expansion, name=expansion, **types)
            y = normalized(wide, norm(name=next(norms)), y, train, nn.relu6)
        y, padding = same_padding(zero_outside(y, extent), kernel, stride, self.dilation, extent)
        depthwise = _depthwise(y.shape[-1], kernel, stride, self.dilation, padding=padding, name="conv_dw", **types)
        y = normalized(depthwise, norm(name=next(norms)), y, train, nn.relu6)
        linear = _conv(self.spec.channels, name=reduction, **types)
        return normalized(linear, norm(name=next(norms)), y, train, residual=x if self.residual else None)


def round_channels(channels: float, divisor: int = 8) -> int:
    """Returns the multiple of `divisor` nearest to `channels`, but none that is smaller by more than a tenth."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def same_padding(
    x: jax.Array, kernel: int, stride: int, dilation: int, extent: Extent | None
) -> tuple[jax.Array, Padding]:
    """Returns the input of a convolution and its padding so that it is one with TensorFlow's SAME.

    A convolution of stride 2 pads images of even size by one pixel less on the left than those of odd size. With
    `extent`, outside of which `x` is zero, each image of the batch is padded as its own size needs: the result is then
    the input shifted and padded, and no padding.

    Args:
      x: [B, H, W, C].
      kernel: odd.
      stride: 1 or 2.
    """
    reach = dilation * (kernel - 1)
    lengths = [-(-size // stride) * stride - stride + reach + 1 for size in x.shape[1:3]]  # Padded.
    if extent is None or stride == 1:
        missing = [max(length - size, 0) for length, size in zip(lengths, x.shape[1:3], strict=True)]
        above, left = (total // 2 for total in missing)
        return x, ((above, missing[0] - above), (left, missing[1] - left))
    for axis, length, sizes in ((1, lengths[0], extent.height), (2, lengths[1], extent.width)):
        before = reach // 2  # Padding above, or to the left of, an image of odd size.
        widths = [(before, length + 1 - before - x.shape[axis]) if i == axis else (0, 0) for i in range(4)]
        odd, even = (jax.lax.slice_in_dim(jnp.pad(x, widths), i, i + length, axis=axis) for i in (0, 1))
        x = jnp.where((sizes % 2 == 0)[:, None, None, None], even, odd)
    return x, ((0, 0), (0, 0))


def _conv(features: int, kernel: int = 1, **options) -> nn.Conv:
    """Returns a convolution without bias, initialized as in the original: N(0, 2 / fan_out)."""
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    options = {"kernel_init": init, "conv_general_dilated": conv_general_dilated, **options}
    return nn.Conv(features, (kernel, kernel), use_bias=False, **options)


def _depthwise(channels: int, kernel: int, stride: int, dilation: int, **options) -> nn.Conv:
    """Returns a depthwise convolution, initialized likewise."""
    options = {"strides": stride, "kernel_dilation": dilation, "feature_group_count": channels, **options}
    return _conv(channels, kernel, kernel_init=_depthwise_init, **options)


def _depthwise_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Returns a depthwise kernel [k, k, 1, C] from N(0, 2 / k ** 2)."""
    return (2 / (shape[0] * shape[1])) ** 0.5 * jax.random.normal(key, shape, dtype)
