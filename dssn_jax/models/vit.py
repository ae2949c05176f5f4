"""Vision transformers of DINOv2 and DINOv3. Names follow Meta's state dicts.

Oquab et al., "DINOv2", TMLR 2024; Darcet et al., "Vision Transformers Need Registers", ICLR 2024; Siméoni et al.,
"DINOv3", arXiv 2508.10104. The two differ in the patch, the prefix tokens, the position embedding and the epsilon of
layer norm; larger ones have a gated feed-forward network.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs.checks import ConfigError
from dssn_jax.models import platforms
from dssn_jax.models.attention import attend
from dssn_jax.models.extent import Extent, strided, zero_outside

_FOUR_OF_12 = (2, 5, 8, 11)
_SMALL = {"width": 384, "depth": 12, "heads": 6, "hidden": 1536, "levels": _FOUR_OF_12}
_BASE = {"width": 768, "depth": 12, "heads": 12, "hidden": 3072, "levels": _FOUR_OF_12}
_LARGE = {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096, "levels": (4, 11, 17, 23)}
_FOUR_OF_40 = (9, 19, 29, 39)
_W64 = {"width": 64, "depth": 4, "heads": 2, "hidden": 128, "levels": (0, 1, 2, 3)}  # For tests.
_DINOV2 = {
    "small": _SMALL,
    "base": _BASE,
    "large": _LARGE,
    "giant": {
        "width": 1536, "depth": 40, "heads": 24, "hidden": 4096, "levels": _FOUR_OF_40, "ffn": "swiglu_fused",
    },
}  # fmt: skip
_DINOV3 = {
    "w64": _W64,
    "small": _SMALL,
    "small_plus": _SMALL | {"ffn": "swiglu"},
    "base": _BASE,
    "large": _LARGE,
    "huge_plus": {
        "width": 1280, "depth": 32, "heads": 20, "hidden": 5120, "levels": (7, 15, 23, 31), "ffn": "swiglu",
    },
    "7b": {
        "width": 4096, "depth": 40, "heads": 32, "hidden": 8192, "levels": _FOUR_OF_40, "ffn": "swiglu",
        "qkv_bias": "none",
    },
}  # fmt: skip
_WITH_REGISTERS = {"registers": 4, "antialias": True, "offset": 0.0}
_WITH_ROPE = {"patch": 16, "position": "rope", "registers": 4, "epsilon": 1e-5, "qkv_bias": "masked"}
# Name of an encoder -> fields of `ViT`.
SIZES = (
    {"dinov2_w64": _W64}
    | {f"dinov2_{size}": fields for size, fields in _DINOV2.items()}
    | {f"dinov2_{size}_reg": fields | _WITH_REGISTERS for size, fields in _DINOV2.items()}
    | {f"dinov3_{size}": _WITH_ROPE | fields for size, fields in _DINOV3.items()}
)

# Weights come from files; random ones, for tests, are drawn as the originals draw most of theirs.
_normal = nn.initializers.truncated_normal(0.02)


def from_config(model, **options) -> "ViT":
    """Returns the encoder of `config.model`; `options` are further fields of `ViT`.

    Raises ConfigError for keys that do not fit it or each other.
    """
    if model.rope_rescale != 1 and options.get("position") != "rope":
        raise ConfigError(
            f"config.model.rope_rescale is {model.rope_rescale:g}; {model.encoder} has no rotary position embedding, "
            "expected 1"
        )
    if model.attention == "cudnn" and model.dtype != "bfloat16":
        raise ConfigError(
            f"config.model.attention is 'cudnn', which needs config.model.dtype=bfloat16, not {model.dtype}"
        )
    return ViT(attention=model.attention, rope_rescale=model.rope_rescale, remat=model.remat, **options)


class ViT(nn.Module):
    """Encoder with four feature maps of stride `patch`: patch tokens after the blocks `levels`, each normalized.

    Tokens are the class token, the registers and the patches, row by row. All of them attend to each other.
    """

    width: int
    depth: int
    heads: int
    hidden: int  # Width of the feed-forward network.
    levels: tuple[int, int, int, int]  # Blocks, counted from 0, whose outputs are the feature maps.
    ffn: str = "mlp"  # A form of `FeedForward`.
    patch: int = 14
    registers: int = 0
    position: str = "learned"  # learned: an embedding of a square of patches, resized to the image's; rope: rotary.
    side: int = 37  # Patches along a side of the learned embedding.
    offset: float = 0.1  # Added to the sizes that it is resized to.
    antialias: bool = False
    rope_rescale: float = 1.0
    qkv_bias: str = "full"  # full; masked: keys have none in effect; none.
    epsilon: float = 1e-6
    attention: str = "auto"  # See `attention.attend`.
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    supports_padding = True

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return (self.patch,) * 4

    @property
    def size_multiple(self) -> int:
        return self.patch

    @property
    def input_size(self) -> int:
        return self.patch

    def __call__(self, x: jax.Array, train: bool, extent: Extent | None = None) -> tuple[jax.Array, ...]:
        """Maps images [B, H, W, 3] to four maps [B, H / patch, W / patch, width], for H and W multiples of the patch.

        In training with `rope_rescale` other than 1, the random stream "rope" is needed. Raises ValueError for other
        sizes.
        """
        shape = tuple(length // self.patch for length in x.shape[1:3])
        levels = self.tokens(x, train, extent)
        return tuple(tokens[:, 1 + self.registers :].reshape(x.shape[0], *shape, self.width) for tokens in levels)

    @nn.compact
    def tokens(self, x: jax.Array, train: bool, extent: Extent | None = None) -> list[jax.Array]:
        """Returns all tokens [B, T, width] after the blocks `levels`, normalized; else as `__call__`."""
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(f"images of {x.shape[1]}x{x.shape[2]} pixels; expected multiples of {self.patch}")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        patches = PatchEmbed(self.width, self.patch, **types, name="patch_embed")(zero_outside(x, extent))
        shape = patches.shape[1:3]
        tokens = self._first_tokens(patches, extent)
        valid = self._valid(shape, extent)
        block = functools.partial(
            _RematBlock if self.remat else Block,
            heads=self.heads, hidden=self.hidden, ffn=self.ffn, qkv_bias=self.qkv_bias, epsilon=self.epsilon,
            attention=self.attention, **types,
        )  # fmt: skip
        norm = nn.LayerNorm(self.epsilon, use_fast_variance=False, **types, name="norm")
        rotation, levels = None, []
        for i in range(self.depth):
            if self.position == "rope" and (rotation is None or self._rescales(train)):
                rotation = self._rotation(shape, extent, train)
            tokens = block(name=f"blocks_{i}")(tokens, rotation, valid)
            if i in self.levels:
                levels.append(norm(tokens))
        return levels

    def _first_tokens(self, x: jax.Array, extent: Extent | None) -> jax.Array:
        """Returns the tokens [B, T, width] before the first block, from embedded patches [B, h, w, width]."""

        def param(name: str, count: int) -> jax.Array:
            return self.param(name, _normal, (1, count, self.width), self.param_dtype).astype(self.dtype)

        first = param("cls_token", 1)
        if self.is_initializing():  # Only pretraining uses the mask token; files of weights have it.
            self.variable("unused", "mask_token", jnp.zeros, (1, self.width), self.param_dtype)
        if self.position == "learned":
            of_first, of_patches = self._position_embedding(x.shape[1:3], extent)
            first, x = first + of_first, x + of_patches
        prefix = [first]
        if self.registers:
            name = "storage_tokens" if self.position == "rope" else "register_tokens"
            prefix.append(param(name, self.registers))
        patches = x.reshape(x.shape[0], -1, self.width)
        return jnp.concatenate([*(jnp.broadcast_to(t, (x.shape[0], *t.shape[1:])) for t in prefix), patches], axis=1)

    def _position_embedding(self, shape: tuple[int, int], extent: Extent | None) -> tuple[jax.Array, jax.Array]:
        """Returns the embeddings of the class token [1, 1, width] and of patches [1 or B, h, w, width], in `dtype`.

        A grid of `side` x `side` patches takes the embedding as it is; others resize it in at least float32.
        """
        embedding = self.param("pos_embed", _normal, (1, self.side**2 + 1, self.width), self.param_dtype)
        first = embedding[:, :1].astype(self.dtype)
        square = embedding[0, 1:].reshape(self.side, self.side, self.width)
        if extent is None and shape == (self.side, self.side):
            return first, square[None].astype(self.dtype)
        square = square.astype(platforms.wide(self.dtype))
        grid = _grid(shape, strided(extent, self.patch))
        return first, resize_positions(square, grid, shape, self.offset, self.antialias).astype(self.dtype)

    def _valid(self, shape: tuple[int, int], extent: Extent | None) -> jax.Array | None:
        """Returns bool [B, T], True for the prefix and for patches inside `extent`; None without one."""
        if extent is None:
            return None
        inside = extent.strided(self.patch).mask(*shape)
        return jnp.pad(inside.reshape(len(inside), -1), ((0, 0), (1 + self.registers, 0)), constant_values=True)

    def _rescales(self, train: bool) -> bool:
        return train and self.rope_rescale != 1

    def _rotation(self, shape: tuple[int, int], extent: Extent | None, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns cosines and sines [1 or B, T, head dimension] of the rotary embedding; the prefix is not rotated."""
        dtype = platforms.wide(self.dtype)
        factor = jnp.ones((), dtype)
        if self._rescales(train):
            bound = math.log(self.rope_rescale)
            factor = jnp.exp(jax.random.uniform(self.make_rng("rope"), (), dtype, -bound, bound))
        angles = rope_angles(_grid(shape, strided(extent, self.patch)), shape, self.width // self.heads, factor)
        angles = jnp.pad(angles, ((0, 0), (1 + self.registers, 0), (0, 0)))  # An angle of 0 changes nothing.
        return jnp.cos(angles), jnp.sin(angles)


def _grid(shape: tuple[int, int], grid: Extent | None) -> Extent:
    """Returns the patches of each image along its sides; without an extent those of all images, [1]."""
    return Extent(*(jnp.full(1, size, jnp.int32) for size in shape)) if grid is None else grid


def resize_positions(
    square: jax.Array, grid: Extent, shape: tuple[int, int], offset: float, antialias: bool
) -> jax.Array:
    """Resizes the position embeddings [side, side, C] to `grid`, the patches of each image: [B, h, w, C].

    An image of side x side patches takes them as they are. Others take them resized along both sides, in the dtype of
    `square`, as `bicubic_matrices` says. What lies outside `grid` is undefined, but finite.
    """
    side, dtype = len(square), square.dtype
    whole = ((grid.height == side) & (grid.width == side))[:, None, None]
    rows, columns = (
        jnp.where(
            whole,
            jnp.eye(length, side, dtype=dtype),
            bicubic_matrices(sizes.astype(dtype), length, side, offset, antialias),
        )
        for sizes, length in zip(grid, shape, strict=True)
    )
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return product("bwj,bhjc->bhwc", columns, product("bhi,ijc->bhjc", rows, square))


def bicubic_matrices(sizes: jax.Array, length: int, side: int, offset: float, antialias: bool) -> jax.Array:
    """Returns matrices [B, length, side] that resize `side` elements to the first `sizes` [B] of `length`.

    As `torch.nn.functional.interpolate(mode="bicubic")`, in the dtype of `sizes`. Without `antialias`, the kernel has
    a = -0.75 and the scale is (size + offset) / side, as with `scale_factor`; with it, a = -0.5 and the kernel is as
    wide as the elements of a smaller result.
    """
    stride = side / (jnp.maximum(sizes, 1)[:, None, None] + offset)
    # In units of elements; rows beyond the size are undefined, but finite.
    center = jnp.minimum((jnp.arange(length)[:, None] + 0.5) * stride, side)
    if antialias:
        weights = _cubic((jnp.arange(side) + 0.5 - center) / jnp.maximum(stride, 1), -0.5)
        return weights / weights.sum(-1, keepdims=True)
    taps = jnp.floor(center - 0.5) + jnp.arange(-1, 3)
    weights = _cubic(taps + 0.5 - center, -0.75)
    taken = jnp.clip(taps, 0, side - 1)[..., None] == jnp.arange(side)  # Beyond the edge, the element at the edge.
    return jnp.where(taken, weights[..., None], 0).sum(-2)


def _cubic(x: jax.Array, a: float) -> jax.Array:
    """Returns the cubic convolution kernel; Keys, IEEE TASSP 1981, Eq. 15 for a = -0.5."""
    x = jnp.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((x - 5) * x + 8) * x * a - 4 * a
    return jnp.where(x <= 1, inner, jnp.where(x < 2, outer, 0))


def rope_angles(grid: Extent, shape: tuple[int, int], dim: int, factor: jax.Array) -> jax.Array:
    """Returns the angles [B, h * w, dim] of DINOv3's rotary embedding, in radians and in the dtype of `factor`.

    Centers of patches, from -1 to 1 along each side of an image, times `factor`; periods from 1 to less than 100. The
    first quarter of the angles are those of the row, the second those of the column; then both are repeated.
    """

    def along(sizes: jax.Array, length: int) -> jax.Array:
        centers = (jnp.arange(length, dtype=dtype) + 0.5) / jnp.maximum(sizes, 1).astype(dtype)[:, None]
        return (2 * math.pi * factor * (2 * centers - 1))[..., None] / periods

    dtype = factor.dtype
    periods = 100 ** (jnp.arange(dim // 4, dtype=dtype) / (dim // 4))
    rows, columns = along(grid.height, shape[0])[:, :, None], along(grid.width, shape[1])[:, None]
    angles = jnp.concatenate(jnp.broadcast_arrays(rows, columns) * 2, axis=-1)
    return angles.reshape(len(angles), -1, dim)


class PatchEmbed(nn.Module):
    """A convolution whose windows are the patches: [B, H, W, 3] to [B, H / patch, W / patch, width]."""

    width: int
    patch: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": _normal}
        window = (self.patch, self.patch)
        return nn.Conv(self.width, window, window, padding="VALID", **types, name="proj")(x)


class Block(nn.Module):
    """Attention and feed-forward network, each after a layer norm and with a scaled residual: [B, T, C] to the same.

    `rotation` are the cosines and sines of a rotary position embedding; `valid` [B, T] tells which tokens are read.
    """

    heads: int
    hidden: int
    ffn: str
    qkv_bias: str
    epsilon: float
    attention: str
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None, valid: jax.Array | None):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(nn.LayerNorm, self.epsilon, use_fast_variance=False, **types)
        attn = Attention(self.heads, self.qkv_bias, self.attention, **types, name="attn")
        x = x + LayerScale(**types, name="ls1")(attn(norm(name="norm1")(x), rotation, valid))
        mlp = FeedForward(self.hidden, self.ffn, **types, name="mlp")
        return x + LayerScale(**types, name="ls2")(mlp(norm(name="norm2")(x)))


_RematBlock = nn.remat(Block)


class Attention(nn.Module):
    """Self-attention of all tokens: [B, T, C] to the same; arguments as of `Block`."""

    heads: int
    qkv_bias: str
    attention: str
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None, valid: jax.Array | None):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        qkv = Projection(3 * x.shape[-1], self.qkv_bias, **types, name="qkv")(x)
        query, key, value = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.heads, -1), 2, 0)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        x = attend(query, key, value, valid, self.attention).reshape(x.shape)
        return nn.Dense(x.shape[-1], kernel_init=_normal, **types, name="proj")(x)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates queries or keys [B, T, heads, d], halves of d paired, in the dtype of `cos`; returns that of `x`."""
    wide = x.astype(cos.dtype)
    first, second = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (wide * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)


class Projection(nn.Module):
    """Queries, keys and values in one matrix product, [B, T, C] to [B, T, features]. bias: as `ViT.qkv_bias`."""

    features: int
    bias: str
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", _normal, (x.shape[-1], self.features), self.param_dtype)
        y = x @ kernel.astype(self.dtype)
        if self.bias == "none":
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
        if self.bias == "masked":
            third = self.features // 3
            bias = jnp.asarray(bias).at[third : 2 * third].set(0)
        return y + bias


class FeedForward(nn.Module):
    """Two linear maps around a GELU, or a gated form (Shazeer, arXiv 2002.05202): [B, T, C] to the same.

    form: mlp; swiglu, with separate maps for gate and value; swiglu_fused, with one for both.
    """

    hidden: int
    form: str
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": _normal}
        dense = functools.partial(nn.Dense, **types)
        if self.form == "mlp":
            y = nn.gelu(dense(self.hidden, name="fc1")(x), approximate=False)
            return dense(x.shape[-1], name="fc2")(y)
        if self.form == "swiglu_fused":
            gate, y = jnp.split(dense(2 * self.hidden, name="w12")(x), 2, axis=-1)
        else:
            gate, y = dense(self.hidden, name="w1")(x), dense(self.hidden, name="w2")(x)
        return dense(x.shape[-1], name="w3")(nn.silu(gate) * y)


class LayerScale(nn.Module):
    """A factor per channel; Touvron et al., ICCV 2021."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("gamma", nn.initializers.ones, x.shape[-1:], self.param_dtype).astype(self.dtype)
