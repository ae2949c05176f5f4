"""The valid part of each image in a padded batch, and operations that respect it. All arrays are NHWC."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dssn_jax.models import platforms


class Extent(NamedTuple):
    """Valid (unpadded) height and width of each image in a padded batch; the rest is padding below and to the right.

    A network that is given an extent computes, inside it, what it computes for each image alone: it writes zeros
    outside before each operation that reads neighbors, like the zero padding of a convolution at the image border.
    """

    height: jax.Array  # int32 [B]
    width: jax.Array  # int32 [B]

    def strided(self, stride: int) -> "Extent":
        """Returns the extent after a convolution or pooling of `stride`: sizes divided by it, rounded up."""
        return Extent(-(-self.height // stride), -(-self.width // stride))

    def scaled(self, factor: int) -> "Extent":
        """Returns the extent at `factor` times the resolution."""
        return Extent(factor * self.height, factor * self.width)

    def mask(self, height: int, width: int) -> jax.Array:
        """Returns bool [B, height, width, 1], True inside."""
        rows = jnp.arange(height) < self.height[:, None]
        columns = jnp.arange(width) < self.width[:, None]
        return (rows[:, :, None] & columns[:, None, :])[..., None]


def strided(extent: Extent | None, stride: int) -> Extent | None:
    """Returns `extent.strided(stride)`; None, which stands for whole images, stays None."""
    return None if extent is None else extent.strided(stride)


def scaled(extent: Extent | None, factor: int) -> Extent | None:
    """Returns `extent.scaled(factor)`; None, which stands for whole images, stays None."""
    return None if extent is None else extent.scaled(factor)


def zero_outside(x: jax.Array, extent: Extent | None) -> jax.Array:
    """Returns `x` [B, H, W, C] with zeros outside `extent`; unchanged if it is None."""
    return x if extent is None else jnp.where(extent.mask(*x.shape[1:3]), x, jnp.zeros((), x.dtype))


def mean_inside(x: jax.Array, extent: Extent | None) -> jax.Array:
    """Returns the mean over the pixels inside `extent`: [B, H, W, C] -> [B, 1, 1, C], in at least float32."""
    dtype = platforms.wide(x.dtype)
    if extent is None:
        return x.mean((1, 2), keepdims=True, dtype=dtype)
    pixels = jnp.maximum(extent.height * extent.width, 1)[:, None, None, None]
    return zero_outside(x, extent).sum((1, 2), keepdims=True, dtype=dtype) / pixels.astype(dtype)
