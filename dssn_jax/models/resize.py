"""Bilinear resizing with aligned corners, as two matrix products. All arrays are NHWC."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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
