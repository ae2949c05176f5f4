"""Class maps as colors, and panels of pictures side by side."""

import numpy as np

IGNORED = (224, 224, 192)  # VOC draws void in this cream.
SELECTED, REJECTED = (255, 255, 255), (0, 0, 0)
GAP = 2  # Pixels between the pictures of a panel.


def palette(num_classes: int) -> np.ndarray:
    """Colors uint8 [num_classes, 3], those of PASCAL VOC: the bits of a class id spread over red, green and blue."""
    ids = np.arange(num_classes)
    colors = np.zeros((num_classes, 3), int)
    for level in range(8):
        for channel in range(3):
            colors[:, channel] |= ((ids >> (3 * level + channel)) & 1) << (7 - level)
    return colors.astype(np.uint8)


def colorize(class_map: np.ndarray, num_classes: int) -> np.ndarray:
    """Class ids [..., H, W] -> colors uint8 [..., H, W, 3]; ids that are no class become the color of void."""
    colors = np.concatenate([palette(num_classes), np.array([IGNORED], np.uint8)])
    return colors[np.minimum(class_map, num_classes)]


def overlay(image: np.ndarray, class_map: np.ndarray, num_classes: int, opacity: float = 0.6) -> np.ndarray:
    """Lays the colors of a class map [..., H, W] over an image uint8 [..., H, W, 3]."""
    mixed = (1 - opacity) * image + opacity * colorize(class_map, num_classes)
    return mixed.round().astype(np.uint8)


def mask(selected: np.ndarray) -> np.ndarray:
    """bool [..., H, W] -> white where True, black where False, uint8 [..., H, W, 3]."""
    return np.where(selected[..., None], np.array(SELECTED, np.uint8), np.array(REJECTED, np.uint8))


def panel(*columns: np.ndarray) -> np.ndarray:
    """Columns of pictures, each uint8 [n, H, W, 3], -> one picture uint8 with n rows, white between them."""
    pad = [(0, 0), (0, GAP), (0, GAP), (0, 0)]
    columns = [np.pad(column, pad, constant_values=255) for column in columns]
    return np.concatenate([np.concatenate(list(column), 0) for column in columns], 1)
