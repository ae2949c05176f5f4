"""Strong views on the device: random photometric changes that move no pixel, for a whole batch at once.

Arithmetic of Pillow: images are 8-bit levels, uint8 [N, H, W, 3], before and after every operation, and each operation
takes one parameter per sample, float32 [N]. Each sample has its own random key, so the views do not depend on how a
batch is split over devices. Operations, order and ranges are UniMatch's (docs/method.md, Eq. 12).

Each round computes every operation and selects one per sample. That is cheap where it matters: the selection and all
pixel-wise operations become one pass through memory, and a `lax.switch` per sample would process samples one by one.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.batch import Batch

# Pillow computes L = 0.299 R + 0.587 G + 0.114 B (ITU-R 601-2) in fixed point with 16 fractional bits.
_LUMA = (19595, 38470, 7471)
_BITS = 20  # Factors are multiples of 2 ** -20, up to 8: integer arithmetic does not depend on the compiler.
_UNIT = 2.0**-_BITS
_BOX_PASSES = 3  # Box blurs that make up Pillow's Gaussian blur.

# Ranges of the parameters of the operations of the VOC recipe, both ends included; integers give integers. None: no
# parameter.
RANGES = {
    "identity": None,
    "autocontrast": None,
    "equalize": None,
    "blur": (0.1, 2.0),
    "contrast": (0.05, 0.95),
    "brightness": (0.05, 0.95),
    "color": (0.05, 0.95),
    "sharpness": (0.05, 0.95),
    "posterize": (4, 8),
    "solarize": (1, 256),
    "hue": (-0.5, 0.5),
}


@dataclasses.dataclass(frozen=True)
class StrongAugment:
    """How strong views are drawn; `configs/defaults.py` explains the fields (section `views`)."""

    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    gray: float
    blur: float
    blur_sigma: tuple[float, float]
    operations: tuple[int, int]


def from_config(views) -> StrongAugment:
    """Returns the augmentation of `config.views`."""
    values = {field.name: views[field.name] for field in dataclasses.fields(StrongAugment)}
    # As floats: `_between` draws integers from integer bounds.
    values |= {"blur_sigma": tuple(map(float, views.blur_sigma)), "hue": float(views.hue)}
    return StrongAugment(**values | {"operations": tuple(views.operations)})


class Draw(NamedTuple):
    """Random parameters of N samples."""

    jitter: jax.Array  # bool [N]
    order: jax.Array  # int32 [N, 4]: indices into JITTER, in the order of application.
    factors: jax.Array  # float32 [N, 4]: parameters of JITTER, in the order of JITTER.
    gray: jax.Array  # bool [N]
    sigma: jax.Array  # float32 [N]: standard deviation of the blur; 0 for none.
    operations: jax.Array  # int32 [N, max operations]: indices into OPERATIONS; identity after the last one drawn.
    parameters: jax.Array  # float32 [N, max operations]


def strong_views(batch: Batch, augment: StrongAugment, key: jax.Array) -> jax.Array | None:
    """Draws the strong views of the unlabeled images of `batch` and of their CutMix partners.

    Returns uint8 [U, V, P, H, W, 3]: V views (one per CutMix box of `batch`) of the image and, unless images of the
    batch are partners of each other (P = 1), of its partner (P = 2); None if the batch has no boxes. The same key and
    row of the global batch give the same views.
    """
    if batch.boxes is None:
        return None
    count, images = batch.boxes.shape[1], [image for image in (batch.image_u, batch.image_m) if image is not None]
    weak = jnp.stack(images * count, 1)
    # Views of the same image stay beside each other, so that no row of a sharded batch moves between devices.
    flat = apply(weak.reshape(-1, *weak.shape[2:]), draw(key, weak.shape[0] * weak.shape[1], augment), augment)
    return flat.reshape(len(weak), count, len(images), *weak.shape[2:])


def draw(key: jax.Array, samples: int, augment: StrongAugment) -> Draw:
    """Draws the parameters of `samples` strong views, each from its own key."""
    return jax.vmap(lambda key: _draw_one(key, augment))(jax.random.split(key, samples))


def _draw_one(key: jax.Array, augment: StrongAugment) -> Draw:
    least, most = augment.operations
    counts = [3, len(JITTER), len(JITTER), 1, 1, most, most]
    # All numbers at once: a generator takes longer to compile than everything computed from its numbers.
    numbers = jax.random.uniform(key, (sum(counts),), jnp.float32)
    coins, order, factors, sigma, count, operations, parameters = jnp.split(numbers, np.cumsum(counts)[:-1])
    jitter, gray, blur = coins < np.array([augment.jitter, augment.gray, augment.blur], np.float32)
    count = _between(count, [(least, most)])
    operations = _between(operations, [(0, len(OPERATIONS) - 1)] * most).astype(jnp.int32)
    operations = jnp.where(jnp.arange(most) < count, operations, _IDENTITY)
    strengths = (augment.brightness, augment.contrast, augment.saturation)
    spans = [(max(0.0, 1.0 - strength), 1.0 + strength) for strength in strengths]
    return Draw(
        jitter=jitter,
        order=jnp.argsort(order),
        factors=_between(factors, [*spans, (-augment.hue, augment.hue)]),
        gray=gray,
        sigma=jnp.where(blur, _between(sigma, [augment.blur_sigma])[0], 0.0),
        operations=operations,
        parameters=_between(parameters, _SPANS, operations),
    )


def _between(uniform: jax.Array, spans, which: jax.Array | None = None) -> jax.Array:
    """Maps U[0, 1) to float32 numbers in `spans`, or in the spans with indices `which`; both ends included.

    Integer spans give integers, others multiples of _UNIT. Nothing is rounded after a sum, so the numbers do not depend
    on how the compiler fuses operations.
    """
    units = np.array([1.0 if isinstance(low, int) else _UNIT for low, _ in spans])
    low, high = (np.round(ends / units).astype(np.int32) for ends in np.array(spans, np.float64).reshape(-1, 2).T)
    if which is not None:
        low, high, units = (jnp.asarray(values)[which] for values in (low, high, units.astype(np.float32)))
    offset = jnp.minimum(jnp.floor(uniform * (high - low + 1)).astype(jnp.int32), high - low)
    return (low + offset).astype(jnp.float32) * jnp.asarray(units, jnp.float32)


def apply(images: jax.Array, drawn: Draw, augment: StrongAugment) -> jax.Array:
    """Applies jitter, gray, blur and operations, in this order, to uint8 [N, H, W, 3]; returns the same shape."""

    def jitter(levels, step):
        return _apply_chosen(JITTER, levels, *step), None

    def operate(levels, step):
        return _apply_chosen(OPERATIONS.values(), levels, *step), None

    # A scan, so that the body is compiled once.
    factors = jnp.take_along_axis(drawn.factors, drawn.order, 1)
    jittered, _ = jax.lax.scan(jitter, images, (drawn.order.T, factors.T))
    levels = jnp.where(_per_sample(drawn.jitter), jittered, images)
    levels = jnp.where(_per_sample(drawn.gray), gray(levels), levels)
    levels = blur(levels, drawn.sigma, augment.blur_sigma[1])
    levels, _ = jax.lax.scan(operate, levels, (drawn.operations.T, drawn.parameters.T))
    return levels


def _apply_chosen(operations, levels: jax.Array, choice: jax.Array, parameter: jax.Array) -> jax.Array:
    """Applies to each sample the operation that its `choice`, int [N], selects from `operations`."""
    result = levels
    for index, operation in enumerate(operations):
        chosen = choice == index  # Others get a neutral parameter: theirs may be out of range here.
        changed = operation(levels, jnp.where(chosen, parameter, 1.0))
        result = jnp.where(_per_sample(chosen), changed, result)
    return result


def _per_sample(values: jax.Array) -> jax.Array:
    """Reshapes [N] to [N, 1, 1, 1]."""
    return values[:, None, None, None]


def luma(levels: jax.Array) -> jax.Array:
    """Converts to L as Pillow: uint8 [N, H, W, 3] -> int32 [N, H, W, 1]."""
    red, green, blue = (levels[..., i : i + 1].astype(jnp.int32) for i in range(3))
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue + 0x8000) >> 16


def gray(levels: jax.Array, _=None) -> jax.Array:
    """Converts to grayscale, repeated over the channels."""
    return jnp.broadcast_to(luma(levels).astype(jnp.uint8), levels.shape)


def identity(levels: jax.Array, _=None) -> jax.Array:
    """Returns `levels`."""
    return levels


def brightness(levels: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies by `factor`."""
    return _blend(0, levels, factor)


