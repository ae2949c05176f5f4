"""Convolution that is fast on CPUs too: `conv_general_dilated` for `flax.linen.Conv`. All arrays are NHWC.

XLA's convolutions are the best there is for GPUs and TPUs, which get them. For CPUs it compiles matrix products better
than convolutions of 1x1, several times so in the backward pass, and dilated convolutions of small maps multiply padding
for the most part; the gradients of all other kernels are sums of products. In bfloat16, which many CPUs multiply
several times as fast as float32 in matrix products alone, all convolutions without stride are such products. The
results are the same but for rounding.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dssn_jax.models import platforms
from dssn_jax.models.depthwise import depthwise_conv
from dssn_jax.models.platforms import Options

_FEW_CHANNELS = 8  # With fewer, products leave most of a vector register empty.
# Images with more pixels than this are multiplied one at a time: XLA sums over the pixels of all images on a single
# core, and what all images together need does not fit the cache.
_LONG = 512


class Tap(NamedTuple):
    """Where an element of the kernel reaches the image, along one axis: input `start + i * stride`, output `first + i`,
    for i in [0, count).
    """

    start: int
    first: int
    count: int


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]], **options
) -> jax.Array:
    """Returns `lax.conv_general_dilated` of `x` [B, H, W, C] and `kernel` [k, k, C / groups, D]: [B, h, w, D].

    Takes the arguments that `flax.linen.Conv` gives it.
    """
    dilation, groups = tuple(options["rhs_dilation"]), options["feature_group_count"]
    if isinstance(padding, str):
        reach = [step * (size - 1) + 1 for step, size in zip(dilation, kernel.shape, strict=False)]
        padding = lax.padtype_to_pads(x.shape[1:3], reach, strides, padding)
    static = Options(tuple(strides), tuple(map(tuple, padding)), dilation)
    if groups == x.shape[-1] == kernel.shape[-1]:
        return depthwise_conv(x, kernel, static)
    if groups == 1:
        return _conv(x, kernel, static)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _suits_products(sizes: tuple[int, int], kernel: tuple[int, int], options: Options) -> bool:
    """Returns whether at most half of the products of a convolution have a factor that is not padding, or it is 1x1."""
    if kernel == (1, 1):
        return True
    reached = output = 1
    for axis in range(2):
        taps, outputs = _taps(sizes[axis], kernel[axis], options, axis)
        reached *= sum(tap.count for tap in taps)
        output *= outputs * kernel[axis]
    return 2 * reached <= output


def _cpu_forms(x: jax.Array, kernel: jax.Array, options: Options) -> platforms.CpuForms:
    """Returns how CPUs convolve these arrays."""
    if _suits_products(x.shape[1:3], kernel.shape[:2], options):
        return platforms.CpuForms(products, platforms.gradients_of(products))
    # A loop over images would gather a batch that is spread over devices.
    if x.shape[-1] < _FEW_CHANNELS or jax.device_count() > 1:
        return platforms.CpuForms()
    if x.dtype == jnp.bfloat16 and options.strides == (1, 1):
        return platforms.CpuForms(one_product, _one_product_gradients)
    return platforms.CpuForms(gradients=_kernel_by_products)


_conv = platforms.convolution(_cpu_forms)


def products(x: jax.Array, kernel: jax.Array, options: Options) -> jax.Array:
    """Returns the convolution of `x` [B, H, W, C] and `kernel` [k, l, C, D] as a sum of matrix products.

    Each is of an element of the kernel and the part of the image that it reaches; in bfloat16 the sum is in float32.
    """
    (rows, height), (columns, width) = (_taps(x.shape[axis + 1], kernel.shape[axis], options, axis) for axis in (0, 1))
    total = jnp.zeros((x.shape[0], height, width, kernel.shape[-1]), platforms.wide(x.dtype))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if row.count and column.count:
                part = x[:, _inputs(row, options.strides[0]), _inputs(column, options.strides[1])]
                target = slice(row.first, row.first + row.count), slice(column.first, column.first + column.count)
                product = matmul(part, kernel[i, j])
                whole = product.shape == total.shape
                total = total + product if whole else total.at[:, *target].add(product)
    return total.astype(x.dtype)


def one_product(x: jax.Array, kernel: jax.Array, options: Options) -> jax.Array:
    """Returns the convolution without stride of `x` [B, H, W, C] and `kernel` [k, l, C, D].

    Multiplies each pixel by all elements of the kernel at once and adds the products of pixels that are `dilation`
    apart, for large maps image by image.
    """
    (rows, columns, channels, features), (down, right) = kernel.shape, options.dilation
    matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)

    def convolve(padded: jax.Array) -> jax.Array:
        height, width = padded.shape[1] - down * (rows - 1), padded.shape[2] - right * (columns - 1)
        spread = matmul(padded, matrix).reshape(*padded.shape[:3], rows, columns, features)
        elements = [(i, j) for i in range(rows) for j in range(columns)]
        shifted = (spread[:, i * down :, j * right :][:, :height, :width, i, j] for i, j in elements)
        return functools.reduce(jnp.add, shifted).astype(x.dtype)

    padded = platforms.pad(x, options.padding)
    if x.shape[1] * x.shape[2] <= _LONG:
        return convolve(padded)
    return lax.map(lambda image: convolve(image[None])[0], padded)


def _one_product_gradients(x, kernel, gradient, options):
    """Returns the gradients of `x`, a convolution with the kernel turned by 180 degrees, and of `kernel`."""
    spans = [step * (size - 1) for step, size in zip(options.dilation, kernel.shape, strict=False)]
    border = tuple((span - before, span - after) for span, (before, after) in zip(spans, options.padding, strict=True))
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    by_x = one_product(gradient, turned, options._replace(padding=border))
    return by_x, _kernel_gradient(x, kernel, gradient, options)


def _kernel_by_products(x, kernel, gradient, options):
    by_x = jax.vjp(lambda x: platforms.plain(x, kernel, options), x)[1](gradient)[0]
    return by_x, _kernel_gradient(x, kernel, gradient, options)


def _kernel_gradient(x: jax.Array, kernel: jax.Array, gradient: jax.Array, options: Options) -> jax.Array:
    """Returns the gradient of `kernel`, given that of the result of the convolution [B, h, w, D].

    A matrix product per element of the kernel, of the gradient and the part of the image that the element reaches; of
    large maps an image at a time, which stays in the cache. On a CPU XLA's convolution takes one to three times as
    long.
    """
    (rows, columns), (down, right) = kernel.shape[:2], options.dilation
    (batch, height, width, features), wide = gradient.shape, platforms.wide(x.dtype)

    def reached(images: jax.Array, i: int, j: int) -> jax.Array:
        vertical = _inputs(Tap(i * down, 0, height), options.strides[0])
        horizontal = _inputs(Tap(j * right, 0, width), options.strides[1])
        return images[:, vertical, horizontal].reshape(-1, images.shape[-1])

    def add_images(total: jax.Array, images: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        padded, by_result = images[0], images[1].reshape(-1, features).T
        pixels = (reached(padded, i, j) for i in range(rows) for j in range(columns))
        return total + jnp.stack([jnp.matmul(by_result, each, preferred_element_type=wide) for each in pixels]), None

    together = 1 if height * width > _LONG else batch
    groups = [each.reshape(-1, together, *each.shape[1:]) for each in (platforms.pad(x, options.padding), gradient)]
    total, _ = lax.scan(add_images, jnp.zeros((rows * columns, features, x.shape[-1]), wide), tuple(groups))
    return jnp.swapaxes(total, 1, 2).reshape(kernel.shape).astype(kernel.dtype)


def _taps(size: int, kernel: int, options: Options, axis: int) -> tuple[list[Tap], int]:
    """Returns the reach of each element of the kernel along an axis of the image, and the size of the output."""
    stride, dilation, (before, after) = (
        values[axis] for values in (options.strides, options.dilation, options.padding)
    )
    outputs = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    taps = []
    for element in range(kernel):
        offset = element * dilation - before  # Output y reads input y * stride + offset.
        first = max(0, -(offset // stride))
        end = min(outputs, (size - 1 - offset) // stride + 1)
        taps.append(Tap(first * stride + offset, first, max(0, end - first)))
    return taps, outputs


def _inputs(tap: Tap, stride: int) -> slice:
    return slice(tap.start, tap.start + (tap.count - 1) * stride + 1, stride)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `x` [B, h, w, C] times `kernel` [C, D]: [B, h, w, D]; for bfloat16 in float32, as its sums are."""
    return jnp.einsum("nhwc,cd->nhwd", x, kernel, preferred_element_type=platforms.wide(x.dtype))


def _matmul_forward(x, kernel):
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(saved, gradient):
    x, kernel = saved
    rounded = gradient.astype(x.dtype)
    by_x = jnp.einsum("nhwd,cd->nhwc", rounded, kernel, preferred_element_type=gradient.dtype).astype(x.dtype)
    return by_x, _channel_products(x, rounded).astype(kernel.dtype)


def _channel_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the products of each channel of `x` [B, h, w, C] and of `y` [B, h, w, D], summed over pixels: [C, D].

    For bfloat16 the sums are in float32.
    """
    wide = platforms.wide(x.dtype)
    multiply = functools.partial(jnp.einsum, preferred_element_type=wide)
    if x.dtype != wide or x.shape[1] * x.shape[2] <= _LONG:
        return multiply("nhwc,nhwd->cd", x, y)
    if x.shape[-1] > y.shape[-1]:  # XLA transposes the first factor, so the one with fewer channels is it.
        return multiply("nhwd,nhwc->ndc", y, x).sum(0).T
    return multiply("nhwc,nhwd->ncd", x, y).sum(0)


matmul.defvjp(_matmul_forward, _matmul_backward)
