"""The training batch: what the input pipeline makes and a method consumes."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """The images of a training step: L labeled and U unlabeled ones, cropped to c x c, and V strong views per image.

    Fields that the method does not use are None. `valid` is False on the padding of an image.

    Attributes:
      image_x: labeled images, uint8 [L, c, c, 3] RGB.
      label_x: their class ids, uint8 [L, c, c].
      image_u: unlabeled images, uint8 [U, c, c, 3].
      valid_u: bool [U, c, c].
      image_m: the CutMix partner of each, uint8 [U, c, c, 3].
      valid_m: bool [U, c, c].
      boxes: the CutMix box of each strong view, int32 [U, V, 4]: y0, x0, y1, x1; all zero where nothing is mixed.
    """

    image_x: np.ndarray
    label_x: np.ndarray
    image_u: np.ndarray | None = None
    valid_u: np.ndarray | None = None
    image_m: np.ndarray | None = None
    valid_m: np.ndarray | None = None
    boxes: np.ndarray | None = None


def labeled_rows(config) -> int:
    """Returns the number of labeled images per step, over all processes."""
    return config.data.labeled_batch * config.method.labeled_batch_factor
