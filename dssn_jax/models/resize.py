"""Bilinear resizing with aligned corners. All arrays are NHWC.

Whole multiples, as all recipes have them (33 -> 129 -> 513), are computed pixel by pixel where that is faster: a GPU
then reads what is small and writes what is large, once each, and CPUs take a tenth of the time. Everything else, and
TPUs, get two matrix products. The results are the same but for rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dssn_jax.models import platforms
from dssn_jax.models.extent import Extent


def resize(
    x: jax.Array, height: int, width: int, extent: Extent | None = None, new_extent: Extent | None = None
) -> jax.Array:
    """Resizes `x` [B, h, w, C] to [B, height, width, C], bilinearly with aligned corners, in the dtype of `x`.

    Equals `torch.nn.functional.interpolate(..., mode="bilinear", align_corners=True)`. With extents, the part of each
    image inside `extent` becomes the part inside `new_extent`.
    """
    return _interpolate(x, height, width, x.dtype, jax.lax.Precision.HIGHEST, extent, new_extent)


def upsample(
    logits: jax.Array, height: int, width: int, extent: Extent | None = None, new_extent: Extent | None = None
) -> jax.Array:
    """Resizes logits [B, h, w, K] as `resize` does, in at least float32; without work if they have that size already.

    Logits narrower than float32 carry too few bits to be worth full-precision products: these use the accelerator's
    default precision.
    """
    dtype = platforms.wide(logits.dtype)
    if logits.shape[1:3] == (height, width):
        return logits.astype(dtype)
    precision = jax.lax.Precision.HIGHEST if logits.dtype == dtype else None
    return _interpolate(logits, height, width, dtype, precision, extent, new_extent)


def _interpolate(x: jax.Array, height: int, width: int, dtype, precision, extent, new_extent) -> jax.Array:
    x = x.astype(dtype)
    if extent is None:
        factors = tuple(_factor(*sizes) for sizes in ((x.shape[1], height), (x.shape[2], width)))
        if all(factors):
            return _enlarge(x, factors, precision)
        return _by_products(x, height, width, precision)
    product = functools.partial(jnp.einsum, precision=precision)
    rows = _interpolation_matrices(extent.height, new_extent.height, x.shape[1], height, dtype)
    columns = _interpolation_matrices(extent.width, new_extent.width, x.shape[2], width, dtype)
    return product("bWw,bHwc->bHWc", columns, product("bHh,bhwc->bHwc", rows, x))


def _by_products(x: jax.Array, height: int, width: int, precision) -> jax.Array:
    product = functools.partial(jnp.einsum, precision=precision)
    rows = jnp.asarray(_interpolation_matrix(x.shape[1], height), x.dtype)
    columns = jnp.asarray(_interpolation_matrix(x.shape[2], width), x.dtype)
    return product("Ww,bHwc->bHWc", columns, product("Hh,bhwc->bHwc", rows, x))


def _factor(size: int, new_size: int) -> int:
    """Returns the whole number of steps that one between neighbors becomes; 0 if it is none."""
    if size == 1 or (new_size - 1) % (size - 1):
        return 0
    return (new_size - 1) // (size - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _enlarge(x: jax.Array, factors: tuple[int, int], precision) -> jax.Array:
    """Resizes `x` [B, h, w, C] to [B, (h - 1) * factor + 1, ..., C], with a factor each for height and width."""
    height, width = ((size - 1) * factor + 1 for size, factor in zip(x.shape[1:3], factors, strict=True))

    def by_pixel(x: jax.Array) -> jax.Array:
        wide = x.astype(platforms.wide(x.dtype))
        return _stretch(_stretch(wide, factors[0], 1), factors[1], 2).astype(x.dtype)

    products = functools.partial(_by_products, height=height, width=width, precision=precision)
    return jax.lax.platform_dependent(x, tpu=products, default=by_pixel)


def _enlarge_forward(x, factors, precision):
    return _enlarge(x, factors, precision), None


def _enlarge_backward(factors, precision, saved, gradient):
    del saved
    batch, height, width, channels = gradient.shape
    rows, columns = ((size - 1) // factor + 1 for size, factor in zip((height, width), factors, strict=True))

    def by_pixel(gradient: jax.Array) -> jax.Array:
        gradient = _stretch_transposed(gradient, factors[1], 2)
        return _stretch_transposed(gradient, factors[0], 1)

    def by_products(gradient: jax.Array) -> jax.Array:
        x = jax.ShapeDtypeStruct((batch, rows, columns, channels), gradient.dtype)
        products = functools.partial(_by_products, height=height, width=width, precision=precision)
        return jax.linear_transpose(products, x)(gradient)[0]

    return (jax.lax.platform_dependent(gradient, cuda=by_pixel, default=by_products),)


_enlarge.defvjp(_enlarge_forward, _enlarge_backward)


def _stretch(x: jax.Array, factor: int, axis: int) -> jax.Array:
    """Puts `factor - 1` interpolated elements between neighbors along an axis: n become (n - 1) * factor + 1."""
    size = x.shape[axis]
    shift = [(-1, 1, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    following = jax.lax.pad(x, jnp.zeros((), x.dtype), shift)
    weight = np.arange(factor).reshape([-1] + [1] * (x.ndim - axis - 1)) / factor
    here, there = (jnp.asarray(each, x.dtype) for each in (1 - weight, weight))
    between = jnp.expand_dims(x, axis + 1) * here + jnp.expand_dims(following, axis + 1) * there
    stretched = between.reshape(*x.shape[:axis], size * factor, *x.shape[axis + 1 :])
    return jax.lax.slice_in_dim(stretched, 0, (size - 1) * factor + 1, axis=axis)


def _stretch_transposed(gradient: jax.Array, factor: int, axis: int) -> jax.Array:
    """Returns the gradient of what `_stretch` stretched, in the dtype of `gradient`."""
    wide = gradient.astype(platforms.wide(gradient.dtype))
    sizes = list(wide.shape)
    sizes[axis] = (sizes[axis] - 1) // factor + 1
    stretch = functools.partial(_stretch, factor=factor, axis=axis)
    return jax.linear_transpose(stretch, jax.ShapeDtypeStruct(sizes, wide.dtype))(wide)[0].astype(gradient.dtype)


def _interpolation_matrices(sizes: jax.Array, new_sizes: jax.Array, size: int, new_size: int, dtype) -> jax.Array:
    """Returns the [B, new_size, size] matrices from the first `sizes` elements to the first `new_sizes`."""
    sizes, new_sizes = sizes[:, None], new_sizes[:, None]
    span = jnp.maximum(new_sizes - 1, 1)
    position = jnp.arange(new_size, dtype=jnp.int32) * (sizes - 1)  # In units of 1 / span: integers are exact.
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
