"""DPT decoder (Ranftl et al., ICCV 2021) as UniMatch V2 builds it. Names follow its state dicts.

It reads four feature maps of a vision transformer, all of the patch grid [h, w], brings them to 4, 2, 1 and 1/2 times
that grid and fuses them from coarse to fine; there is no batch norm. The published head resizes before the 1x1
convolution `out_conv` of a fusion block; here the convolution comes first, on a quarter of the pixels. The two commute,
since the weights of an interpolation add to 1.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.checks import ConfigError
from dssn_jax.models import layers
from dssn_jax.models.extent import Extent, scaled, strided, zero_outside
from dssn_jax.models.resize import resize


class Size(NamedTuple):
    """Channels of the decoder."""

    features: int  # Channels of the fused maps.
    channels: tuple[int, int, int, int]  # Channels of the four maps before they are fused.


# Largest width of the encoder -> size of the decoder: that of the tests' encoders, Small, Base and Large.
_SIZES = {
    64: Size(16, (12, 24, 48, 96)),
    384: Size(64, (48, 96, 192, 384)),
    768: Size(128, (96, 192, 384, 768)),
    1024: Size(256, (256, 512, 1024, 1024)),
}
_LARGEST = Size(384, (1536, 1536, 1536, 1536))  # Giant.


def size_for(width: int) -> Size:
    """Returns the size of the decoder for an encoder of `width` channels."""
    return next((size for most, size in _SIZES.items() if width <= most), _LARGEST)


def from_config(model, encoder: nn.Module, num_classes: int, **types) -> "DPT":
    """Returns the decoder for the features of `encoder`; `types` are dtype and param_dtype.

    Raises ConfigError if these are not four maps of equal stride.
    """
    strides = encoder.strides
    if len(strides) != 4 or len(set(strides)) > 1:
        raise ConfigError(
            f"config.model.decoder is 'dpt', which takes four feature maps of equal stride from a vision transformer; "
            f"{model.encoder} has maps of stride {', '.join(map(str, strides))}"
        )
    return DPT(num_classes, strides[0], size_for(encoder.width), remat=model.remat, **types)


class DPT(nn.Module):
    """The decoder; its parameters are in `head`, as in UniMatch V2's state dicts."""

    num_classes: int
    patch: int  # Stride of the feature maps.
    size: Size
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def logits_extent(self, extent: Extent | None) -> Extent | None:
        """Returns the extent of the logits for images of `extent`: 8 times their patch grid."""
        return scaled(strided(extent, self.patch), 8)

    @nn.compact
    def __call__(self, features: tuple[jax.Array, ...], train: bool, extent: Extent | None = None) -> jax.Array:
        """Maps four feature maps [B, h, w, D], the deepest last, to logits [B, 8h, 8w, K] in `dtype`."""
        del train
        head = Head(self.num_classes, self.size, self.dtype, self.param_dtype, self.remat, name="head")
        return head(features, strided(extent, self.patch))


