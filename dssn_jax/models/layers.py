"""Layers with PyTorch's arithmetic, so that weights and numbers of the original carry over. All arrays are NHWC."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# PyTorch's default for convolutions, kaiming_uniform(a=sqrt(5)): U[-1/sqrt(fan_in), 1/sqrt(fan_in)].
default_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Extent(NamedTuple):
    """The part of each picture of a padded batch that is picture: its first rows and columns.

    Networks that are given one compute, inside of it, what they compute for each picture alone: they put zeros outside
    before each operation that looks at neighbours, as the zero padding of a convolution at the picture's border.
    """

    height: jax.Array  # int32 [B].
    width: jax.Array

    def strided(self, stride: int) -> "Extent":
        """The extent after a convolution or a pooling of `stride`: sizes are divided and rounded up."""
        return Extent(-(-self.height // stride), -(-self.width // stride))

    def mask(self, height: int, width: int) -> jax.Array:
        """bool [B, height, width, 1], True inside."""
        rows = jnp.arange(height) < self.height[:, None]
        columns = jnp.arange(width) < self.width[:, None]
        return (rows[:, :, None] & columns[:, None, :])[..., None]


def strided(extent: Extent | None, stride: int) -> Extent | None:
    """`extent.strided(stride)`, or None (all of every picture) for None."""
    return None if extent is None else extent.strided(stride)


def clear(x: jax.Array, extent: Extent | None) -> jax.Array:
    """Puts zeros into `x` [B, H, W, C] outside of `extent`; None is all of it."""
    return x if extent is None else jnp.where(extent.mask(*x.shape[1:3]), x, jnp.zeros((), x.dtype))


def mean(x: jax.Array, extent: Extent | None) -> jax.Array:
    """Means over the pixels inside `extent`, [B, H, W, C] -> [B, 1, 1, C], in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if extent is None:
        return x.mean((1, 2), keepdims=True, dtype=dtype)
    pixels = jnp.maximum(extent.height * extent.width, 1)[:, None, None, None]
    return clear(x, extent).sum((1, 2), keepdims=True, dtype=dtype) / pixels.astype(dtype)


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
        **options,
    )


def bias_init(fan_in: int):
    """PyTorch's default for the bias of a convolution: U[-1/sqrt(fan_in), 1/sqrt(fan_in)]."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class BatchNorm(nn.Module):
    """Batch normalisation as `torch.nn.BatchNorm2d`: the running variance is the unbiased one.

    Under `jit` with the batch sharded over devices the statistics are those of the global batch (`SyncBatchNorm`).
    Statistics are computed and kept in `param_dtype`; the result is in `dtype`.
    """

    momentum: float = 0.1  # Share of the new statistics, PyTorch's sense.
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises `x` [B, H, W, C] with batch statistics (and updates the running ones) or with the running ones."""
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        if train:
            result, mean, var = _normalise_by_batch(x, scale, bias, running_mean.value, self.epsilon)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
            return result.astype(self.dtype)
        factor = jax.lax.rsqrt(running_var.value + self.epsilon) * scale
        return ((x.astype(self.param_dtype) - running_mean.value) * factor + bias).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalise_by_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shift: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises `x` [B, H, W, C]; returns the result in the dtype of `x`, and the mean and (biased) variance [C].

    Everything is computed in the dtype of `scale`. `shift` [C] is a guess of the mean: with it, sums over one pass of
    memory give the variance without cancellation. No gradient flows through the mean and the variance that are
    returned. The backward pass keeps `x` as it is; left to itself, JAX would keep copies in the wider dtype.
    """
    return _normalise_forward(x, scale, bias, shift, epsilon)[0]


def _normalise_forward(x, scale, bias, shift, epsilon):
    shifted = x.astype(scale.dtype) - shift
    offset = shifted.mean((0, 1, 2))
    var = jnp.maximum(jnp.square(shifted).mean((0, 1, 2)) - jnp.square(offset), 0)
    mean, inverse = shift + offset, jax.lax.rsqrt(var + epsilon)
    result = ((x.astype(scale.dtype) - mean) * (inverse * scale) + bias).astype(x.dtype)
    return (result, mean, var), (x, scale, mean, inverse)


def _normalise_backward(epsilon, saved, cotangents):
    """Ioffe and Szegedy, ICML 2015, section 3."""
    del epsilon
    x, scale, mean, inverse = saved
    gradient = cotangents[0].astype(scale.dtype)
    normalised = (x.astype(scale.dtype) - mean) * inverse
    bias_gradient = gradient.sum((0, 1, 2))
    scale_gradient = (gradient * normalised).sum((0, 1, 2))
    count = x.size // x.shape[-1]
    centred = gradient - (bias_gradient + normalised * scale_gradient) / count
    return (centred * (scale * inverse)).astype(x.dtype), scale_gradient, bias_gradient, jnp.zeros_like(mean)


_normalise_by_batch.defvjp(_normalise_forward, _normalise_backward)


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max pooling of stride 2 and padding 1."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def average_pool(x: jax.Array, window: int, stride: int, extent: Extent | None = None) -> jax.Array:
    """Average pooling of `x` [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), C], as timm's `downsample_avg`.

    A strided window that reaches over the edge averages what is inside; at stride 1 (where dilation replaces the
    stride) zeros beyond the right and bottom edges count.
    """
    x = clear(x, extent)
    if stride == 1:
        return nn.avg_pool(x, (window, window), padding=((0, window - 1),) * 2)
    padding = [(0, -size % stride) for size in x.shape[1:3]]
    pool = functools.partial(nn.avg_pool, window_shape=(window, window), strides=(stride, stride), padding=padding)
    if extent is None:
        return pool(x, count_include_pad=False)
    inside = pool(extent.mask(*x.shape[1:3]).astype(x.dtype))  # The share of each window that is picture.
    return pool(x) / jnp.where(inside > 0, inside, 1)


def resize(
    x: jax.Array, height: int, width: int, extent: Extent | None = None, new_extent: Extent | None = None
) -> jax.Array:
    """Bilinear resize of `x` [B, h, w, C] with aligned corners, in the dtype of `x`.

    Equals `torch.nn.functional.interpolate(..., mode="bilinear", align_corners=True)`, as two matrix products. With
    extents, the part of each picture inside `extent` becomes the part inside `new_extent`.
    """
    return _interpolate(x, height, width, x.dtype, jax.lax.Precision.HIGHEST, extent, new_extent)


def upsample(
    logits: jax.Array, height: int, width: int, extent: Extent | None = None, new_extent: Extent | None = None
) -> jax.Array:
    """Resizes logits [B, h, w, K] as `resize` does, to at least float32; logits of that size already are returned.

    Logits of less than float32 are not worth products of full precision: they are made in the accelerator's fast one.
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    if logits.shape[1:3] == (height, width):
        return logits.astype(dtype)
    precision = jax.lax.Precision.HIGHEST if logits.dtype == dtype else None
    return _interpolate(logits, height, width, dtype, precision, extent, new_extent)


