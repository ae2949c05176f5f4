"""A segmentation network: an encoder and a decoder behind one protocol."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dssn_jax.models import platforms
from dssn_jax.models.batch_norm import Train
from dssn_jax.models.extent import Extent
from dssn_jax.models.resize import upsample


class Network(nn.Module):
    """An encoder followed by a decoder, with logits at the size of the images.

    The encoder maps (images [B, H, W, 3], train, extent) to a tuple of feature maps. It has the attributes `strides`
    (one per feature map), `size_multiple` (of height and width), `supports_padding` (whether it respects `extent`) and
    `input_size` (the smallest square image it takes). The decoder maps (features, train, extent) to logits, and its
    method `logits_extent` maps the extent of images to that of their logits. Both get the extent of the images.
    `train` is a `batch_norm.Train`: networks without batch norm treat `Batches` as True.
    """

    encoder: nn.Module
    decoder: nn.Module
    num_classes: int
    dtype: Any = jnp.float32

    def __call__(self, images: jax.Array, train: Train = False, extent: Extent | None = None) -> jax.Array:
        """Maps normalized images [B, H, W, 3] to logits [B, H, W, K] in at least float32.

        With `extent`, each image is the part of `images` inside it. Its logits there are those of the image alone
        (except for batch statistics in training); those outside are undefined.
        """
        low_res = self.low_res_logits(images, train, extent)
        return upsample(low_res, *images.shape[1:3], self.decoder.logits_extent(extent), extent)

    def low_res_logits(self, images: jax.Array, train: Train = False, extent: Extent | None = None) -> jax.Array:
        """Maps images [B, H, W, 3] to logits [B, h, w, K] in `dtype`, at the decoder's resolution."""
        return self.decode(self.encode(images, train, extent), train, extent)

    def encode(self, images: jax.Array, train: Train = False, extent: Extent | None = None) -> tuple[jax.Array, ...]:
        """Maps images [B, H, W, 3] to the encoder's feature maps, each [B, ceil(H / stride), ceil(W / stride), C]."""
        return self.encoder(images.astype(self.dtype), train, extent)

    def decode(self, features: tuple[jax.Array, ...], train: Train = False, extent: Extent | None = None) -> jax.Array:
        """Maps feature maps of `encode` to logits [B, h, w, K] in `dtype`, at the decoder's resolution."""
        return self.decoder(features, train, extent)

    @property
    def image_dtype(self):
        """The dtype of normalized images and of full-size logits: `dtype`, but at least float32."""
        return platforms.wide(self.dtype)

    @property
    def draws(self) -> bool:
        """Whether the encoder draws random numbers in training (its random stream "rope")."""
        return getattr(self.encoder, "rope_rescale", 1) != 1

    @property
    def size_multiple(self) -> int:
        """Images must have heights and widths that are multiples of this."""
        return self.encoder.size_multiple

    @property
    def supports_padding(self) -> bool:
        """Whether padded batches, described by an extent, give the logits of each image alone."""
        return self.encoder.supports_padding

    @property
    def input_size(self) -> int:
        """Side of the smallest image, in pixels, from which variables are initialized; they do not depend on it."""
        return self.encoder.input_size
