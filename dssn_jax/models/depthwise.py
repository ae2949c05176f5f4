"""Depthwise convolution that is fast on CPUs too. All arrays are NHWC.

XLA compiles a convolution with as many groups as channels well for GPUs and TPUs, but for CPUs to a program that takes
ten times as long, forward and backward, as a sum of shifted products. The result is the same but for rounding.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dssn_jax.models import platforms
from dssn_jax.models.platforms import Options


def depthwise_conv(x: jax.Array, kernel: jax.Array, options: Options) -> jax.Array:
    """Convolves each channel of `x` [B, H, W, C] with its own `kernel` [k, k, 1, C]; strides and dilation are equal."""
    return _conv(x, kernel, options)


def shifted_products(x: jax.Array, kernel: jax.Array, options: Options) -> jax.Array:
    """Returns `depthwise_conv` as a sum of k * k products; in bfloat16 the sum is in float32."""
    wide, (stride, _), (dilation, _) = platforms.wide(x.dtype), options.strides, options.dilation
    padded, weights = platforms.pad(x, options.padding).astype(wide), kernel.astype(wide)
    height, width = (size - dilation * (kernel.shape[0] - 1) for size in padded.shape[1:3])

    def product(i: int, j: int) -> jax.Array:
        top, left = i * dilation, j * dilation
        return padded[:, top : top + height : stride, left : left + width : stride] * weights[i, j, 0]

    elements = [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    return functools.reduce(jnp.add, (product(i, j) for i, j in elements)).astype(x.dtype)


def _shifted_gradients(x, kernel, gradient, options):
    """Returns the gradients of `x` and `kernel`, given that of the result."""
    (stride, _), (dilation, _), padding = options.strides, options.dilation, options.padding
    padded = platforms.pad(x, padding)
    # Transposed: `stride - 1` zeros between the pixels, a border of zeros, and the kernel turned by 180 degrees.
    border = dilation * (kernel.shape[0] - 1)
    spread = [(0, 0, 0)] * 4
    for axis in (1, 2):
        beyond = padded.shape[axis] - border - (gradient.shape[axis] - 1) * stride - 1  # Pixels that nothing reaches.
        spread[axis] = (border, border + beyond, stride - 1)
    spread_gradient = lax.pad(gradient, jnp.zeros((), gradient.dtype), spread)
    unpadded = Options((1, 1), ((0, 0), (0, 0)), options.dilation)
    by_padded = shifted_products(spread_gradient, kernel[::-1, ::-1], unpadded)
    (top, _), (left, _) = padding
    by_x = by_padded[:, top : top + x.shape[1], left : left + x.shape[2]]
    return by_x, _kernel_gradient(padded, kernel, gradient, stride, dilation)


def _kernel_gradient(padded, kernel, gradient, stride, dilation):
    """Returns the gradient of `kernel`, summed pixel by pixel: its elements stay in a cache, all channels side by side.

    XLA compiles k * k sums over pixels to loops that stride over the channels, up to 20 times as slow.
    """
    wide = platforms.wide(padded.dtype)
    (batch, rows, columns, channels), side = gradient.shape, dilation * (kernel.shape[0] - 1) + 1

    def add_pixel(i: jax.Array, total: jax.Array) -> jax.Array:
        row, column = i // columns, i % columns
        window = lax.dynamic_slice(padded, (0, row * stride, column * stride, 0), (batch, side, side, channels))
        pixel = lax.dynamic_slice(gradient, (0, row, column, 0), (batch, 1, 1, channels))
        return total + window[:, ::dilation, ::dilation].astype(wide) * pixel.astype(wide)

    total = jnp.zeros((batch, *kernel.shape[:2], channels), wide)
    total = lax.fori_loop(0, rows * columns, add_pixel, total, unroll=4)
    return total.sum(0).reshape(kernel.shape).astype(kernel.dtype)


_conv = platforms.convolution(lambda *_: platforms.CpuForms(shifted_products, _shifted_gradients))
