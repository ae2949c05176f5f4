"""A generated data set: textured shapes on clutter, with exact masks, no files and any number of images.

It is hard to learn from a few labels: light, textures and clutter blur the hues of a class, shapes occlude each other,
and clutter has the same textures. An image depends on (seed, part, index) alone.
"""

import colorsys
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

DISK, RECTANGLE, TRIANGLE, RING, CROSS = range(1, 6)  # Ids in `class_names.SHAPES_CLASSES`; 0 is the background.
PARTS = ("train", "val")
_COMMON = (DISK, RECTANGLE, TRIANGLE, RING)
# The rare class is small, and in every tenth image.
_RARE_PERIOD, _RARE_OFFSET = 10, 3
_RADIUS = (0.2, 0.34)  # As a fraction of the image side.
_RARE_RADIUS = (0.17, 0.22)
# Center of the hues of a class, in turns of the color circle; light, clutter and textures blur them.
_HUE_OF = {DISK: 0.0, RECTANGLE: 0.2, TRIANGLE: 0.4, RING: 0.6, CROSS: 0.8}
_HUE_RANGE = 0.06

Grid = tuple[np.ndarray, np.ndarray]  # y and x of every pixel, float32 [size, size].


class ShapesSource:
    """Generated images and labels; a `sources.open.Source`.

    The common classes take turns as the topmost large shape (index mod 4) and the rare class is in the images whose
    index is 3 modulo 10, so any 4 consecutive images contain the common classes and any 10 the rare one.
    """

    def __init__(self, size: int, count: int, seed: int, part: str, labeled: bool):
        """Draws nothing yet.

        Args:
          size: side of the square images, pixels.
          count: number of images.
          seed: seed of the data set.
          part: "train" | "val": different images for the same seed.
          labeled: whether records have a "label".
        """
        self._size, self._count, self._seed = size, count, seed
        self._part, self._labeled = part, labeled

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """Returns a name that looks like a path."""
        return f"shapes/{self._part}/{index:06d}.png"

    def size(self, index: int) -> tuple[int, int]:
        """Returns (H, W)."""
        del index
        return self._size, self._size

    def label(self, index: int) -> np.ndarray:
        """Draws the label of record `index`, uint8 [size, size]."""
        return self[index]["label"]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Draws record `index`: {"image": uint8 [size, size, 3], "label": uint8 [size, size]}."""
        if not 0 <= index < self._count:
            raise IndexError(f"{index} of {self._count} images")
        rng = np.random.default_rng([self._seed, PARTS.index(self._part), index])
        image, label = _draw(self._size, index, rng)
        return {"image": image, "label": label} if self._labeled else {"image": image}


def _draw(size: int, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:size, :size].astype(np.float32)
    image = _background(y, x, rng)
    label = np.zeros((size, size), np.uint8)
    topmost = _COMMON[index % len(_COMMON)]
    classes = [*rng.choice(_COMMON, size=rng.integers(2)), topmost]
    if index % _RARE_PERIOD == _RARE_OFFSET:
        classes.append(CROSS)
    for shape in classes:
        low, high = _RARE_RADIUS if shape == CROSS else _RADIUS
        radius = size * rng.uniform(low, high)
        inside = _outline(shape, *_local(y, x, size, radius, rng), radius)
        _paint(image, inside, _texture(y, x, _TEXTURES_OF[shape], rng, _class_color(shape, rng)))
        label[inside] = shape
    return _expose(image, y, x, rng), label


def _local(y: np.ndarray, x: np.ndarray, size: int, margin: float, rng: np.random.Generator) -> Grid:
    """Returns rotated coordinates with the origin at a random point at least 0.8 `margin` from the border."""
    cy, cx = rng.uniform(0.8 * margin, size - 0.8 * margin, size=2).tolist()
    sin, cos = _direction(rng)
    return (x - cx) * sin + (y - cy) * cos, (x - cx) * cos - (y - cy) * sin


def _direction(rng: np.random.Generator) -> tuple[float, float]:
    angle = rng.uniform(0, 2 * np.pi)
    return math.sin(angle), math.cos(angle)  # Python floats leave float32 arrays float32; NumPy scalars do not.


def _outline(shape: int, v: np.ndarray, u: np.ndarray, radius: float) -> np.ndarray:
    """Returns the mask of a shape of `radius` around the origin of (v, u), bool [size, size]."""
    if shape == DISK:
        return u * u + v * v <= radius * radius
    if shape == RING:
        return np.abs(np.hypot(u, v) - 0.7 * radius) <= 0.3 * radius
    if shape == RECTANGLE:
        return (np.abs(u) <= 0.95 * radius) & (np.abs(v) <= 0.6 * radius)
    if shape == TRIANGLE:  # Equilateral: the three sides are half a radius from the center.
        side = 0.75**0.5 * u
        return (v >= -radius / 2) & (v / 2 + side <= radius / 2) & (v / 2 - side <= radius / 2)
    near, far = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return (near <= 0.4 * radius) & (far <= radius)


def _color(rng: np.random.Generator) -> np.ndarray:
    """Returns a random, mostly pale color, float32 [3] in 0..255."""
    return (rng.uniform(40, 215) + rng.uniform(-40, 40, 3)).astype(np.float32)


def _class_color(shape: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a vivid color with a hue of the class, float32 [3] in 0..255."""
    hue = (_HUE_OF[shape] + rng.uniform(-_HUE_RANGE, _HUE_RANGE)) % 1
    color = colorsys.hsv_to_rgb(hue, rng.uniform(0.45, 1), rng.uniform(0.45, 1))
    return 255 * np.array(color, np.float32)


