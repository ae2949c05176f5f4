"""The valid part of each image in a padded batch, and operations that respect it. All arrays are NHWC."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Extent(NamedTuple):
    """The part of each picture of a padded batch that is picture: its first rows and columns.

    Networks that are given one compute, inside of it, what they compute for each picture alone: they put zeros outside
    before each operation that looks at neighbors, as the zero padding of a convolution at the picture's border.
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


def zero_outside(x: jax.Array, extent: Extent | None) -> jax.Array:
    """Puts zeros into `x` [B, H, W, C] outside of `extent`; None is all of it."""
    return x if extent is None else jnp.where(extent.mask(*x.shape[1:3]), x, jnp.zeros((), x.dtype))


def mean_inside(x: jax.Array, extent: Extent | None) -> jax.Array:
    """Means over the pixels inside `extent`, [B, H, W, C] -> [B, 1, 1, C], in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if extent is None:
        return x.mean((1, 2), keepdims=True, dtype=dtype)
    pixels = jnp.maximum(extent.height * extent.width, 1)[:, None, None, None]
    return zero_outside(x, extent).sum((1, 2), keepdims=True, dtype=dtype) / pixels.astype(dtype)
