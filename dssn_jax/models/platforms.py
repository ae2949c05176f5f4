"""Convolutions that CPUs compute in other forms than GPUs and TPUs, with the same result but for rounding."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]  # Zeros above and below, left and right.


class Options(NamedTuple):
    """Static arguments of a convolution: vertical and horizontal value each."""

    strides: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int]


class CpuForms(NamedTuple):
    """How CPUs compute a convolution of some sizes; None: as other platforms do."""

    forward: Callable | None = None  # (x, kernel, options) -> result
    gradients: Callable | None = None  # (x, kernel, gradient of the result, options) -> gradients of x and kernel


def plain(x: jax.Array, kernel: jax.Array, options: Options) -> jax.Array:
    """Returns XLA's convolution of `x` [B, H, W, C] and `kernel` [k, l, C / groups, D]: [B, h, w, D]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        options.strides,
        options.padding,
        rhs_dilation=options.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def convolution(on_cpu: Callable[[jax.Array, jax.Array, Options], CpuForms]) -> Callable:
    """Returns `plain`, but for CPUs in the forms of `on_cpu(x, kernel, options)`, which asks for shapes and dtypes.

    It is traced once for all layers of one size.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def differentiable(x: jax.Array, kernel: jax.Array, options: Options) -> jax.Array:
        return _by_platform(on_cpu(x, kernel, options).forward, plain, options, x, kernel)

    def forward(x, kernel, options):
        return differentiable(x, kernel, options), (x, kernel)

    def backward(options, saved, gradient):
        forms = on_cpu(*saved, options)
        return _by_platform(forms.gradients, gradients_of(plain), options, *saved, gradient)

    differentiable.defvjp(forward, backward)
    return jax.jit(differentiable, static_argnums=2)


def wide(dtype) -> jnp.dtype:
    """Returns `dtype`, but at least float32: the dtype of sums, means and probabilities of numbers of `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)


def dot_general(x: jax.Array, y: jax.Array, dimensions: tuple) -> jax.Array:
    """Returns `lax.dot_general` in the dtype of `x`; `dimensions` are its `dimension_numbers`.

    CPUs that multiply bfloat16 do so up to five times as fast as float32, but XLA lets them only if it is asked for the
    sums in float32, which are rounded here. GPUs and TPUs round in the product's own kernel.
    """
    if x.dtype == wide(x.dtype):
        return lax.dot_general(x, y, dimensions)
    product = functools.partial(lax.dot_general, dimension_numbers=dimensions)
    summed = functools.partial(product, preferred_element_type=wide(x.dtype))
    return lax.platform_dependent(x, y, cpu=lambda *each: summed(*each).astype(x.dtype), default=product)


def pad(x: jax.Array, padding: Padding) -> jax.Array:
    """Pads `x` [B, H, W, C] with zeros."""
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def gradients_of(form: Callable) -> Callable:
    """Returns (x, kernel, gradient of the result, options) -> gradients of x and kernel, as JAX derives them."""

    def gradients(x, kernel, gradient, options):
        return jax.vjp(functools.partial(form, options=options), x, kernel)[1](gradient)

    return gradients


def _by_platform(on_cpu: Callable | None, elsewhere: Callable, options: Options, *arrays: jax.Array):
    elsewhere = functools.partial(elsewhere, options=options)
    if on_cpu is None:
        return elsewhere(*arrays)
    return lax.platform_dependent(*arrays, cpu=functools.partial(on_cpu, options=options), default=elsewhere)
