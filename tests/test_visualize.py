import numpy as np

from dssn_jax import visualize as pictures


def test_palette_is_that_of_voc():
    colors = pictures.palette(21)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 3: (128, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    for index, color in known.items():
        assert tuple(colors[index]) == color


def test_ignored_pixels_have_the_color_of_void():
    colored = pictures.colorize(np.array([[0, 1, 255]]), 2)
    assert tuple(colored[0, 2]) == pictures.IGNORED and tuple(colored[0, 1]) == (128, 0, 0)


def test_overlay_blends():
    image = np.full((1, 1, 3), 100, np.uint8)
    assert tuple(pictures.overlay(image, np.array([[1]]), 2, opacity=0.5)[0, 0]) == (114, 50, 50)


def test_panel_lays_columns_side_by_side():
    red = np.zeros((3, 4, 5, 3), np.uint8)
    picture = pictures.panel(red, pictures.mask(np.ones((3, 4, 5), bool)))
    assert picture.shape == (3 * (4 + pictures.GAP), 2 * (5 + pictures.GAP), 3)
    assert picture[0, 0].max() == 0 and picture[0, 5 + pictures.GAP].min() == 255
