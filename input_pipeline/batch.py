"""The training batch, made by the input pipeline and consumed by a method."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """The weak views of a training step: L labeled and U unlabeled crops of side c, and boxes for V strong views.

    Fields that the method does not use are None. Boxes without `image_m` mean that unlabeled images are the CutMix
    partners of each other: rows 2i and 2i + 1 (`views.mix_partner=reversed`). Partners that are labeled have `label_m`
    in place of `valid_m` (`views.mix_partner=labeled`).

    Attributes:
      image_x: labeled images, uint8 [L, c, c, 3] RGB.
      label_x: their class ids, uint8 [L, c, c]; ignored on the padding.
      image_u: unlabeled images, uint8 [U, c, c, 3].
      valid_u: False on their padding, bool [U, c, c].
      image_m: their CutMix partners, uint8 [U, c, c, 3].
      valid_m: False on the padding of the partners, bool [U, c, c].
      boxes: CutMix boxes y0, x0, y1, x1 of each strong view, int32 [U, V, 4], y1 and x1 exclusive; all zero: no mixing.
      label_m: class ids of the partners, uint8 [U, c, c]; ignored on the padding.
      classes: the classes of the partner whose pixels are pasted in each strong view besides the box, bool [U, V, K].
    """

    image_x: np.ndarray
    label_x: np.ndarray
    image_u: np.ndarray | None = None
    valid_u: np.ndarray | None = None
    image_m: np.ndarray | None = None
    valid_m: np.ndarray | None = None
    boxes: np.ndarray | None = None
    label_m: np.ndarray | None = None
    classes: np.ndarray | None = None


def labeled_rows(config) -> int:
    """Returns the number of labeled images per step, over all processes."""
    return config.data.labeled_batch * config.method.labeled_batch_factor