def _wave(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a plane wave in -1..1 with a period of 4 to 10 pixels and a random direction and phase."""
    sin, cos = _direction(rng)
    return np.sin((sin * y + cos * x) * (2 * np.pi / rng.uniform(4, 10)) + rng.uniform(0, 2 * np.pi))


def _stripes(y, x, rng):
    return (_wave(y, x, rng) > 0).astype(np.float32)


def _checks(y, x, rng):
    return (_wave(y, x, rng) * _wave(y, x, rng) > 0).astype(np.float32)


def _ripples(y, x, rng):
    return 0.5 + 0.5 * _wave(y, x, rng)


def _spots(y, x, rng):
    return (_wave(y, x, rng) + _wave(y, x, rng) > 0.8).astype(np.float32)


def _clouds(y, x, rng):
    cells = int(rng.integers(3, 9))
    coarse = Image.fromarray(rng.integers(256, size=(cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize(x.shape, Image.Resampling.BILINEAR), np.float32) / 255


def _grain(y, x, rng):
    del y
    return rng.random(x.shape, np.float32)


_TEXTURES: tuple[Callable, ...] = (_stripes, _checks, _ripples, _spots, _clouds, _grain)
# A class has three of the six textures; any two classes share some, and clutter has all.
_TEXTURES_OF = {
    DISK: (_spots, _clouds, _ripples),
    RECTANGLE: (_stripes, _checks, _clouds),
    TRIANGLE: (_ripples, _grain, _stripes),
    RING: (_clouds, _grain, _checks),
    CROSS: (_clouds, _spots, _stripes),
}


def _texture(
    y: np.ndarray,
    x: np.ndarray,
    kinds: tuple[Callable, ...],
    rng: np.random.Generator,
    first: np.ndarray | None = None,
) -> np.ndarray:
    """Returns a random texture of two colors, float32 [size, size, 3]; `first` is one of them."""
    amount = kinds[rng.integers(len(kinds))](y, x, rng)[..., None]
    first, second = _color(rng) if first is None else first, _color(rng)
    second = first + rng.uniform(0.2, 0.5) * (second - first)  # Faint to strong contrast.
    return first + amount * (second - first)


def _paint(image: np.ndarray, inside: np.ndarray, texture: np.ndarray) -> None:
    np.copyto(image, texture, where=inside[..., None])


def _background(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a background of clouds, textured half-planes, lines and small blobs, float32 [size, size, 3]."""
    size = len(x)
    image = _texture(y, x, (_clouds, _ripples), rng)
    for _ in range(rng.integers(3)):
        v, _ = _local(y, x, size, 0, rng)
        _paint(image, v > 0.2 * size, _texture(y, x, _TEXTURES, rng))
    for _ in range(rng.integers(2, 6)):
        v, _ = _local(y, x, size, 0, rng)
        image[np.abs(v) < rng.uniform(0.5, 0.02 * size)] = _color(rng)
    for _ in range(rng.integers(4, 12)):
        v, u = _local(y, x, size, 0, rng)
        image[u * u + v * v * rng.uniform(1, 4) < (size * rng.uniform(0.015, 0.045)) ** 2] = _color(rng)
    return image


def _expose(image: np.ndarray, y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns `image` under light with a gradient, with sensor noise, uint8 [size, size, 3]."""
    sin, cos = _direction(rng)
    middle = (len(x) - 1) / 2
    light = rng.uniform(0.6, 1.2) + rng.uniform(0, 0.4) * (sin * (y - middle) + cos * (x - middle)) / len(x)
    noise = rng.standard_normal(image.shape, np.float32) * rng.uniform(2, 12)
    return np.clip(image * light[..., None] + noise, 0, 255).astype(np.uint8)
