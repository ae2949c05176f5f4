"""Pixels by class, and draws by rarity against their probabilities."""

import numpy as np
import pytest
from PIL import Image

from input_pipeline import class_statistics
from input_pipeline.class_names import SHAPES_CLASSES
from input_pipeline.class_statistics import RareClasses
from input_pipeline.errors import DataError
from input_pipeline.sources.open import open_source


def test_pixels_are_counted_once(folder, config):
    """Masks of 16x16 with one class each; in one of them a row is ignored and two are of another class."""
    mask = np.full((16, 16), 1, np.uint8)
    mask[0], mask[1:3] = 255, 2
    Image.fromarray(mask).save(folder / "masks/1.png")
    source, done = open_source(config, "labeled"), []
    expected = [[256, 0, 0], [0, 208, 32], [0, 0, 256]]
    np.testing.assert_array_equal(class_statistics.count_pixels(source, config.data, done.append), expected)
    (folder / "masks/1.png").unlink()
    np.testing.assert_array_equal(class_statistics.count_pixels(source, config.data, done.append), expected)
    assert done == [1, 2, 3]
    np.testing.assert_allclose(class_statistics.frequencies((256, 208, 288)), np.array([256, 208, 288]) / 752)


def test_generated_labels_are_counted(config):
    config.data.update({"source": "shapes", "classes": SHAPES_CLASSES})
    source = open_source(config, "labeled")
    expected = [np.bincount(source[index]["label"].ravel(), minlength=6) for index in range(len(source))]
    np.testing.assert_array_equal(class_statistics.count_pixels(source, config.data), expected)


def test_masks_that_cannot_be_counted(folder, config):
    source = open_source(config, "labeled")
    for number in range(3):
        Image.fromarray(np.full((16, 16), 255, np.uint8)).save(folder / f"masks/{number}.png")
    with pytest.raises(DataError, match="every pixel of the 3 labeled masks is ignored"):
        class_statistics.count_pixels(source, config.data)
    for number in range(2):
        Image.fromarray(np.full((16, 16), 99, np.uint8)).save(folder / f"masks/{number}.png")
    with pytest.raises(DataError, match=r"masks/0\.png: mask values 99 found.*masks/1\.png: mask values 99"):
        class_statistics.count_pixels(open_source(config, "labeled"), config.data)


def test_draws_have_the_probabilities_of_the_equation():
    """Eq. 24, and two draws without replacement: P(a, b) = P(a) P(b) / (1 - P(a))."""
    frequencies, temperature = np.array([0.5, 0.3, 0.15, 0.05]), 0.2
    rare = RareClasses((1 - frequencies) / temperature, ())
    p = np.exp((1 - frequencies) / temperature)
    p[1] = 0  # A class that is not present.
    p /= p.sum()
    rng, present = np.random.default_rng(0), np.array([True, False, True, True])
    drawn = np.array([rare.draw(present, 2, rng) for _ in range(20000)])
    np.testing.assert_allclose(np.bincount(drawn[:, 0], minlength=4) / 20000, p, atol=0.015)
    for a, b in ((0, 2), (0, 3), (2, 3), (3, 0)):
        share = np.mean((drawn == (a, b)).all(1))
        assert share == pytest.approx(p[a] * p[b] / (1 - p[a]), abs=0.015)
    assert sorted(rare.draw(present, 9, rng)) == [0, 2, 3] and len(rare.draw(~present, 3, rng)) == 1
    assert len(rare.draw(np.zeros(4, bool), 3, rng)) == 0


def test_no_probability_underflows():
    rare = RareClasses((1 - np.array([0.999999, 1e-6])) / 1e-4, ())
    draws = [rare.draw(np.array([True, True]), 2, np.random.default_rng(seed)).tolist() for seed in range(50)]
    assert draws == [[1, 0]] * 50


def test_images_are_drawn_uniformly_from_those_that_have_the_class():
    """A class without an image is never drawn, however rare."""
    images = (np.array([0, 1, 2, 3]), np.array([3, 5]), np.array([], int))
    rare, rng = RareClasses(np.array([0.0, 1.0, 9.0]), images), np.random.default_rng(0)
    drawn = [rare.draw_image(rng) for _ in range(8000)]
    p = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    for image, wanted, expected in ((0, 0, p[0] / 4), (3, 0, p[0] / 4), (3, 1, p[1] / 2), (5, 1, p[1] / 2)):
        assert drawn.count((image, wanted)) / 8000 == pytest.approx(expected, abs=0.02)
