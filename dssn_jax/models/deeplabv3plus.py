"""DeepLabV3+ (Chen et al., ECCV 2018) as the original of DSSN builds it. Names follow its state dicts."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dssn_jax import sharding
from dssn_jax.models import layers
from dssn_jax.models.extent import Extent, mean_inside, strided, zero_outside
from dssn_jax.models.resize import resize, upsample

LOW_LEVEL_CHANNELS = 48
LOW_LEVEL_STRIDE = 4  # Of c1.


class DeepLabV3Plus(nn.Module):
    """Segmentation network: `backbone`, ASPP (`head`) and decoder (`reduce`, `fuse`, `classifier`)."""

    backbone: nn.Module  # Returns (c1, c4), see `dssn_jax.models.resnet.ResNet`.
    num_classes: int
    aspp_dilations: tuple[int, ...] = (6, 12, 18)
    channels: int = 256  # Of ASPP and of the decoder.
    feature_dropout: float = 0.5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(layers.conv, **types)
        norm = functools.partial(layers.BatchNorm, **types)
        self.head = ASPP(self.channels, self.aspp_dilations, **types)
        self.reduce_0 = conv(LOW_LEVEL_CHANNELS)
        self.reduce_1 = norm()
        self.fuse_0 = conv(self.channels, 3)
        self.fuse_1 = norm()
        self.fuse_3 = conv(self.channels, 3)
        self.fuse_4 = norm()
        self.classifier = conv(self.num_classes, use_bias=True, bias_init=layers.bias_init(self.channels))

    def __call__(self, x: jax.Array, train: bool = False, extent: Extent | None = None) -> jax.Array:
        """Images [B, H, W, 3] (normalized) -> logits [B, H, W, K], in at least float32.

        With `extent`, each image is the part of `x` inside of it: its logits there are those of the image alone (but
        for batch statistics in training), and those outside mean nothing.
        """
        low = strided(extent, LOW_LEVEL_STRIDE)
        return upsample(self.coarse(x, train, extent), *x.shape[1:3], low, extent)

    def coarse(self, x: jax.Array, train: bool = False, extent: Extent | None = None) -> jax.Array:
        """Images [B, H, W, 3] -> logits [B, H/4, W/4, K] in `dtype`, to be brought to size by `upsample`."""
        return self._decode(*self.features(x, train, extent), train, extent)

    def coarse_with_feature_views(
        self, parts: tuple[jax.Array, ...], views: int, perturb_all: bool, train: bool = True
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Decodes batches of images and `views` channel-dropout views of the features of the last of them.

        All are decoded together and share the decoder's batch statistics. With `perturb_all` the other batches have
        such views too, as in the original: nothing reads their logits, but they take part in the statistics.
        Draws from the rng `dropout` if `views` and `feature_dropout` are not 0.

        Returns the coarse logits of each batch of `parts`, and those of each view.
        """
        sizes = [len(part) for part in parts]
        features = self.features(sharding.interleave(*parts), train)
        perturbed = features if perturb_all else [sharding.separate(each, sizes)[-1] for each in features]
        batches = [features, *(self._perturb(perturbed) for _ in range(views))]
        logits = self._decode(*(sharding.interleave(*each) for each in zip(*batches, strict=True)), train)
        clean, *copies = sharding.separate(logits, [len(c1) for c1, _ in batches])
        if perturb_all:
            copies = [sharding.separate(copy, sizes)[-1] for copy in copies]
        return tuple(sharding.separate(clean, sizes)), tuple(copies)

    def features(self, x: jax.Array, train: bool = False, extent: Extent | None = None) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, 3] -> the backbone's c1 [B, H/4, W/4, C1] and c4 [B, H/16, W/16, C4], sizes rounded up."""
        return self.backbone(x.astype(self.dtype), train, extent)

    def _perturb(self, features) -> tuple[jax.Array, ...]:
        """Drops channels of c1 and of c4, [B, h, w, C] each."""
        if self.feature_dropout == 0:
            return tuple(features)
        return tuple(layers.channel_dropout(each, self.feature_dropout, self.make_rng("dropout")) for each in features)

    def _decode(self, c1: jax.Array, c4: jax.Array, train: bool, extent: Extent | None = None) -> jax.Array:
        low, high = (strided(extent, stride) for stride in (LOW_LEVEL_STRIDE, self.backbone.output_stride))
        c4 = resize(self.head(c4, train, high), *c1.shape[1:3], high, low)
        c1 = nn.relu(self.reduce_1(self.reduce_0(c1), train))
        x = zero_outside(jnp.concatenate([c1, c4], -1), low)
        x = zero_outside(nn.relu(self.fuse_1(self.fuse_0(x), train)), low)
        x = nn.relu(self.fuse_4(self.fuse_3(x), train))
        return self.classifier(x)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: `[B, h, w, C] -> [B, h, w, channels]`."""

    channels: int
    dilations: tuple[int, ...]
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, extent: Extent | None = None) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(layers.conv, self.channels, **types)
        norm = functools.partial(layers.BatchNorm, **types)
        x = zero_outside(x, extent)
        branches = [nn.relu(norm(name="b0_1")(conv(name="b0_0")(x), train))]
        for i, dilation in enumerate(self.dilations, start=1):
            y = conv(kernel=3, dilation=dilation, name=f"b{i}_0")(x)
            branches.append(nn.relu(norm(name=f"b{i}_1")(y, train)))
        pooled = ImagePooling(self.channels, name=f"b{len(self.dilations) + 1}", **types)(x, train, extent)
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        x = conv(name="project_0")(jnp.concatenate(branches, -1))
        return nn.relu(norm(name="project_1")(x, train))


class ImagePooling(nn.Module):
    """Global average pooling, 1x1 convolution, batch norm, ReLU: `[B, h, w, C] -> [B, 1, 1, channels]`."""

    channels: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, extent: Extent | None = None) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = mean_inside(x, extent).astype(self.dtype)
        x = layers.conv(self.channels, name="gap_1", **types)(x)
        return nn.relu(layers.BatchNorm(name="gap_2", **types)(x, train))
