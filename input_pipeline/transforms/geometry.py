"""The weak view: random scale, crop and flip of an image and its label, as in UniMatch's `dataset/transform.py`."""

from typing import NamedTuple

import numpy as np
from PIL import Image

# As DAFormer (Hoyer et al., CVPR 2022): at least 1500 pixels of a crop of 512x512 in one of ten draws.
_RARE_SHARE, _RARE_DRAWS = 1500 / 512**2, 10


class Window(NamedTuple):
    """A crop of a scaled image."""

    size: tuple[int, int]  # (height, width) of the scaled image.
    rows: slice
    columns: slice
    step: int  # -1: flipped.


def weak_view(
    image: np.ndarray, label: np.ndarray | None, data, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Randomly scales, crops and flips an image and its label, padding images smaller than the crop.

    The long side becomes an integer drawn uniformly from int(long * scale[0]) .. int(long * scale[1]) and the other
    side keeps the aspect ratio; the image is resampled bilinearly, the label by nearest neighbor. Padding is at the
    right and at the bottom, before the flip.

    Args:
      image: uint8 [H, W, 3].
      label: uint8 [H, W], or None.
      data: `config.data`, of which `crop`, `scale`, `flip` and `ignore`, the label of the padding.
      rng: the source of all randomness.

    Returns:
      image uint8 [crop, crop, 3] (padding 0), label uint8 [crop, crop] (padding `ignore`) or None, and valid bool
      [crop, crop], False on the padding.
    """
    return _window_view(image, label, data, _draw_window(image.shape[:2], data, rng))


def rare_view(
    image: np.ndarray, label: np.ndarray, wanted: int, data, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws weak views until one has enough pixels of the class `wanted`; after ten, takes the one with most.

    Arguments and results are those of `weak_view`. Enough is 0.6% of the crop (docs/method.md, Eq. 24).
    """
    most, best = -1, None
    for _ in range(_RARE_DRAWS):
        window = _draw_window(image.shape[:2], data, rng)
        pixels = int((nearest_window(label, window.size, (window.rows, window.columns)) == wanted).sum())
        if pixels > most:
            most, best = pixels, window
        if most >= _RARE_SHARE * data.crop**2:
            break
    return _window_view(image, label, data, best)


def _draw_window(shape: tuple[int, int], data, rng: np.random.Generator) -> Window:
    crop = data.crop
    height, width = scaled_size(*shape, data.scale, rng)
    top = int(rng.integers(max(height - crop, 0), endpoint=True))
    left = int(rng.integers(max(width - crop, 0), endpoint=True))
    rows, columns = slice(top, min(top + crop, height)), slice(left, min(left + crop, width))
    return Window((height, width), rows, columns, -1 if rng.random() < data.flip else 1)


def _window_view(
    image: np.ndarray, label: np.ndarray | None, data, window: Window
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Returns the view of a window: see `weak_view`."""
    crop, (size, rows, columns, step) = data.crop, window
    view = _pad(resize_window(image, size, (rows, columns)), crop, 0)[:, ::step]
    valid = np.zeros((crop, crop), bool)
    valid[: rows.stop - rows.start, : columns.stop - columns.start] = True
    if label is not None:
        label = _pad(nearest_window(label, size, (rows, columns)), crop, data.ignore)[:, ::step]
        label = np.ascontiguousarray(label)
    return np.ascontiguousarray(view), label, np.ascontiguousarray(valid[:, ::step])


def scaled_size(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int]:
    """Draws the scaled (height, width), each at least 1."""
    long = max(height, width)
    drawn = int(rng.integers(int(long * scale[0]), int(long * scale[1]), endpoint=True))
    return tuple(max(1, drawn if side == long else int(side * drawn / long + 0.5)) for side in (height, width))


def resize_window(image: np.ndarray, size: tuple[int, int], window: tuple[slice, slice]) -> np.ndarray:
    """Returns `window` (rows, columns) of `image` resized to `size` (height, width), bilinear with antialiasing.

    Only the window is computed: Pillow accepts a source box in fractions of a pixel and filters across its edges, so
    the result equals resizing the whole image and cropping, up to rounding by one gray level.
    """
    rows, columns = window
    y, x = image.shape[0] / size[0], image.shape[1] / size[1]
    box = (columns.start * x, rows.start * y, columns.stop * x, rows.stop * y)
    box = (*box[:2], min(box[2], image.shape[1]), min(box[3], image.shape[0]))  # Rounding must not leave the image.
    shape = (columns.stop - columns.start, rows.stop - rows.start)
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BILINEAR, box=box))


def nearest_window(label: np.ndarray, size: tuple[int, int], window: tuple[slice, slice]) -> np.ndarray:
    """Returns `window` of `label` [H, W] resized to `size` by nearest neighbor, row floor((i + 1/2) H / height)."""
    rows, columns = (
        (2 * np.arange(span.start, span.stop) + 1) * old // (2 * new)
        for span, old, new in zip(window, label.shape, size, strict=True)
    )
    return label[rows[:, None], columns]


def _pad(array: np.ndarray, crop: int, value: int) -> np.ndarray:
    height, width = array.shape[:2]
    if (height, width) == (crop, crop):
        return array
    padded = np.full((crop, crop, *array.shape[2:]), value, array.dtype)
    padded[:height, :width] = array
    return padded
