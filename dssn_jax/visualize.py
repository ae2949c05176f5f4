"""Class maps as colors, and panels of pictures side by side; NumPy only."""

import numpy as np

IGNORED = (224, 224, 192)  # RGB of ignored pixels: the cream in which PASCAL VOC draws void.
GAP = 2  # Pixels between the pictures of a panel.


def palette(num_classes: int) -> np.ndarray:
    """Returns the colors of PASCAL VOC, uint8 [num_classes, 3]: bits of the id spread over red, green and blue."""
    ids = np.arange(num_classes)
    colors = np.zeros((num_classes, 3), int)
    for level in range(8):
        for channel in range(3):
            colors[:, channel] |= ((ids >> (3 * level + channel)) & 1) << (7 - level)
    return colors.astype(np.uint8)


def colorize(class_map: np.ndarray, num_classes: int) -> np.ndarray:
    """Maps class ids [..., H, W] to colors, uint8 [..., H, W, 3]; ids from `num_classes` on get the color `IGNORED`."""
    colors = np.concatenate([palette(num_classes), np.array([IGNORED], np.uint8)])
    return colors[np.minimum(class_map, num_classes)]


def overlay(image: np.ndarray, class_map: np.ndarray, num_classes: int, opacity: float = 0.6) -> np.ndarray:
    """Blends the colors of a class map [..., H, W] over an image uint8 [..., H, W, 3]; returns the same shape."""
    blend = (1 - opacity) * image + opacity * colorize(class_map, num_classes)
    return blend.round().astype(np.uint8)


def mask(weight: np.ndarray) -> np.ndarray:
    """Draws weights in [0, 1], float or bool [..., H, W], as uint8 [..., H, W, 3]: white for 1, black for 0."""
    gray = (255 * np.asarray(weight, np.float32)).round().astype(np.uint8)
    return np.repeat(gray[..., None], 3, -1)


def panel(*columns: np.ndarray) -> np.ndarray:
    """Joins columns of n pictures, each uint8 [n, H, W, 3], to one picture with n rows and white gaps."""
    pad = [(0, 0), (0, GAP), (0, GAP), (0, 0)]
    columns = [np.pad(column, pad, constant_values=255) for column in columns]
    return np.concatenate([np.concatenate(list(column), 0) for column in columns], 1)
