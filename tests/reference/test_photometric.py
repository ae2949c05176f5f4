"""The Pillow operations against their definitions."""

import colorsys

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from configs import defaults
from dssn_jax.methods.strong_augment import RANGES
from tests.reference import photometric
from tests.reference.photometric import OPERATIONS, strong_view


@pytest.fixture
def image():
    y, x = np.mgrid[:24, :32]
    noise = np.random.default_rng(0).integers(40, size=(24, 32, 3))
    return (np.stack([y * 8, x * 6, 180 - y * 3 - x], -1) + noise).clip(0, 255).astype(np.uint8)


def _apply(operation, image, *parameter):
    return np.asarray(operation(Image.fromarray(image), *parameter))


def _views(**changes):
    views = defaults.get_config().views
    views.update({"jitter": 0.0, "gray": 0.0, "blur": 0.0, "operations": (0, 0)} | changes)
    return views


def test_gray_is_luma(image):
    luma = image @ np.array([0.299, 0.587, 0.114])
    result = _apply(photometric.gray, image)
    assert (result == result[..., :1]).all()
    assert abs(result[..., 0] - luma).max() <= 0.51


def test_brightness_multiplies(image):
    expected = np.clip(image * 1.4, 0, 255)
    assert abs(_apply(photometric.brightness, image, 1.4) - expected).max() <= 1


def test_contrast_mixes_with_the_mean(image):
    mean = int(_apply(photometric.gray, image)[..., 0].mean() + 0.5)
    expected = np.clip(mean + 0.3 * (image - float(mean)), 0, 255)
    assert abs(_apply(photometric.contrast, image, 0.3) - expected).max() <= 1


def test_color_mixes_with_gray(image):
    gray = _apply(photometric.gray, image).astype(float)
    expected = np.clip(gray + 0.6 * (image - gray), 0, 255)
    assert abs(_apply(photometric.color, image, 0.6) - expected).max() <= 1
    np.testing.assert_array_equal(_apply(photometric.color, image, 0.0), gray)


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_posterize_keeps_high_bits(image, bits):
    step = 2 ** (8 - bits)
    np.testing.assert_array_equal(_apply(photometric.posterize, image, bits), image // step * step)


def test_solarize_inverts_from_threshold(image):
    expected = np.where(image >= 100, 255 - image, image)
    np.testing.assert_array_equal(_apply(photometric.solarize, image, 100), expected)
    np.testing.assert_array_equal(_apply(photometric.solarize, image, 256), image)


def test_autocontrast_and_equalize(image):
    low, high = image.min((0, 1)).astype(float), image.max((0, 1))
    expected = (image - low) * 255 / (high - low)
    assert abs(_apply(photometric.autocontrast, image) - expected).max() <= 1
    np.testing.assert_array_equal(
        _apply(photometric.equalize, image), np.asarray(ImageOps.equalize(Image.fromarray(image)))
    )


def test_blur_and_sharpness_are_those_of_pillow(image):
    picture = Image.fromarray(image)
    expected = np.asarray(picture.filter(ImageFilter.GaussianBlur(1.3)))
    np.testing.assert_array_equal(_apply(photometric.blur, image, 1.3), expected)
    expected = np.asarray(ImageEnhance.Sharpness(picture).enhance(0.2))
    np.testing.assert_array_equal(_apply(photometric.sharpness, image, 0.2), expected)
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    weights = _apply(photometric.blur, point, 2.0)[..., 0].astype(float)
    variance = (weights * (np.arange(41) - 20.0) ** 2).sum() / weights.sum()
    assert abs(np.sqrt(variance) - 2.0) < 0.25


@pytest.mark.parametrize("shift", [-0.5, -0.25, -0.004, 0.0, 0.1, 0.25, 0.5])
def test_hue_rotates_and_wraps(shift):
    """Saturated colors around the circle, against the standard library."""
    hues = np.arange(0, 1, 1 / 48)
    image = np.array([[colorsys.hsv_to_rgb(hue, 0.9, 0.8) for hue in hues]])
    rotated = np.array([[colorsys.hsv_to_rgb((hue + shift) % 1.0, 0.9, 0.8) for hue in hues]])
    result = _apply(photometric.hue, (image * 255).round().astype(np.uint8), shift)
    assert abs(result - rotated * 255).max() <= 12  # Two of the 256 hue levels.


def test_hue_of_red_wraps_exactly():
    red = np.full((1, 1, 3), (255, 0, 0), np.uint8)
    hsv = np.asarray(photometric.hue(Image.fromarray(red), -0.25).convert("HSV"))
    assert abs(int(hsv[0, 0, 0]) - (256 - 63)) <= 1  # int(-0.25 * 255) = -63


def test_no_probability_no_change(image):
    np.testing.assert_array_equal(strong_view(image, _views(), np.random.default_rng(0)), image)


def test_only_gray(image):
    result = strong_view(image, _views(gray=1.0), np.random.default_rng(0))
    np.testing.assert_array_equal(result, _apply(photometric.gray, image))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("blur", 0.1, 2.0),
        ("contrast", 0.05, 0.95),
        ("brightness", 0.05, 0.95),
        ("color", 0.05, 0.95),
        ("sharpness", 0.05, 0.95),
        ("posterize", 4, 8),
        ("solarize", 1, 256),
        ("hue", -0.5, 0.5),
    ],
)
def test_parameter_ranges(name, low, high):
    rng = np.random.default_rng(0)
    values = np.array([OPERATIONS[name][1](rng) for _ in range(4000)])
    assert low <= values.min() <= low + 0.01 * (high - low) and high - 0.01 * (high - low) <= values.max() <= high


def test_all_operations_are_the_eleven():
    names = "identity autocontrast equalize blur contrast brightness color sharpness posterize solarize hue"
    assert set(OPERATIONS) == set(RANGES) == set(names.split())
