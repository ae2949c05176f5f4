import numpy as np

from dssn_jax import visualize


def test_voc_palette():
    colors = visualize.palette(21)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 3: (128, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    for index, color in known.items():
        assert tuple(colors[index]) == color


def test_color_of_ignored_pixels():
    colored = visualize.colorize(np.array([[0, 1, 255]]), 2)
    assert tuple(colored[0, 2]) == visualize.IGNORED and tuple(colored[0, 1]) == (128, 0, 0)


def test_overlay_blends():
    image = np.full((1, 1, 3), 100, np.uint8)
    assert tuple(visualize.overlay(image, np.array([[1]]), 2, opacity=0.5)[0, 0]) == (114, 50, 50)


def test_weights_are_gray():
    gray = visualize.mask(np.array([[0, 0.2, 1]], np.float32))
    np.testing.assert_array_equal(gray, [[[0] * 3, [51] * 3, [255] * 3]])


def test_panel_joins_columns():
    red = np.zeros((3, 4, 5, 3), np.uint8)
    picture = visualize.panel(red, visualize.mask(np.ones((3, 4, 5), bool)))
    assert picture.shape == (3 * (4 + visualize.GAP), 2 * (5 + visualize.GAP), 3)
    assert picture[0, 0].max() == 0 and picture[0, 5 + visualize.GAP].min() == 255
