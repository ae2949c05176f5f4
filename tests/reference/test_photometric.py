import colorsys

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from tests.reference import photometric
from tests.reference.photometric import OPERATIONS, strong_view


@pytest.fixture
def image():
    y, x = np.mgrid[:24, :32]
    noise = np.random.default_rng(0).integers(40, size=(24, 32, 3))
    return (np.stack([y * 8, x * 6, 180 - y * 3 - x], -1) + noise).clip(0, 255).astype(np.uint8)


def _apply(operation, image, *parameter):
    return np.asarray(operation(Image.fromarray(image), *parameter))


def _views(config, **changes):
    views = config.views
    views.jitter = views.gray = views.blur = 0.0
    views.operations = (0, 0)
    for key, value in changes.items():
        views[key] = value
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


def test_blur_and_sharpness_are_pillows(image):
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
def test_hue_turns_and_wraps(shift):
    """Saturated colors around the circle, against the standard library."""
    hues = np.arange(0, 1, 1 / 48)
    image = np.array([[colorsys.hsv_to_rgb(hue, 0.9, 0.8) for hue in hues]])
    turned = np.array([[colorsys.hsv_to_rgb((hue + shift) % 1.0, 0.9, 0.8) for hue in hues]])
    result = _apply(photometric.hue, (image * 255).round().astype(np.uint8), shift)
    assert abs(result - turned * 255).max() <= 12  # Two of the 256 steps of hue.


def test_hue_of_red_wraps_exactly():
    red = np.full((1, 1, 3), (255, 0, 0), np.uint8)
    hsv = np.asarray(photometric.hue(Image.fromarray(red), -0.25).convert("HSV"))
    assert abs(int(hsv[0, 0, 0]) - (256 - 63)) <= 1  # int(-0.25 * 255) = -63


def test_no_probability_no_change(image, config):
    np.testing.assert_array_equal(strong_view(image, _views(config), np.random.default_rng(0)), image)


def test_only_gray(image, config):
    result = strong_view(image, _views(config, gray=1.0), np.random.default_rng(0))
    np.testing.assert_array_equal(result, _apply(photometric.gray, image))


@pytest.mark.parametrize(("key", "probability"), [("jitter", 0.8), ("gray", 0.2), ("blur", 0.5)])
def test_probabilities(image, config, key, probability):
    views = _views(config, **{key: probability})
    rng = np.random.default_rng(0)
    changed = sum((strong_view(image, views, rng) != image).any() for _ in range(2000))
    assert abs(changed / 2000 - probability) < 5 * np.sqrt(probability * (1 - probability) / 2000)


def test_jitter_ranges(image, config):
    """With brightness alone, the factor shows in the mean: U[0.5, 1.5] of the configuration."""
    dark = image // 2  # Nothing is clipped.
    views = _views(config, jitter=1.0, contrast=0.0, saturation=0.0, hue=0.0)
    rng = np.random.default_rng(0)
    factors = np.array([strong_view(dark, views, rng).mean() / dark.mean() for _ in range(1000)])
    assert 0.48 < factors.min() < 0.52 and 1.48 < factors.max() < 1.52
    assert abs(factors.mean() - 1.0) < 0.05


def test_jitter_order_is_random(monkeypatch):
    """All 24 orders of the four steps come, equally often."""
    orders = []
    for name in ("brightness", "contrast", "color", "hue"):
        monkeypatch.setattr(photometric, name, lambda picture, _, name=name: orders[-1].append(name))
    rng = np.random.default_rng(0)
    for _ in range(2400):
        orders.append([])
        photometric.color_jitter(None, 0.5, 0.5, 0.5, 0.25, rng)
    kinds, counts = np.unique(np.array(orders), axis=0, return_counts=True)
    assert len(kinds) == 24 and abs(counts - 100).max() < 5 * 10


def test_operations_are_drawn_evenly_with_replacement(image, config, monkeypatch):
    drawn = []
    spies = tuple(
        (lambda picture, _, name=name: drawn[-1].append(name) or picture, parameter)
        for name, (_, parameter) in OPERATIONS.items()
    )
    monkeypatch.setattr(photometric, "_OPERATION_LIST", spies)
    views = _views(config, operations=(1, 3))
    rng = np.random.default_rng(0)
    for _ in range(3300):
        drawn.append([])
        strong_view(image, views, rng)
    counts = np.bincount([len(names) for names in drawn], minlength=4)
    assert counts[0] == 0 and abs(counts[1:] - 1100).max() < 5 * np.sqrt(1100)
    each = np.unique(sum(drawn, []), return_counts=True)[1]
    assert len(each) == 11 and abs(each - 600).max() < 5 * np.sqrt(600)
    assert any(len(set(names)) < len(names) for names in drawn)


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


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_size_and_mode(image, name):
    operation, parameter = OPERATIONS[name]
    result = operation(Image.fromarray(image), parameter(np.random.default_rng(0)))
    assert result.size == (32, 24) and result.mode == "RGB"


def test_all_operations_are_the_eleven():
    names = "identity autocontrast equalize blur contrast brightness color sharpness posterize solarize hue"
    assert set(OPERATIONS) == set(names.split())


def test_strong_view_is_its_generators(image, config):
    config.views.jitter = config.views.blur = 0.5
    config.views.operations = (1, 3)
    first, again, other = (strong_view(image, config.views, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.dtype == np.uint8 and first.shape == image.shape and first.flags.writeable