def _interpolate(x: jax.Array, height: int, width: int, dtype, precision, extent, new_extent) -> jax.Array:
    product = functools.partial(jnp.einsum, precision=precision)
    x = x.astype(dtype)
    if extent is None:
        rows = jnp.asarray(_interpolation_matrix(x.shape[1], height), dtype)
        columns = jnp.asarray(_interpolation_matrix(x.shape[2], width), dtype)
        return product("Ww,bHwc->bHWc", columns, product("Hh,bhwc->bHwc", rows, x))
    rows = _interpolation_matrices(extent.height, new_extent.height, x.shape[1], height, dtype)
    columns = _interpolation_matrices(extent.width, new_extent.width, x.shape[2], width, dtype)
    return product("bWw,bHwc->bHWc", columns, product("bHh,bhwc->bHwc", rows, x))


def _interpolation_matrices(sizes: jax.Array, new_sizes: jax.Array, size: int, new_size: int, dtype) -> jax.Array:
    """[B, new_size, size]: the matrices that interpolate from the first `sizes` to the first `new_sizes` elements."""
    sizes, new_sizes = sizes[:, None], new_sizes[:, None]
    span = jnp.maximum(new_sizes - 1, 1)
    position = jnp.arange(new_size, dtype=jnp.int32) * (sizes - 1)  # Times 1 / span; whole numbers keep it exact.
    lower = position // span
    upper = jnp.minimum(lower + 1, sizes - 1)
    weight = ((position % span).astype(dtype) / span.astype(dtype))[..., None]
    return (1 - weight) * jax.nn.one_hot(lower, size, dtype=dtype) + weight * jax.nn.one_hot(upper, size, dtype=dtype)


@functools.cache
def _interpolation_matrix(size: int, new_size: int) -> np.ndarray:
    """Returns the [new_size, size] float64 matrix that interpolates linearly with aligned corners."""
    matrix = np.zeros((new_size, size))
    scale = (size - 1) / (new_size - 1) if new_size > 1 else 0.0
    positions = np.arange(new_size) * scale
    lower = np.minimum(positions.astype(int), size - 1)
    upper = np.minimum(lower + 1, size - 1)
    weight = positions - lower
    np.add.at(matrix, (np.arange(new_size), lower), 1 - weight)
    np.add.at(matrix, (np.arange(new_size), upper), weight)
    return matrix


def channel_dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes whole channels of `x` [B, H, W, C] with probability `rate` and scales the rest by 1 / (1 - rate)."""
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1, x.shape[-1]))
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))
