"""The weak view: alignment of image and label, padding, and the distributions of scale, crop and flip."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline.transforms.geometry import nearest_window, rare_view, resize_window, scaled_size, weak_view

IGNORE = 255


def _view(image, label, crop, scale, flip, rng):
    """Calls `weak_view`; `rng` is a generator or a seed."""
    data = ConfigDict({"crop": crop, "scale": scale, "flip": flip, "ignore": IGNORE})
    return weak_view(image, label, data, np.random.default_rng(rng))


def _bands(height, width):
    """Returns an image whose red channel is 10 times its label, and the label: vertical and horizontal bands."""
    y, x = np.mgrid[:height, :width]
    label = ((y // 8 + 3 * (x // 8)) % 20).astype(np.uint8)
    return np.stack([label * 10, np.zeros_like(label), np.full_like(label, 99)], -1), label


def test_identity():
    image, label = _bands(32, 32)
    view, view_label, valid = _view(image, label, 32, (1.0, 1.0), 0.0, 0)
    np.testing.assert_array_equal(view, image)
    np.testing.assert_array_equal(view_label, label)
    assert valid.all()


def test_flip():
    image, label = _bands(32, 32)
    view, view_label, _ = _view(image, label, 32, (1.0, 1.0), 1.0, 0)
    np.testing.assert_array_equal(view, image[:, ::-1])
    np.testing.assert_array_equal(view_label, label[:, ::-1])


@pytest.mark.parametrize("seed", range(20))
def test_image_and_label_stay_aligned(seed):
    """Inside the bands, red gives the label; at their edges the image is interpolated and not checked."""
    image, label = _bands(60, 90)
    view, view_label, valid = _view(image, label, 48, (0.5, 2.0), 0.5, seed)
    assert view.shape == (48, 48, 3) and view_label.shape == valid.shape == (48, 48)
    assert view.dtype == view_label.dtype == np.uint8 and valid.dtype == bool
    np.testing.assert_array_equal(view_label == IGNORE, ~valid)
    # At any scale, a pixel whose neighbors share its label is not interpolated across an edge.
    inner = (slice(1, -1), slice(1, -1))
    neighbors = [view_label[dy : 46 + dy, dx : 46 + dx] for dy in (0, 1, 2) for dx in (0, 1, 2)]
    deep = (np.array(neighbors) == view_label[inner]).all(0) & valid[inner]
    assert deep.sum() > 50
    difference = view[inner][..., 0].astype(int) - 10 * view_label[inner].astype(int)
    assert abs(difference[deep]).max() <= 1
    assert (view[valid][:, 2] == 99).all()


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_padding_is_invalid_at_right_and_bottom(flip):
    image = np.full((20, 30, 3), 50, np.uint8)
    label = np.ones((20, 30), np.uint8)
    view, view_label, valid = _view(image, label, 40, (1.0, 1.0), flip, 0)
    expected = np.zeros((40, 40), bool)
    expected[:20, :30] = True
    if flip:
        expected = expected[:, ::-1]
    np.testing.assert_array_equal(valid, expected)
    np.testing.assert_array_equal(view, np.repeat(np.where(expected, 50, 0)[..., None], 3, -1))
    np.testing.assert_array_equal(view_label, np.where(expected, 1, IGNORE))


def test_unlabeled_draws_as_labeled():
    image, label = _bands(60, 90)
    with_label = _view(image, label, 48, (0.5, 2.0), 0.5, 3)
    without = _view(image, None, 48, (0.5, 2.0), 0.5, 3)
    assert without[1] is None
    np.testing.assert_array_equal(without[0], with_label[0])
    np.testing.assert_array_equal(without[2], with_label[2])


def test_crop_places_are_uniform():
    """A crop of 4 from a 5x6 image has 2 x 3 positions, which the corner pixel identifies."""
    image = np.zeros((5, 6, 3), np.uint8)
    image[..., 0], image[..., 1] = np.mgrid[:5, :6]
    rng = np.random.default_rng(0)
    corners = [tuple(_view(image, None, 4, (1.0, 1.0), 0.0, rng)[0][0, 0, :2]) for _ in range(3000)]
    places, counts = np.unique(corners, axis=0, return_counts=True)
    assert len(places) == 6 and abs(counts - 500).max() < 5 * np.sqrt(500)


def test_scaled_size_is_uniform_and_keeps_the_aspect():
    rng = np.random.default_rng(0)
    sizes = np.array([scaled_size(30, 41, (0.5, 2.0), rng) for _ in range(8000)])
    assert sizes[:, 1].min() == 20 and sizes[:, 1].max() == 82  # int(20.5), int(82.0)
    assert abs(np.bincount(sizes[:, 1], minlength=83)[20:] - 8000 / 63).max() < 5 * np.sqrt(8000 / 63)
    np.testing.assert_array_equal(sizes[:, 0], np.floor(30 * sizes[:, 1] / 41 + 0.5))
    assert scaled_size(41, 30, (2.0, 2.0), rng) == (82, 60)


def test_sizes_are_never_zero():
    image = np.full((1, 300, 3), 9, np.uint8)
    view, _, valid = _view(image, None, 8, (0.001, 0.002), 0.0, 0)
    assert valid.sum() == 1 and view[0, 0, 0] == 9


@pytest.mark.parametrize("size", [(46, 72), (91, 143), (200, 315), (33, 50)])
def test_windows_are_those_of_pillows_resize(size):
    """Pillow keeps a box in float32, so levels may differ by one. Odd sizes have no center between two pixels."""
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(91, 143, 3), dtype=np.uint8)
    label = rng.integers(256, size=(91, 143), dtype=np.uint8)
    window = (slice(7, 31), slice(11, 49))
    whole = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    difference = resize_window(image, size, window).astype(int) - np.asarray(whole)[window]
    assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.05
    nearest = np.asarray(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))
    np.testing.assert_array_equal(nearest_window(label, size, window), nearest[window])


RARE = ConfigDict({"crop": 32, "scale": (1.0, 1.0), "flip": 0.5, "ignore": IGNORE})


def _corner(side):
    """Returns an image of 128x128 with a square of class 1 in the corner, and red where the class is."""
    label = np.zeros((128, 128), np.uint8)
    label[:side, :side] = 1
    return np.stack([200 * label, label, label], -1), label


def test_rare_views_have_the_class_more_often():
    """A crop meets the corner of 32x32 with at least 1500 / 512^2 of its pixels (6 of 1024) in a share of the draws."""
    image, label = _corner(32)
    places = [max(32 - top, 0) * max(32 - left, 0) >= 6 for top in range(97) for left in range(97)]
    rng, enough = np.random.default_rng(0), []
    for _ in range(1000):
        view, view_label, valid = rare_view(image, label, 1, RARE, rng)
        np.testing.assert_array_equal(view[..., 0], 200 * view_label)
        assert valid.all()
        enough.append((view_label == 1).sum() >= 6)
    assert np.mean(enough) == pytest.approx(1 - (1 - np.mean(places)) ** 10, abs=0.05)


def test_rare_views_without_enough_have_the_most_of_ten():
    image, label = _corner(2)  # At most 4 pixels: never enough.
    for seed in range(20):
        rng = np.random.default_rng(seed)
        views = [weak_view(image, label, RARE, rng)[1] for _ in range(10)]
        _, view_label, _ = rare_view(image, label, 1, RARE, np.random.default_rng(seed))
        assert (view_label == 1).sum() == max((each == 1).sum() for each in views)


def test_a_rare_view_that_has_enough_at_once_is_the_weak_view():
    image, label = _bands(60, 90)
    for seed in range(5):
        ours = rare_view(image, np.zeros_like(label), 0, RARE, np.random.default_rng(seed))
        expected = weak_view(image, np.zeros_like(label), RARE, np.random.default_rng(seed))
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(one, other)
