"""Strong views with Pillow, on 8-bit RGB: the reference for those on the device (docs/method.md, Eq. 12).

Color jitter, gray and blur are UniMatch's (`dataset/transform.py`, with torchvision's semantics for PIL images); the
eleven operations are those that DSSN adds for VOC.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps


def strong_view(image: np.ndarray, views, rng: np.random.Generator) -> np.ndarray:
    """Returns a strong view of `image`: jitter, gray and blur, each with its probability, then random operations.

    Args:
      image: uint8 [H, W, 3] RGB.
      views: `config.views`.
      rng: the source of all randomness.

    Returns:
      uint8 [H, W, 3].
    """
    picture = Image.fromarray(image)
    if rng.random() < views.jitter:
        picture = color_jitter(picture, views, rng)
    if rng.random() < views.gray:
        picture = gray(picture)
    if rng.random() < views.blur:
        picture = blur(picture, rng.uniform(*views.blur_sigma))
    count = rng.integers(*views.operations, endpoint=True)
    for choice in rng.integers(len(OPERATIONS), size=count):
        operation, parameter = _OPERATION_LIST[choice]
        picture = operation(picture, parameter(rng))
    return np.array(picture)


def color_jitter(picture: Image.Image, views, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast, saturation (factors U[max(0, 1 - x), 1 + x]) and hue (U[-x, x]) in random order."""
    steps = [
        (operation, rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength))
        for operation, strength in (
            (brightness, views.brightness),
            (contrast, views.contrast),
            (color, views.saturation),
        )
    ]
    steps.append((hue, rng.uniform(-views.hue, views.hue)))
    for i in rng.permutation(len(steps)):
        operation, value = steps[i]
        picture = operation(picture, value)
    return picture


def gray(picture: Image.Image) -> Image.Image:
    """Sets all channels to L = 0.299 R + 0.587 G + 0.114 B (ITU-R 601-2)."""
    return picture.convert("L").convert("RGB")


def identity(picture: Image.Image, _=None) -> Image.Image:
    """Returns the image unchanged."""
    return picture


def autocontrast(picture: Image.Image, _=None) -> Image.Image:
    """Stretches each channel to 0..255."""
    return ImageOps.autocontrast(picture)


def equalize(picture: Image.Image, _=None) -> Image.Image:
    """Equalizes the histogram of each channel."""
    return ImageOps.equalize(picture)


def blur(picture: Image.Image, sigma: float) -> Image.Image:
    """Blurs with a Gaussian of standard deviation `sigma` pixels, which Pillow approximates with three box blurs."""
    return picture.filter(ImageFilter.GaussianBlur(radius=sigma))


def contrast(picture: Image.Image, factor: float) -> Image.Image:
    """Interpolates with the mean gray level: mean + factor (x - mean)."""
    return ImageEnhance.Contrast(picture).enhance(factor)


def brightness(picture: Image.Image, factor: float) -> Image.Image:
    """Multiplies by `factor`."""
    return ImageEnhance.Brightness(picture).enhance(factor)


def color(picture: Image.Image, factor: float) -> Image.Image:
    """Interpolates with the gray image: gray + factor (x - gray)."""
    return ImageEnhance.Color(picture).enhance(factor)


def sharpness(picture: Image.Image, factor: float) -> Image.Image:
    """Interpolates with a smoothed image: smooth + factor (x - smooth)."""
    return ImageEnhance.Sharpness(picture).enhance(factor)


def posterize(picture: Image.Image, bits: int) -> Image.Image:
    """Keeps the `bits` most significant bits of each channel."""
    return ImageOps.posterize(picture, bits)


def solarize(picture: Image.Image, threshold: int) -> Image.Image:
    """Inverts values of at least `threshold`."""
    return ImageOps.solarize(picture, threshold)


def hue(picture: Image.Image, shift: float) -> Image.Image:
    """Rotates the hue by `shift` turns, -0.5 to 0.5: int(255 shift) of Pillow's 256 hue levels, modulo 256."""
    h, s, v = picture.convert("HSV").split()
    steps = int(shift * 255)
    h = h.point([(value + steps) % 256 for value in range(256)])
    return Image.merge("HSV", (h, s, v)).convert("RGB")


# Ranges of the parameters as the original has them, both ends included; integers give integers.
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


def _parameter(span: tuple | None) -> Callable[[np.random.Generator], float | int | None]:
    """Returns a function that draws a parameter from the range `span`."""
    if span is None:
        return lambda rng: None
    if all(isinstance(end, int) for end in span):
        return lambda rng: int(rng.integers(*span, endpoint=True))
    return lambda rng: float(rng.uniform(*span))


OPERATIONS = {
    operation.__name__: (operation, _parameter(RANGES[operation.__name__]))
    for operation in (
        identity, autocontrast, equalize, blur, contrast, brightness, color, sharpness, posterize, solarize, hue
    )
}  # fmt: skip
_OPERATION_LIST = tuple(OPERATIONS.values())
