"""Layers with PyTorch's arithmetic, so that weights and numbers of the original carry over. All arrays are NHWC."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dssn_jax.models.convolution import conv_general_dilated
from dssn_jax.models.extent import Extent, zero_outside

# PyTorch's default for convolutions, kaiming_uniform(a=sqrt(5)): U[-1/sqrt(fan_in), 1/sqrt(fan_in)].
default_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def conv(features: int, kernel: int = 1, stride: int = 1, dilation: int = 1, groups: int = 1, **kwargs) -> nn.Conv:
    """2-D convolution without bias, as `torch.nn.Conv2d` with `padding = dilation * (kernel - 1) / 2`.

    `[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]`; `kwargs` go to `flax.linen.Conv`.
    """
    options = {"use_bias": False, "kernel_init": default_kernel_init, **kwargs}
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=dilation * (kernel - 1) // 2,
        kernel_dilation=dilation,
        feature_group_count=groups,
        conv_general_dilated=conv_general_dilated,
        **options,
    )


def bias_init(fan_in: int):
    """PyTorch's default for the bias of a convolution: U[-1/sqrt(fan_in), 1/sqrt(fan_in)]."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


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
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalizes `x` [B, H, W, C] with batch statistics (and updates the running ones) or with the running ones."""
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        if train:
            result, mean, var = _normalize_by_batch(x, scale, bias, running_mean.value, self.epsilon)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
            return result.astype(self.dtype)
        factor = self._factor(running_var.value, scale)
        return ((x.astype(self.param_dtype) - running_mean.value) * factor + bias).astype(self.dtype)

    def folded(self) -> tuple[jax.Array, jax.Array]:
        """Returns the factor and the offset of each channel, [C] each, with running statistics."""
        params, stats = self.variables["params"], self.variables["batch_stats"]
        factor = self._factor(stats["var"], params["scale"])
        return factor, params["bias"] - stats["mean"] * factor

    def _factor(self, var: jax.Array, scale: jax.Array) -> jax.Array:
        return jax.lax.rsqrt(var + self.epsilon) * scale


def normalized(conv: nn.Conv, norm: BatchNorm, x: jax.Array, train: bool) -> jax.Array:
    """Returns `norm(conv(x), train)` for a convolution without bias.

    With running statistics the norm is part of the convolution: its factors are in the kernel and its offsets are the
    bias, so that no pass over the feature map follows. The result is the same but for rounding.
    """
    if train or conv.is_initializing():
        return norm(conv(x), train)
    factor, offset = norm.folded()
    params = {"kernel": conv.variables["params"]["kernel"] * factor, "bias": offset}
    return conv.clone(parent=None, name=None, use_bias=True).apply({"params": params}, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalize_by_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shift: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes `x` [B, H, W, C]; returns the result in the dtype of `x`, and the mean and (biased) variance [C].

    Computes in the dtype of `scale`. `shift` [C] is an estimate of the mean: subtracting it lets sums over one pass
    through memory give the variance without cancellation. No gradient flows through the returned mean and variance.
    The backward pass saves `x` in its own dtype, where automatic differentiation would save wider copies.
    """
    return _normalize_forward(x, scale, bias, shift, epsilon)[0]


def _normalize_forward(x, scale, bias, shift, epsilon):
    shifted = x.astype(scale.dtype) - shift
    offset = shifted.mean((0, 1, 2))
    var = jnp.maximum(jnp.square(shifted).mean((0, 1, 2)) - jnp.square(offset), 0)
    mean, inverse = shift + offset, jax.lax.rsqrt(var + epsilon)
    result = ((x.astype(scale.dtype) - mean) * (inverse * scale) + bias).astype(x.dtype)
    return (result, mean, var), (x, scale, mean, inverse)


def _normalize_backward(epsilon, saved, cotangents):
    """Ioffe and Szegedy, ICML 2015, section 3."""
    del epsilon
    x, scale, mean, inverse = saved
    gradient = cotangents[0].astype(scale.dtype)
    normalized = (x.astype(scale.dtype) - mean) * inverse
    bias_gradient = gradient.sum((0, 1, 2))
    scale_gradient = (gradient * normalized).sum((0, 1, 2))
    count = x.size // x.shape[-1]
    centered = gradient - (bias_gradient + normalized * scale_gradient) / count
    return (centered * (scale * inverse)).astype(x.dtype), scale_gradient, bias_gradient, jnp.zeros_like(mean)


_normalize_by_batch.defvjp(_normalize_forward, _normalize_backward)


@jax.custom_vjp
def relu_of_sum(x: jax.Array) -> jax.Array:
    """ReLU of a residual sum, whose backward pass reads the result.

    The next block keeps the result for its own gradients. Left to itself, XLA's compiler for GPUs computes it again
    from both summands, in a kernel of its own: two passes over the feature map more.
    """
    return nn.relu(x)


def _relu_forward(x):
    result = jax.lax.optimization_barrier(nn.relu(x))
    return result, result


def _relu_backward(result, gradient):
    return (jnp.where(result > 0, gradient, 0),)


relu_of_sum.defvjp(_relu_forward, _relu_backward)


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 max pooling of stride 2 and padding 1."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def average_pool(x: jax.Array, window: int, stride: int, extent: Extent | None = None) -> jax.Array:
    """Average pooling of `x` [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), C], as timm's `downsample_avg`.

    A strided window that crosses the edge averages the pixels inside; at stride 1 (where dilation replaces the stride)
    zeros beyond the right and bottom edges count.
    """
    x = zero_outside(x, extent)
    if stride == 1:
        return nn.avg_pool(x, (window, window), padding=((0, window - 1),) * 2)
    padding = [(0, -size % stride) for size in x.shape[1:3]]
    pool = functools.partial(nn.avg_pool, window_shape=(window, window), strides=(stride, stride), padding=padding)
    if extent is None:
        return pool(x, count_include_pad=False)
    inside = pool(extent.mask(*x.shape[1:3]).astype(x.dtype))  # The fraction of each window that is valid.
    return pool(x) / jnp.where(inside > 0, inside, 1)


@functools.cache
def remat(block: type[nn.Module]) -> type[nn.Module]:
    """Returns a block (called with x, train, extent) that recomputes its activations in the backward pass."""
    return nn.remat(block, static_argnums=(2,))
