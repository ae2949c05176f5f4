"""CutMix boxes (docs/method.md, Eq. 11), drawn as in UniMatch's `obtain_cutmix_box`."""

import numpy as np


def cutmix_box(crop: int, views, rng: np.random.Generator) -> np.ndarray:
    """Draws the box into which the pixels of the CutMix partner are pasted.

    With area a = U[cutmix_area] crop^2 and aspect ratio r = U[cutmix_aspect], the box is int(sqrt(a r)) high and
    int(sqrt(a / r)) wide; aspect ratio and position are drawn again until it lies inside the crop.

    Args:
      crop: side of the square view, pixels.
      views: `config.views`.
      rng: the source of all randomness.

    Returns:
      int32 [4]: y0, x0, y1, x1, with y1 and x1 exclusive; all zero (no mixing) with probability 1 - views.cutmix.

    Raises:
      ValueError: no box of the largest area fits with any of the aspect ratios.
    """
    largest = views.cutmix_area[1]
    if max(views.cutmix_aspect[0], largest) > min(views.cutmix_aspect[1], 1 / largest):
        raise ValueError(f"no box of area {largest} of the crop has an aspect ratio in {tuple(views.cutmix_aspect)}")
    if rng.random() >= views.cutmix:
        return np.zeros(4, np.int32)
    area = rng.uniform(*views.cutmix_area) * crop * crop
    while True:
        aspect = rng.uniform(*views.cutmix_aspect)
        height, width = int(np.sqrt(area * aspect)), int(np.sqrt(area / aspect))
        y, x = (int(v) for v in rng.integers(crop, size=2))
        if y + height <= crop and x + width <= crop:
            return np.array([y, x, y + height, x + width], np.int32)
