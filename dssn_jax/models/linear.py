"""Linear decoder: batch norm and a 1x1 convolution on the last feature map.

With it DINOv2 (Oquab et al., TMLR 2024) and DINOv3 (Siméoni et al., arXiv 2508.10104) measure frozen encoders; names
are those of DINOv2's. Two things differ: these drop channels in training, at rate 0.1, and resize logits without
aligned corners; here nothing is dropped, and logits are resized as those of every network.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dssn_jax.models import layers
from dssn_jax.models.batch_norm import BatchNorm, Train
from dssn_jax.models.extent import Extent, strided


def from_config(model, encoder: nn.Module, num_classes: int, **types) -> "Linear":
    """Returns the decoder for the features of `encoder`, any; `types` are dtype and param_dtype."""
    del model
    return Linear(num_classes, encoder.strides[-1], **types)


class Linear(nn.Module):
    """Batch norm and a linear classifier of each position of the last feature map."""

    num_classes: int
    stride: int  # Stride of the last feature map.
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def logits_extent(self, extent: Extent | None) -> Extent | None:
        """Returns the extent of the logits for images of `extent`."""
        return strided(extent, self.stride)

    @nn.compact
    def __call__(self, features: tuple[jax.Array, ...], train: Train, extent: Extent | None = None) -> jax.Array:
        """Maps feature maps, the last [B, h, w, C], to logits [B, h, w, K] in `dtype`."""
        del extent  # No operation reads a neighbor.
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = BatchNorm(name="bn", **types)(features[-1], train)
        kernel_init = nn.initializers.normal(0.01)
        return layers.conv(self.num_classes, use_bias=True, kernel_init=kernel_init, name="conv_seg", **types)(x)
