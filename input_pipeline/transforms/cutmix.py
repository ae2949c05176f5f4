"""CutMix boxes, as UniMatch's `obtain_cutmix_box` draws them."""

import numpy as np


def cutmix_box(crop: int, views, rng: np.random.Generator) -> np.ndarray:
    """Draws the box that a partner's pixels are pasted into.

    With area a = U[cutmix_area] crop^2 and aspect r = U[cutmix_aspect], the box is int(sqrt(a r)) high and
    int(sqrt(a / r)) wide; aspect and place are drawn anew until it lies inside the crop.

    Args:
      crop: side of the square view, pixels.
      views: `config.views`.
      rng: the source of all randomness.

    Returns:
      int32 [4]: y0, x0, y1, x1 with y1 and x1 outside; all zero, which is no mix, with probability 1 - views.cutmix.

    Raises:
      ValueError: no box of the largest area and any of the aspects fits.
    """
    largest = views.cutmix_area[1]
    if max(views.cutmix_aspect[0], largest) > min(views.cutmix_aspect[1], 1 / largest):
        raise ValueError(f"no box of area {largest} of the crop has an aspect in {tuple(views.cutmix_aspect)}")
    if rng.random() >= views.cutmix:
        return np.zeros(4, np.int32)
    area = rng.uniform(*views.cutmix_area) * crop * crop
    while True:
        aspect = rng.uniform(*views.cutmix_aspect)
        height, width = int(np.sqrt(area * aspect)), int(np.sqrt(area / aspect))
        y, x = (int(v) for v in rng.integers(crop, size=2))
        if y + height <= crop and x + width <= crop:
            return np.array([y, x, y + height, x + width], np.int32)