class Head(nn.Module):
    """Projects the four maps and brings them to the resolutions of a pyramid."""

    num_classes: int
    size: Size
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, features: tuple[jax.Array, ...], extent: Extent | None) -> jax.Array:
        """Maps four maps [B, h, w, D], with `extent` in units of their pixels, to logits [B, 8h, 8w, K]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps = [
            biased_conv(x.shape[-1], channels, name=f"projects_{level}", **types)(x)
            for level, (x, channels) in enumerate(zip(features, self.size.channels, strict=True))
        ]
        maps[0] = Enlarge(4, name="resize_layers_0", **types)(maps[0])
        maps[1] = Enlarge(2, name="resize_layers_1", **types)(maps[1])
        channels = maps[3].shape[-1]
        shrink = biased_conv(channels, channels, 3, stride=2, name="resize_layers_3", **types)
        maps[3] = shrink(zero_outside(maps[3], extent))
        extents = (scaled(extent, 4), scaled(extent, 2), extent, strided(extent, 2))
        scratch = Scratch(self.num_classes, self.size.features, remat=self.remat, name="scratch", **types)
        return scratch(tuple(maps), extents)


class Scratch(nn.Module):
    """Fuses a pyramid of maps, the finest first, and classifies. The name is that of the original's module."""

    num_classes: int
    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, maps: tuple[jax.Array, ...], extents: tuple[Extent | None, ...]) -> jax.Array:
        """Maps four maps [B, h_i, w_i, C_i] to logits [B, 2h_0, 2w_0, K]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        fusion = functools.partial(nn.remat(Fusion) if self.remat else Fusion, self.features, **types)
        classify = nn.remat(Scratch._classify) if self.remat else Scratch._classify
        path = coarser = None
        for level, extent in reversed(list(enumerate(extents))):
            conv = layers.conv(self.features, 3, name=f"layer{level + 1}_rn", **types)
            skip = conv(zero_outside(maps[level], extent))
            path = fusion(name=f"refinenet{level + 1}")(path, skip, coarser, extent)
            coarser = extent
        return classify(self, path, coarser)

    def _classify(self, x: jax.Array, extent: Extent | None) -> jax.Array:
        """Doubles the resolution of `x` [B, h, w, F] and classifies: [B, 2h, 2w, K]."""
        conv = functools.partial(biased_conv, self.features, dtype=self.dtype, param_dtype=self.param_dtype)
        finest = scaled(extent, 2)
        x = resize(x, 2 * x.shape[1], 2 * x.shape[2], extent, finest)
        x = nn.relu(conv(self.features, 3, name="output_conv_0")(zero_outside(x, finest)))
        return conv(self.num_classes, name="output_conv_2")(x)


class Fusion(nn.Module):
    """Adds a refined map to the coarser path, refines the sum, and projects it."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, path: jax.Array | None, skip: jax.Array, coarser: Extent | None, extent: Extent | None
    ) -> jax.Array:
        """Maps `path` [B, h', w', F] of extent `coarser` and `skip` [B, h, w, F] to [B, h, w, F].

        Without a path, at the coarsest level, `skip` takes its place and the original's first unit has no use.
        """
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if path is None:
            UnusedUnit(self.features, self.param_dtype, name="resConfUnit1")()
            x = skip
        else:
            x = resize(path, *skip.shape[1:3], coarser, extent)
            x = x + Unit(self.features, name="resConfUnit1", **types)(skip, extent)
        x = Unit(self.features, name="resConfUnit2", **types)(x, extent)
        return biased_conv(self.features, self.features, name="out_conv", **types)(x)


class Unit(nn.Module):
    """Residual unit of two 3x3 convolutions, each after a ReLU: [B, h, w, F] -> [B, h, w, F]."""

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, extent: Extent | None) -> jax.Array:
        conv = functools.partial(biased_conv, self.features, self.features, 3)
        conv = functools.partial(conv, dtype=self.dtype, param_dtype=self.param_dtype)
        y = conv(name="conv1")(zero_outside(nn.relu(x), extent))
        return x + conv(name="conv2")(zero_outside(nn.relu(y), extent))


class UnusedUnit(nn.Module):
    """Holds the weights of a `Unit` that the network does not use, so that whole checkpoints go back complete."""

    features: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> None:
        for name in ("conv1", "conv2"):
            UnusedConv(self.features, self.param_dtype, name=name)()


class UnusedConv(nn.Module):
    """Weights of a 3x3 convolution in the collection `unused`: no gradient, no optimizer."""

    features: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> None:
        if not self.is_initializing():
            return
        bias = layers.bias_init(9 * self.features)
        for name, init, shape in (
            ("kernel", layers.default_kernel_init, (3, 3, self.features, self.features)),
            ("bias", bias, (self.features,)),
        ):
            self.variable("unused", name, lambda: init(self.make_rng("params"), shape, self.param_dtype))  # noqa: B023


class Enlarge(nn.Module):
    """Transposed convolution whose kernel side is its stride, as `torch.nn.ConvTranspose2d(C, C, n, n)`.

    Its windows do not overlap, so it is a matrix product: y[n i + a, n j + b] = W[a, b] x[i, j] + bias. The kernel
    [n, n, outputs, inputs] has the layout of `flax.linen.ConvTranspose(transpose_kernel=True)`.
    """

    factor: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, h, w, C] to [B, n h, n w, C]."""
        batch, height, width, channels = x.shape
        n, fan_in = self.factor, self.factor**2 * channels
        kernel = self.param("kernel", layers.default_kernel_init, (n, n, channels, channels), self.param_dtype)
        bias = self.param("bias", layers.bias_init(fan_in), (channels,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.einsum("bhwc,mnoc->bhmwno", x, kernel)
        return y.reshape(batch, n * height, n * width, channels) + bias


def biased_conv(inputs: int, features: int, kernel: int = 1, stride: int = 1, **kwargs) -> nn.Conv:
    """Returns `layers.conv` with a bias, both with PyTorch's default initialization for `inputs` channels."""
    bias_init = layers.bias_init(kernel**2 * inputs)
    return layers.conv(features, kernel, stride, use_bias=True, bias_init=bias_init, **kwargs)
