"""Batch normalization with PyTorch's arithmetic, together with the convolution before it and the activation after it.

Feature maps are the largest arrays of a training step, and most of its time is reading and writing them. So every
backward pass here says what it reads: what is cheap to compute again from that is not stored.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dssn_jax.models import platforms

Activation = Callable[[jax.Array], jax.Array]
# Activations that can follow batch norm -> where their results let gradients pass.
_PASSES: dict[Activation, Activation] = {nn.relu: lambda y: y > 0, nn.relu6: lambda y: (y > 0) & (y < 6)}
# A 1x1 convolution to at least this many times as many channels is normalized without reading its outputs ...
_EXPANSION = 4
# ... if each device has at least this many times as many pixels as input channels: products of matrices of the size of
# the kernel come on top.
_PIXELS_PER_CHANNEL = 8
_FURTHER = 8  # Channels: products are fast if numbers of channels are multiples of this.


class Batches(NamedTuple):
    """Batches of one size, joined to an array: on each device, the rows of the first come first.

    Each is normalized by statistics of its own, as if they followed one another.
    """

    count: int = 1
    devices: int = 1  # Over which the array is split.
    # Whether devices store maps in tiles of images x channels, as TPUs do. They would copy a map to move its batches
    # apart, to merge its pixels or to give it a few more channels: sums are over the pixels of an image first, and
    # convolutions to many more channels are not normalized without reading their outputs.
    tiles: bool = False

    def sums(self, x: jax.Array) -> jax.Array:
        """Returns the sums over the images and pixels of each batch, [count, C], for `x` [N, ..., C]."""
        if self.tiles:
            x = x.sum(range(1, x.ndim - 1))
        by_device = self._by_device(x)
        return by_device.sum((0, *range(2, by_device.ndim - 1)))

    def per_image(self, values: jax.Array, images: int) -> jax.Array:
        """Returns the numbers of each batch [count, C] for each of `images` images of a map, [N, 1, 1, C]."""
        rows = images // (self.devices * self.count)
        each = jnp.broadcast_to(values[:, None], (self.devices, self.count, rows, values.shape[-1]))
        return each.reshape(images, 1, 1, -1)

    def pixels(self, x: jax.Array) -> jax.Array:
        """Moves the batches of `x` [N, H, W, C] apart: [count, pixels, C]."""
        return self._by_device(x).swapaxes(0, 1).reshape(self.count, -1, x.shape[-1])

    def join(self, pixels: jax.Array, like: jax.Array) -> jax.Array:
        """Returns what `pixels` moved apart, [N, H, W, D], for the sizes of `like`, [N, H, W, C]."""
        sizes = *like.shape[1:-1], pixels.shape[-1]
        return pixels.reshape(self.count, self.devices, -1, *sizes).swapaxes(0, 1).reshape(-1, *sizes)

    def _by_device(self, x: jax.Array) -> jax.Array:
        """Splits the axis of the images of `x` [N, ...] by device and batch: [devices, count, n, ...]."""
        return x.reshape(self.devices, self.count, -1, *x.shape[1:])


# How a network is applied: False for evaluation; True for training, with the batch statistics of all images; `Batches`
# for training with those of each batch.
Train = bool | Batches


class _Static(NamedTuple):
    """Static arguments of the normalizations."""

    epsilon: float
    batches: Batches = Batches()  # noqa: RUF009
    activation: Activation | None = None


class BatchNorm(nn.Module):
    """Batch normalization as `torch.nn.BatchNorm2d`: the running variance is the unbiased one.

    Under `jit` with the batch sharded over devices the statistics are those of the global batch (`SyncBatchNorm`).
    Statistics are computed and kept in `param_dtype`; the result is in `dtype`.
    """

    momentum: float = 0.1  # In PyTorch's sense: the weight of the new statistics.
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: Train,
        activation: Activation | None = None,
        kernel: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x` [N, H, W, C], with batch statistics (and updates the running ones) or with the running ones.

        Args:
          x: feature map.
          train: False for the running statistics; else those of the batch, or of each batch.
          activation: None, `flax.linen.relu` or `flax.linen.relu6`, applied to the result.
          kernel: [C, D], with batch statistics only: the 1x1 convolution of `x` with it is normalized, [N, H, W, D].
          residual: [N, H, W, D], with a kernel only: added before the activation.
        """
        channels = (x.shape[-1] if kernel is None else kernel.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        if not train:
            factor = self._factor(var.value, scale)
            result = ((x.astype(self.param_dtype) - mean.value) * factor + bias).astype(self.dtype)
            return _sum(result, None, activation)
        static = _Static(self.epsilon, _batches(train), activation)
        if kernel is None:
            result, means, variances = _normalize(x, scale, bias, mean.value, static)
        else:
            result, means, variances = _normalize_expansion(x, kernel, scale, bias, residual, static)
        if not self.is_initializing():
            count = _pixels(x, static.batches)
            for batch in range(static.batches.count):
                unbiased = variances[batch] * (count / max(count - 1, 1))
                mean.value += self.momentum * (means[batch] - mean.value)
                var.value += self.momentum * (unbiased - var.value)
        return result.astype(self.dtype)

    def folded(self) -> tuple[jax.Array, jax.Array]:
        """Returns the factor and the offset of each channel, [C] each, with running statistics."""
        params, stats = self.variables["params"], self.variables["batch_stats"]
        factor = self._factor(stats["var"], params["scale"])
        return factor, params["bias"] - stats["mean"] * factor

    def _factor(self, var: jax.Array, scale: jax.Array) -> jax.Array:
        return jax.lax.rsqrt(var + self.epsilon) * scale


def normalized(
    conv: nn.Conv,
    norm: BatchNorm,
    x: jax.Array,
    train: Train,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Returns `activation(residual + norm(conv(x), train))` for a convolution without bias.

    Without an activation that is the sum, and without a residual there is none. With running statistics the norm is
    part of the convolution: its factors are in the kernel and its offsets are the bias, so that no pass over the
    feature map follows. The result is the same but for rounding.
    """
    if conv.is_initializing() or (train and not _expands(conv, x, train)):
        if residual is None:
            return norm(conv(x), train, activation)
        return _sum(norm(conv(x), train), residual, activation)
    kernel = conv.variables["params"]["kernel"]
    if train:
        return norm(x.astype(conv.dtype), train, activation, kernel[0, 0], residual)
    factor, offset = norm.folded()
    params = {"kernel": kernel * factor, "bias": offset}
    result = conv.clone(parent=None, name=None, use_bias=True).apply({"params": params}, x)
    return _sum(result, residual, activation)


def _sum(x: jax.Array, residual: jax.Array | None, activation: Activation | None) -> jax.Array:
    if residual is None:
        return x if activation is None else activation(x)
    x = residual + x
    return x if activation is None else _activated_sum(x, activation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _activated_sum(x: jax.Array, activation: Activation) -> jax.Array:
    """The activation of a residual sum, whose backward pass reads the result.

    The next block keeps the result for its own gradients. Left to itself, XLA's compiler for GPUs computes it again
    from both summands, in a kernel of its own: two passes over the feature map more.
    """
    return activation(x)


def _activated_sum_forward(x, activation):
    result = jax.lax.optimization_barrier(activation(x))
    return result, result


def _activated_sum_backward(activation, result, gradient):
    return (_masked(gradient, result, activation),)


_activated_sum.defvjp(_activated_sum_forward, _activated_sum_backward)


def _masked(gradient: jax.Array, result: jax.Array, activation: Activation) -> jax.Array:
    """Returns the gradient of what `activation` was applied to, given that of its `result`."""
    return jnp.where(_PASSES[activation](result), gradient, 0)


def _batches(train: Train) -> Batches:
    """Returns the batches of a network in training."""
    return train if isinstance(train, Batches) else Batches()


def _expands(conv: nn.Conv, x: jax.Array, train: Train) -> bool:
    """Returns whether `conv` is a 1x1 convolution of enough pixels to many more channels."""
    batches, channels = _batches(train), x.shape[-1]
    pixels = _pixels(x, batches) // batches.devices
    grows = conv.kernel_size == (1, 1) and conv.strides == 1 and conv.features >= _EXPANSION * channels
    return grows and not batches.tiles and pixels >= _PIXELS_PER_CHANNEL * channels


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shift: jax.Array, static: _Static
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes `x` [N, H, W, C]; returns the result in the dtype of `x`, and means and (biased) variances, [G, C].

    Computes in the dtype of `scale`. `shift` [C] is an estimate of the mean: subtracting it lets sums over one pass
    through memory give the variance without cancellation. No gradient flows through the returned statistics. The
    backward pass reads `x` and the gradient of the result, twice each: for the sums, and for the gradient of `x`.
    """
    return _normalize_forward(x, scale, bias, shift, static)[0]


def _normalize_forward(x, scale, bias, shift, static):
    batches, pixels = static.batches, _pixels(x, static.batches)
    shifted = x.astype(scale.dtype) - shift
    # First over the pixels of an image, behind a barrier: what few sums are left, XLA's compiler for GPUs adds up in
    # the kernel that needs them. Left to itself, it has two more kernels for each pair of sums.
    per_image = jax.lax.optimization_barrier((shifted.sum((1, 2)), jnp.square(shifted).sum((1, 2))))
    offset, square = (batches.sums(each) / pixels for each in per_image)
    var = jnp.maximum(square - jnp.square(offset), 0)
    mean, inverse = shift + offset, jax.lax.rsqrt(var + static.epsilon)
    factor = inverse * scale
    result = _sum(_affine(x, mean, factor, bias, batches), None, static.activation)
    return (result, mean, var), (x, bias, mean, inverse, factor)


def _normalize_backward(static, saved, cotangents):
    """Ioffe and Szegedy, ICML 2015, section 3."""
    x, bias, mean, inverse, factor = saved
    batches, pixels = static.batches, _pixels(x, static.batches)
    per_image = functools.partial(batches.per_image, images=len(x))

    def gradient_and_normalized(mean: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradient = cotangents[0]
        if static.activation is not None:
            gradient = _masked(gradient, _affine(x, mean, factor, bias, batches), static.activation)
        centered = x.astype(bias.dtype) - per_image(mean)
        return gradient.astype(bias.dtype), centered * per_image(inverse)

    gradient, normed = gradient_and_normalized(mean, inverse)
    by_bias, by_scale = batches.sums(gradient), batches.sums(gradient * normed)
    # The second pass computes gradient and normalized map again: behind the barrier, so that no pass stores them.
    mean, inverse, by_bias, by_scale = jax.lax.optimization_barrier((mean, inverse, by_bias, by_scale))
    gradient, normed = gradient_and_normalized(mean, inverse)
    centered = gradient - (per_image(by_bias) + normed * per_image(by_scale)) / pixels
    by_x = (centered * per_image(factor)).astype(x.dtype)
    return by_x, by_scale.sum(0), by_bias.sum(0), jnp.zeros_like(bias)


_normalize.defvjp(_normalize_forward, _normalize_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _normalize_expansion(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    static: _Static,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes the product y = x W of `x` [N, H, W, C] and `kernel` W [C, D], adds `residual`, and activates.

    There are many more values in y than in x, and neither y nor its gradient is ever stored. The sums of y and of its
    squares follow from those of x and of the products of its channels: 1' y = (1' x) W and y' y = W' (x' x) W, so that
    the norm is known before y is, and factors and offsets become part of the product. The gradient of y is
    d a + y b + c for that of its norm, d, and numbers a, b and c of each channel; y b = x (W b), so the gradients of x
    and W are products of d and x with matrices no larger than W. A channel of ones in x gives sums and adds offsets.
    Returns what `_normalize` returns, [N, H, W, D].
    """
    return _expansion_forward(x, kernel, scale, bias, residual, static)[0]


def _expansion_forward(x, kernel, scale, bias, residual, static):
    channels, pixels = len(kernel), _pixels(x, static.batches)
    rows, weights = _with_ones(static.batches.pixels(x)), _with_rows(kernel.astype(scale.dtype))
    correlation = _correlate(rows, rows, scale.dtype)
    products = _exact("gke,ed->gkd", correlation, weights)
    mean = products[:, channels] / pixels
    var = jnp.maximum((products * weights).sum(1) / pixels - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(var + static.epsilon)
    factor = inverse * scale
    result = _multiply(rows, _table(weights * factor[:, None], bias - mean * factor, rows.dtype), 1)
    # As long as the arrays have one shape, XLA's compiler for GPUs makes sum and activation a part of the product.
    if residual is not None:
        result += static.batches.pixels(residual)
    kept = None
    if static.activation is not None:
        result = kept = jax.lax.optimization_barrier(static.activation(result))
    total = correlation[:, :channels, channels]
    saved = rows, kernel, scale, mean, inverse, total, products, residual, kept
    return (static.batches.join(result, x), mean, var), saved


def _expansion_backward(static, saved, cotangents):
    rows, kernel, scale, mean, inverse, total, products, residual, result = saved
    channels, pixels = len(kernel), _pixels(cotangents[0], static.batches)
    weights = _with_rows(kernel.astype(scale.dtype))
    gradient = static.batches.pixels(cotangents[0])
    if static.activation is not None:
        gradient = _masked(gradient, result, static.activation)
    correlation = _correlate(rows, gradient, scale.dtype)
    by_bias = correlation[:, channels]
    by_scale = ((correlation * weights).sum(1) - mean * by_bias) * inverse
    a = scale * inverse
    b = -a * inverse * by_scale / pixels
    c = -a * by_bias / pixels - b * mean
    by_kernel = correlation * a[:, None] + products * b[:, None]
    by_kernel = (by_kernel[:, :channels] + total[..., None] * c[:, None]).sum(0)
    through_y = jnp.where(_row(weights) == channels, c[:, None], weights * b[:, None])
    through_y = _exact("gkd,cd->gkc", through_y, weights[:channels])
    by_x = _multiply(gradient, (weights[:channels] * a[:, None]).astype(rows.dtype), 2)
    by_x += _multiply(rows, _table(through_y, through_y[:, channels], rows.dtype), 1)
    by_residual = None if residual is None else static.batches.join(gradient, residual)
    by_x = static.batches.join(by_x, cotangents[0])
    return by_x, by_kernel.astype(kernel.dtype), by_scale.sum(0), by_bias.sum(0), by_residual


_normalize_expansion.defvjp(_expansion_forward, _expansion_backward)


def _with_ones(rows: jax.Array) -> jax.Array:
    """Returns pixels [G, n, C] with two channels of ones and some of zeros, [G, n, C + 8]."""
    ones = (jnp.arange(_FURTHER) < 2).astype(rows.dtype)
    return jnp.concatenate([rows, jnp.broadcast_to(ones, (*rows.shape[:-1], _FURTHER))], -1)


def _with_rows(kernel: jax.Array) -> jax.Array:
    """Returns a kernel [C, D] with rows of zeros for the further channels, [C + 8, D]."""
    return jnp.pad(kernel, ((0, _FURTHER), (0, 0)))


def _table(matrix: jax.Array, offset: jax.Array, dtype) -> jax.Array:
    """Returns a matrix [G, C + 8, D] whose product with a map `_with_ones` has `offset` [G, D] added, in `dtype`.

    The first of the two ones takes the offset as it is in that dtype, the second what is left of it.
    """
    first, offset = matrix.shape[1] - _FURTHER, offset[:, None]
    rest = offset - offset.astype(dtype).astype(offset.dtype)
    row = _row(matrix)
    return jnp.where(row == first, offset, jnp.where(row == first + 1, rest, matrix)).astype(dtype)


def _row(matrix: jax.Array) -> jax.Array:
    """Returns the number of the row of each element of matrices [..., K, D]."""
    return jax.lax.broadcasted_iota(jnp.int32, matrix.shape[-2:], 0)


def _multiply(rows: jax.Array, matrices: jax.Array, axis: int) -> jax.Array:
    """Returns the products of pixels [G, n, K] and a matrix per batch over its `axis`, [G, n, D]."""
    return platforms.dot_general(rows, matrices, (((2,), (axis,)), ((0,), (0,))))


def _correlate(x: jax.Array, y: jax.Array, dtype) -> jax.Array:
    """Returns the sums over pixels [G, n, C] and [G, n, D] of products of channels, [G, C, D] in `dtype`."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == dtype else None  # Products of narrower numbers are exact.
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((0,), (0,))), precision=exact, preferred_element_type=dtype)


_exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _affine(x: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array, batches: Batches) -> jax.Array:
    """Returns (x - mean) * factor + bias of a map, in its dtype; `mean` and `factor` [G, C], `bias` [C]."""
    centered = x.astype(bias.dtype) - batches.per_image(mean, len(x))
    return (centered * batches.per_image(factor, len(x)) + bias).astype(x.dtype)


def _pixels(x: jax.Array, batches: Batches) -> int:
    """Returns the number of pixels of a batch, on all devices."""
    return x.size // x.shape[-1] // batches.count
