"""Layers with PyTorch's arithmetic, so that weights and numbers of the original carry over. All arrays are NHWC."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dssn_jax.models import platforms
from dssn_jax.models.convolution import conv_general_dilated
from dssn_jax.models.extent import Extent, zero_outside

# PyTorch's default for convolutions, kaiming_uniform(a=sqrt(5)): U[-1/sqrt(fan_in), 1/sqrt(fan_in)].
default_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def conv(features: int, kernel: int = 1, stride: int = 1, dilation: int = 1, groups: int = 1, **kwargs) -> nn.Conv:
    """2-D convolution without bias, as `torch.nn.Conv2d` with `padding = dilation * (kernel - 1) / 2`.

    `[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]`; `kwargs` go to `flax.linen.Conv`.
    """
    options = {"use_bias": False, "kernel_init": default_kernel_init, **kwargs}
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=dilation * (kernel - 1) // 2,
        kernel_dilation=dilation,
        feature_group_count=groups,
        conv_general_dilated=conv_general_dilated,
        **options,
    )


def bias_init(fan_in: int):
    """PyTorch's default for the bias of a convolution: U[-1/sqrt(fan_in), 1/sqrt(fan_in)]."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max pooling of stride 2 and padding 1, `[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]`.

    The backward pass reads which element of each window is the largest, the first if there are several, a byte per
    value. XLA's own keeps `x` and looks for the largest values again; TPUs, which have instructions for it, use that.
    """
    return _max_pool_forward(x)[0]


def _max_pool_forward(x):
    def on_tpu(x):
        pooled = _pool(x)
        return pooled, jnp.zeros(pooled.shape, jnp.uint8)

    pooled, index = jax.lax.platform_dependent(x, tpu=on_tpu, cpu=_largest_by_axis, default=_largest)
    return pooled, (x, index)


def _pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def _largest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest values of the windows, and which of the nine pixels they are, row by row, uint8."""
    pixels = []
    for down, right in itertools.product(_OFFSETS, repeat=2):
        padding = [(0, 0, 0), (-down, down, 0), (-right, right, 0), (0, 0, 0)]
        pixels.append(jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), padding)[:, ::2, ::2])
    return _first_largest([(each, jnp.uint8(number)) for number, each in enumerate(pixels)])


def _largest_by_axis(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `_largest(x)`: the first largest of three columns, then of three rows.

    CPUs write out all that is padded, which this way is less. GPUs have one kernel for `_largest`, and two for this.
    """
    columns = [(_in_windows(x, 2, offset, -jnp.inf), jnp.uint8(number)) for number, offset in enumerate(_OFFSETS)]
    largest, column = _first_largest(columns)
    rows = [
        (_in_windows(largest, 1, offset, -jnp.inf), _in_windows(column, 1, offset, 0) + jnp.uint8(3 * number))
        for number, offset in enumerate(_OFFSETS)
    ]
    return _first_largest(rows)


def _first_largest(candidates: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Returns the largest of the values and its index, of pairs (value, index); the first if several are equal."""
    (largest, index), *others = candidates
    for value, number in others:
        index = jnp.where(value > largest, number, index)
        largest = jnp.maximum(largest, value)
    return largest, index


def _in_windows(x: jax.Array, axis: int, offset: int, fill: float) -> jax.Array:
    """Returns the pixels that windows have at an offset from their centers along an axis, `fill` beyond the border."""
    windows, before = (x.shape[axis] + 1) // 2, max(-offset, 0)
    pixels = jax.lax.slice_in_dim(x, offset % 2, None, 2, axis)
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (before, windows - before - pixels.shape[axis], 0)
    return jax.lax.pad(pixels, jnp.array(fill, x.dtype), padding)


def _max_pool_backward(saved, gradient):
    def on_tpu(x, index, gradient):
        del index
        return jax.vjp(_pool, x)[1](gradient)[0]

    return (jax.lax.platform_dependent(*saved, gradient, tpu=on_tpu, default=_to_largest),)


def _to_largest(x: jax.Array, index: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns the gradient of `x`, of which the sizes are read alone: sums of what its windows send to each pixel."""
    wide = platforms.wide(gradient.dtype)
    sent = [jnp.where(index == number, gradient, 0).astype(wide) for number in range(9)]
    rows = [_from_windows(sent[first : first + 3], 2, x.shape[2]) for first in (0, 3, 6)]
    return _from_windows(rows, 1, x.shape[1]).astype(gradient.dtype)


def _from_windows(sent: list[jax.Array], axis: int, size: int) -> jax.Array:
    """Returns the `size` pixels along an axis, given what windows send to the pixels at `_OFFSETS`.

    A pixel at an even place is the center of a window; the others lie between two.
    """
    before, center, after = sent
    padding = [(0, 0, 0)] * before.ndim
    padding[axis] = (-1, 1, 0)  # Window i + 1 sends to pixel 2 i + 1, before its center.
    between = after + jax.lax.pad(before, jnp.zeros((), before.dtype), padding)
    shape = list(center.shape)
    shape[axis] *= 2
    pixels = jnp.stack([center, between], axis + 1).reshape(shape)
    return jax.lax.slice_in_dim(pixels, 0, size, axis=axis)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)

_OFFSETS = (-1, 0, 1)  # Where the pixels of a window of `max_pool` are along an axis, relative to its center.


def average_pool(x: jax.Array, window: int, stride: int, extent: Extent | None = None) -> jax.Array:
    """Average pooling of `x` [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), C], as timm's `downsample_avg`.

    A strided window that crosses the edge averages the pixels inside; at stride 1 (where dilation replaces the stride)
    zeros beyond the right and bottom edges count.
    """
    x = zero_outside(x, extent)
    if stride == 1:
        return nn.avg_pool(x, (window, window), padding=((0, window - 1),) * 2)
    padding = [(0, -size % stride) for size in x.shape[1:3]]
    pool = functools.partial(nn.avg_pool, window_shape=(window, window), strides=(stride, stride), padding=padding)
    if extent is None:
        return pool(x, count_include_pad=False)
    inside = pool(extent.mask(*x.shape[1:3]).astype(x.dtype))  # The fraction of each window that is valid.
    return pool(x) / jnp.where(inside > 0, inside, 1)


@functools.cache
def remat(block: type[nn.Module]) -> type[nn.Module]:
    """Returns a block (called with x, train, extent) that recomputes its activations in the backward pass."""
    return nn.remat(block, static_argnums=(2,))
