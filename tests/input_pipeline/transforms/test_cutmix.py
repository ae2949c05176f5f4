"""CutMix boxes: inside the crop, with the configured probability, area and aspect ratio."""

import numpy as np
import pytest

from input_pipeline.errors import DataError
from input_pipeline.transforms.cutmix import cutmix_box


def _boxes(views, count=4000, crop=321):
    rng = np.random.default_rng(0)
    return np.array([cutmix_box(crop, views, rng) for _ in range(count)])


def test_inside_with_area_and_aspect(config):
    config.views.cutmix = 1.0
    boxes = _boxes(config.views)
    assert boxes.dtype == np.int32
    y0, x0, y1, x1 = boxes.T
    assert (boxes >= 0).all() and (boxes <= 321).all() and (y1 > y0).all() and (x1 > x0).all()
    height, width = y1 - y0, x1 - x0
    # Sides are truncated to integers: less than a pixel shorter than drawn.
    low, high = config.views.cutmix_area
    area = height * width / 321**2
    assert area.max() <= high and area.min() >= low - (height + width + 1).max() / 321**2
    assert (height / (width + 1) <= 1 / 0.3).all() and ((height + 1) / width >= 0.3).all()
    assert area.min() < 0.03 and area.max() > 0.35  # The whole range occurs.
    # The area is drawn once, before the position, so repeated draws of the position keep it uniform.
    assert abs(area.mean() - 0.21) < 0.01 and abs(np.median(area) - 0.21) < 0.015
    assert y0.min() == 0 and y1.max() == 321 and x0.min() == 0 and x1.max() == 321


def test_tall_boxes_follow_the_aspect(config):
    """The aspect ratio is height / width."""
    config.views.cutmix = 1.0
    config.views.cutmix_aspect = (2.0, 2.0)
    y0, x0, y1, x1 = _boxes(config.views, 200).T
    assert abs((y1 - y0) / (x1 - x0) - 2.0).max() < 0.1


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_probability(config, probability):
    config.views.cutmix = probability
    boxes = _boxes(config.views)
    empty = (boxes == 0).all(1)
    assert abs((~empty).mean() - probability) <= 5 * np.sqrt(probability * (1 - probability) / len(boxes))


def test_impossible_box(config):
    config.views.cutmix = 1.0
    config.views.cutmix_area = (0.8, 0.9)
    config.views.cutmix_aspect = (3.0, 4.0)
    with pytest.raises(DataError, match=r"config\.views\.cutmix_area is \(0\.8, 0\.9\): no box"):
        cutmix_box(321, config.views, np.random.default_rng(0))
