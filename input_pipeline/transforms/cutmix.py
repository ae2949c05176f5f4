"""CutMix boxes (docs/method.md, Eq. 11), drawn as in UniMatch's `obtain_cutmix_box`."""

import numpy as np

from input_pipeline.errors import DataError

_MOST_DRAWS = 100_000  # Many times those that any ranges need in which boxes lie inside the crop at all.


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
      DataError: hardly any box of the drawn area fits with any of the aspect ratios.
    """
    if rng.random() >= views.cutmix:
        return np.zeros(4, np.int32)
    area = rng.uniform(*views.cutmix_area) * crop * crop
    for _ in range(_MOST_DRAWS):
        aspect = rng.uniform(*views.cutmix_aspect)
        height, width = int(np.sqrt(area * aspect)), int(np.sqrt(area / aspect))
        y, x = (int(v) for v in rng.integers(crop, size=2))
        if y + height <= crop and x + width <= crop:
            return np.array([y, x, y + height, x + width], np.int32)
    raise DataError(
        f"config.views.cutmix_area is {tuple(views.cutmix_area)}: no box of {area:.0f} pixels lies inside a crop of "
        f"{crop}x{crop} with an aspect ratio in config.views.cutmix_aspect={tuple(views.cutmix_aspect)}"
    )