def contrast(levels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the mean gray level, an integer: mean + factor (x - mean)."""
    pixels = levels.shape[1] * levels.shape[2]
    total = luma(levels).astype(jnp.uint32).sum((1, 2, 3), keepdims=True)  # Exact up to 8 million pixels.
    mean = (2 * total + pixels) // (2 * pixels)
    return _blend(mean, levels, factor)


def color(levels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the grayscale image: L + factor (x - L)."""
    return _blend(luma(levels), levels, factor)


def sharpness(levels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with a smoothed image (3x3, weights 1 and 5 of 13, border kept): smooth + factor (x - smooth)."""
    height, width = levels.shape[1:3]
    if min(height, width) < 3:
        return levels
    wide = levels.astype(jnp.int32)
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    inside = jnp.pad((2 * total + 13) // 26, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
    border = (y == 0) | (y == height - 1) | (x == 0) | (x == width - 1)
    return _blend(jnp.where(border, wide, inside), levels, factor)


def _blend(other: jax.Array | int, levels: jax.Array, factor: jax.Array) -> jax.Array:
    """Pillow's `Image.blend`: other + factor (levels - other), truncated and clipped; `factor` in units of _UNIT."""
    other = jnp.asarray(other, jnp.int32)
    units = _per_sample(jnp.round(factor / _UNIT).astype(jnp.int32))
    mixed = other + ((units * (levels.astype(jnp.int32) - other)) >> _BITS)
    return jnp.clip(mixed, 0, 255).astype(jnp.uint8)


def posterize(levels: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps the highest `bits` bits."""
    low = (8 - bits).astype(jnp.uint8)
    return (levels >> _per_sample(low)) << _per_sample(low)


def solarize(levels: jax.Array, threshold: jax.Array) -> jax.Array:
    """Inverts levels of at least `threshold`."""
    return jnp.where(levels < _per_sample(threshold), levels, 255 - levels)


def autocontrast(levels: jax.Array, _=None) -> jax.Array:
    """Stretches each channel to 0..255; a constant channel is unchanged."""
    wide = levels.astype(jnp.int32)
    low, high = wide.min((1, 2), keepdims=True), wide.max((1, 2), keepdims=True)
    stretched = (wide - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, wide).astype(jnp.uint8)


def equalize(levels: jax.Array, _=None) -> jax.Array:
    """Equalizes the histogram of each channel as `PIL.ImageOps.equalize`."""
    counts = histogram(levels)  # [N, 3, 256]
    total = levels.shape[1] * levels.shape[2]
    last = 255 - (counts[..., ::-1] > 0).argmax(-1)
    step = (total - jnp.take_along_axis(counts, last[..., None], -1)) // 255
    before = counts.cumsum(-1) - counts
    table = jnp.clip((step // 2 + before) // jnp.maximum(step, 1), 0, 255)
    table = jnp.where(step > 0, table, jnp.arange(256)).astype(jnp.uint8)
    look_up = jax.vmap(jax.vmap(lambda table, levels: table[levels], (0, -1), -1))
    return look_up(table, levels.astype(jnp.int32))


def histogram(levels: jax.Array) -> jax.Array:
    """Counts the levels of each channel: uint8 [N, H, W, 3] -> int32 [N, 3, 256]."""
    channels = levels.reshape(len(levels), -1, 3)
    by_increments = _histogram_by_increments
    return jax.lax.platform_dependent(channels, cpu=by_increments, cuda=by_increments, default=_histogram_by_product)


def _histogram_by_increments(channels: jax.Array) -> jax.Array:
    """Counts by increments: fast on a CPU, and a single read of the levels on a GPU."""
    bins = channels.astype(jnp.int32) + 256 * jnp.arange(3)
    counts = jax.vmap(lambda bins: jnp.zeros(3 * 256, jnp.int32).at[bins.ravel()].add(1))(bins)
    return counts.reshape(-1, 3, 256)


def _histogram_by_product(channels: jax.Array) -> jax.Array:
    """Counts by a matrix product, for TPUs: a level is two 4-bit digits, whose one-hots, multiplied, count pairs."""
    digits = jnp.arange(16, dtype=jnp.uint8)
    high = ((channels >> 4)[..., None] == digits).astype(jnp.bfloat16)
    low = ((channels & 15)[..., None] == digits).astype(jnp.bfloat16)
    counts = jnp.einsum("npch,npcl->nchl", high, low, preferred_element_type=jnp.float32)  # Exact below 2 ** 24.
    return counts.reshape(-1, 3, 256).astype(jnp.int32)


def hue(levels: jax.Array, shift: jax.Array) -> jax.Array:
    """Shifts the hue by int(255 shift) of Pillow's 256 steps, wrapping around."""
    h, s, v = _hsv(levels)
    steps = jnp.trunc(255 * shift).astype(jnp.int32)
    return _rgb((h + _per_sample(steps)) & 255, s, v)


def _hsv(levels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Converts to HSV as Pillow: three int32 [N, H, W, 1], 0..255."""
    red, green, blue = (levels[..., i : i + 1].astype(jnp.int32) for i in range(3))
    most = jnp.maximum(red, jnp.maximum(green, blue))
    least = jnp.minimum(red, jnp.minimum(green, blue))
    spread = jnp.maximum(most - least, 1)

    def distance(channel):
        return (most - channel).astype(jnp.float32) / spread.astype(jnp.float32)

    # The smallest channel has distance 1 and the largest 0, so each sum below is rounded once, as in Pillow.
    turn = jnp.where(green == least, 5 - distance(red), 3 + distance(green))
    turn = jnp.where(green == most, jnp.where(blue == least, 1 + distance(red), 3 - distance(blue)), turn)
    at_red = jnp.where(blue == least, 1 - distance(green), distance(blue) - 1)
    turn = jnp.where(red == most, at_red, turn)
    sixth = turn * (1 / 6)
    sixth += ((turn - 4 * sixth) - 2 * sixth) * (1 / 6)  # Rounds like a division by 6.
    turn = jnp.where(sixth < 0, sixth + 1, sixth)
    h = _floor_255(turn)
    s = _floor_255((most - least).astype(jnp.float32) / jnp.maximum(most, 1).astype(jnp.float32))
    colored = most > least
    return jnp.where(colored, h, 0), jnp.where(colored, s, 0), most


def _floor_255(x: jax.Array) -> jax.Array:
    """Returns floor(255 x) of float32 x in [0, 1], as if the product were exact."""
    nearest = jnp.round(255 * x)
    below = (256 * x - nearest) - x < 0  # Both differences are exact.
    return (nearest - below).astype(jnp.int32)


def _rgb(h: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
    """Converts from HSV as Pillow: three int32 [N, H, W, 1] -> uint8 [N, H, W, 3]."""
    # A channel is darkened by `amount` / 255, a trapezoid over its turn of six sectors of 255: up, full, down, none.
    turn = (6 * h + 255 * jnp.array([5, 3, 1])) % (6 * 255)
    amount = jnp.clip(jnp.minimum(turn, 4 * 255 - turn), 0, 255)
    one = 255 * 255
    return ((2 * v * (one - s * amount) + one) // (2 * one)).astype(jnp.uint8)


def blur(levels: jax.Array, sigma: jax.Array, largest_sigma: float = RANGES["blur"][1]) -> jax.Array:
    """Blurs with a Gaussian as Pillow: three box blurs along each axis, each rounded to 8 bits.

    `sigma` [N] is the standard deviation in pixels, at most `largest_sigma`, which sets the width of the boxes; 0
    leaves a sample unchanged.
    """
    weights = _box_weights(sigma, int(_box_radius(np.float32(largest_sigma), np)) + 1)
    for axis in (2, 1):
        for _ in range(_BOX_PASSES):
            levels = _box_blur(levels, weights, axis)
    return levels


def _box_radius(sigma, numpy=jnp):
    """Returns the fractional radius of the boxes that approximate a Gaussian: Gwosdek et al., SSVM 2011, as Pillow."""
    variance = sigma * sigma / _BOX_PASSES
    whole = numpy.floor((numpy.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + fraction


def _box_weights(sigma: jax.Array, reach: int) -> jax.Array:
    """Returns the weights of pixels 0, 1, .., `reach` from the center, in units of 2 ** -24: uint32 [N, reach + 1]."""
    radius = _box_radius(sigma.astype(jnp.float32))
    whole = jnp.floor(radius).astype(jnp.uint32)
    inner = (2.0**24 / (2 * radius + 1)).astype(jnp.uint32)
    edge = (2**24 - (2 * whole + 1) * inner) // 2
    distance = jnp.arange(reach + 1, dtype=jnp.uint32)
    weights = jnp.where(distance <= whole[:, None], inner[:, None], 0)
    return jnp.where(distance == whole[:, None] + 1, edge[:, None], weights).astype(jnp.uint32)


def _box_blur(levels: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
    """Applies one box blur along `axis`, with edge padding."""
    reach, size = weights.shape[1] - 1, levels.shape[axis]
    padding = [(reach, reach) if i == axis else (0, 0) for i in range(levels.ndim)]
    padded = jnp.pad(levels, padding, mode="edge").astype(jnp.uint32)
    shifted = [jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(2 * reach + 1)]
    total = _per_sample(weights[:, 0]) * shifted[reach] + 2**23
    for distance in range(1, reach + 1):
        total += _per_sample(weights[:, distance]) * (shifted[reach - distance] + shifted[reach + distance])
    return (total >> 24).astype(jnp.uint8)


Operation = Callable[[jax.Array, jax.Array], jax.Array]
JITTER: tuple[Operation, ...] = (brightness, contrast, color, hue)
OPERATIONS: dict[str, Operation] = dict(
    identity=identity, autocontrast=autocontrast, equalize=equalize, blur=blur, contrast=contrast,
    brightness=brightness, color=color, sharpness=sharpness, posterize=posterize, solarize=solarize, hue=hue,
)  # fmt: skip
_SPANS = [RANGES[name] or (0.0, 0.0) for name in OPERATIONS]
_IDENTITY = list(OPERATIONS).index("identity")
