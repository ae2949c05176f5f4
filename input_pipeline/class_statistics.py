"""How often classes occur in the labeled images, and draws that favor rare ones (docs/method.md, Eq. 24)."""

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from input_pipeline.errors import DataError, first_messages

_THREADS = 16  # That decode masks.
# Labeled source -> the result of `count_pixels`; whatever needs it, masks are decoded once in a process.
_counted: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def users(config) -> list[str]:
    """Returns the settings, "KEY=VALUE", that depend on how often classes occur (`data.class_pixels`)."""
    settings = {
        "data.labeled_sampling": config.data.labeled_sampling,
        "views.paste_classes": config.views.paste_classes,
        "method.class_weight_power": config.method.class_weight_power,
        "method.logit_adjustment": config.method.logit_adjustment,
        "method.align_classes": config.method.align_classes,
    }
    return [f"{key}={value}" for key, value in settings.items() if value not in (0, "uniform")]


def is_counted(config) -> bool:
    """Returns whether labeled masks are counted: for `data.class_pixels`, or for the images that have a class."""
    return config.data.labeled_sampling == "rare" or bool(users(config) and not config.data.class_pixels)


def count_pixels(source, data, progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """Counts the pixels of each class in each labeled image: int64 [images, classes], ignored ones left out.

    Args:
      source: the labeled `sources.open.Source`.
      data: `config.data`, of which `classes` and `ignore`.
      progress: called with the number of masks that were decoded until then.

    Raises:
      DataError: masks that cannot be used; the message names the first ones. Or no pixel has a class.
    """
    if source not in _counted:
        rows = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for row in pool.map(lambda index: _count(source, data, index), range(len(source))):
                rows.append(row)
                progress(len(rows))
        errors = [row for row in rows if isinstance(row, DataError)]
        if errors:
            raise DataError(first_messages(errors, f"of the {len(source)} labeled masks"))
        _counted[source] = np.stack(rows)
    counts = _counted[source]
    if not counts.any():
        raise DataError(f"every pixel of the {len(source)} labeled masks is ignored: no class can be counted")
    return counts


def _count(source, data, index: int) -> np.ndarray | DataError:
    try:
        label = source.label(index)
    except DataError as error:
        return error
    counts = np.bincount(label.ravel(), minlength=256)
    counts[data.ignore] = 0
    return counts[: len(data.classes)]


def frequencies(class_pixels) -> np.ndarray:
    """Returns the share of each class of all pixels, float64 [classes]."""
    pixels = np.asarray(class_pixels, np.float64)
    return pixels / pixels.sum()


class RareClasses(NamedTuple):
    """Draws classes with probabilities by their rarity, proportional to exp((1 - f_c) / T) (Eq. 24)."""

    scores: np.ndarray  # (1 - f_c) / T, the logarithm of P(c) up to a constant: float64 [classes].
    images: tuple[np.ndarray, ...] = ()  # The labeled images that have a class, by class.

    def draw(self, present: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draws up to `count` of the classes `present`, bool [classes], without replacement; returns their ids.

        The largest of the scores plus Gumbel noise are such a draw (Yellott, 1977): no probability can underflow.
        """
        keys = np.where(present, self.scores + rng.gumbel(size=len(self.scores)), -np.inf)
        return np.argsort(-keys, kind="stable")[: min(count, int(present.sum()))]

    def draw_image(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draws a class of those that labeled images have, and one of its images; returns (image, class)."""
        present = np.array([len(images) > 0 for images in self.images])
        drawn = int(self.draw(present, 1, rng)[0])
        return int(rng.choice(self.images[drawn])), drawn


def rare_classes(source, config) -> RareClasses | None:
    """Returns what draws by rarity from the labeled images of `source`; None if no key of `config` asks for it.

    Frequencies are those of `config.data.class_pixels`, or counted. Raises DataError as `count_pixels` does.
    """
    data, draws_images = config.data, config.data.labeled_sampling == "rare"
    if not (draws_images or config.views.paste_classes):
        return None
    counts = count_pixels(source, data) if draws_images or not data.class_pixels else None
    scores = (1 - frequencies(data.class_pixels or counts.sum(0))) / data.rare_temperature
    return RareClasses(scores, tuple(map(np.flatnonzero, counts.T)) if draws_images else ())
