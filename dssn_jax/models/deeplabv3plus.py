"""DeepLabV3+ decoder (Chen et al., ECCV 2018) as the original of DSSN builds it. Names follow its state dicts."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.checks import ConfigError
from dssn_jax.models import layers
from dssn_jax.models.batch_norm import BatchNorm, Train, normalized
from dssn_jax.models.extent import Extent, mean_inside, strided, zero_outside
from dssn_jax.models.resize import resize

LOW_LEVEL_CHANNELS = 48
LOW_LEVEL_STRIDE = 4


def from_config(model, encoder: nn.Module, num_classes: int, **types) -> "DeepLabV3Plus":
    """Returns the decoder of `config.model` for the features of `encoder`; `types` are dtype and param_dtype.

    Raises ConfigError if the first of these is not of stride 4 (that of the low-level branch).
    """
    if encoder.strides[0] != LOW_LEVEL_STRIDE:
        raise ConfigError(
            f"config.model.decoder is 'deeplabv3plus', which refines its result with a feature map of stride "
            f"{LOW_LEVEL_STRIDE}; {model.encoder} has maps of stride {', '.join(map(str, encoder.strides))}"
        )
    dilations = tuple(model.aspp_dilations)
    return DeepLabV3Plus(num_classes, encoder.strides, dilations, model.decoder_channels, **types)


class DeepLabV3Plus(nn.Module):
    """ASPP (`head`) on the last feature map, fused with the first one (`reduce`, `fuse`), and a `classifier`."""

    num_classes: int
    strides: tuple[int, ...]  # Strides of the feature maps.
    aspp_dilations: tuple[int, ...] = (6, 12, 18)
    channels: int = 256  # Channels of ASPP and of the fused features.
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def logits_extent(self, extent: Extent | None) -> Extent | None:
        """Returns the extent of the logits for images of `extent`."""
        return strided(extent, self.strides[0])

    @nn.compact
    def __call__(self, features: tuple[jax.Array, ...], train: Train, extent: Extent | None = None) -> jax.Array:
        """Maps feature maps [B, h_i, w_i, C_i], the finest first, to logits [B, h_0, w_0, K] in `dtype`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(layers.conv, **types)
        norm = functools.partial(BatchNorm, **types)
        low, high = strided(extent, self.strides[0]), strided(extent, self.strides[-1])
        c1, c4 = features[0], features[-1]
        c4 = ASPP(self.channels, self.aspp_dilations, name="head", **types)(c4, train, high)
        c4 = resize(c4, *c1.shape[1:3], high, low)
        c1 = normalized(conv(LOW_LEVEL_CHANNELS, name="reduce_0"), norm(name="reduce_1"), c1, train, nn.relu)
        x = zero_outside(jnp.concatenate([c1, c4], -1), low)
        x = normalized(conv(self.channels, 3, name="fuse_0"), norm(name="fuse_1"), x, train, nn.relu)
        x = zero_outside(x, low)
        x = normalized(conv(self.channels, 3, name="fuse_3"), norm(name="fuse_4"), x, train, nn.relu)
        bias_init = layers.bias_init(self.channels)
        return conv(self.num_classes, use_bias=True, bias_init=bias_init, name="classifier")(x)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: [B, h, w, C] -> [B, h, w, channels]."""

    channels: int
    dilations: tuple[int, ...]
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: Train, extent: Extent | None = None) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(layers.conv, self.channels, **types)
        norm = functools.partial(BatchNorm, **types)
        x = zero_outside(x, extent)
        branches = [normalized(conv(name="b0_0"), norm(name="b0_1"), x, train, nn.relu)]
        for i, dilation in enumerate(self.dilations, start=1):
            branch = conv(kernel=3, dilation=dilation, name=f"b{i}_0")
            branches.append(normalized(branch, norm(name=f"b{i}_1"), x, train, nn.relu))
        pooled = ImagePooling(self.channels, name=f"b{len(self.dilations) + 1}", **types)(x, train, extent)
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        x = jnp.concatenate(branches, -1)
        return normalized(conv(name="project_0"), norm(name="project_1"), x, train, nn.relu)


class ImagePooling(nn.Module):
    """Global average pooling, 1x1 convolution, batch norm and ReLU: [B, h, w, C] -> [B, 1, 1, channels]."""

    channels: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: Train, extent: Extent | None = None) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = mean_inside(x, extent).astype(self.dtype)
        conv, norm = layers.conv(self.channels, name="gap_1", **types), BatchNorm(name="gap_2", **types)
        return normalized(conv, norm, x, train, nn.relu)
