"""Strong views on the device against the Pillow oracle: each operation, the draws, and statistics of the views."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import pascal
from dssn_jax import sharding
from dssn_jax.methods import strong_augment
from input_pipeline.batch import Batch
from tests.reference import photometric

OPERATIONS = {**strong_augment.OPERATIONS, "gray": strong_augment.gray}
AUGMENT = strong_augment.from_config(pascal.get_config().views)


@pytest.fixture(scope="module")
def images():
    """Smooth with noise, noise, one color, black and white, two levels per channel: uint8 [5, 24, 32, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:24, :32]
    smooth = np.stack([y * 8, x * 6, 180 - y * 3 - x], -1) + rng.integers(40, size=(24, 32, 3))
    noise = rng.integers(256, size=(24, 32, 3))
    black_and_white = rng.integers(2, size=(24, 32, 3)) * 255
    return (
        np.stack([smooth, noise, noise * 0 + [3, 200, 77], black_and_white, 90 + noise % 2]).clip(0, 255).astype("u1")
    )


def by_pillow(name, image, parameter):
    operation = getattr(photometric, name)
    picture = Image.fromarray(image)
    return np.asarray(operation(picture) if name == "gray" else operation(picture, parameter))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(images, name):
    """Exact, except where Pillow truncates float products: one level at a few pixels."""
    span = photometric.RANGES.get(name)
    apply = jax.jit(OPERATIONS[name])
    for fraction in (0.0, 0.13, 0.5, 0.77, 1.0):
        parameter = 0.0
        if span:
            parameter = span[0] + fraction * (span[1] - span[0])
            parameter = round(parameter) if isinstance(span[0], int) else round(parameter * 2**20) / 2**20
        expected = np.stack([by_pillow(name, image, parameter) for image in images]).astype(int)
        found = apply(images, jnp.full(len(images), parameter, jnp.float32))
        assert found.dtype == jnp.uint8
        rounding = name in ("autocontrast", "brightness", "contrast", "color", "sharpness")
        difference = abs(found - expected)
        assert difference.max() <= rounding and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("name", ["brightness", "contrast", "color"])
def test_factors_of_the_jitter_are_pillows(images, name):
    """Factors over 1, which clip."""
    for factor in (1.0, 1.25, 1.5):
        expected = np.stack([by_pillow(name, image, factor) for image in images]).astype(int)
        assert abs(jax.jit(OPERATIONS[name])(images, jnp.full(5, factor)) - expected).max() <= 1


def test_hue_of_all_colors():
    levels = np.arange(0, 256, 3, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(86, -1, 3)
    found = jax.jit(strong_augment.hue)(colors[None], jnp.array([-0.37]))[0]
    np.testing.assert_array_equal(found, photometric.hue(Image.fromarray(colors), -0.37))


def test_both_histograms_count(images):
    channels = jnp.asarray(images.reshape(5, -1, 3))
    expected = [[np.bincount(channel, minlength=256) for channel in image.reshape(-1, 3).T] for image in images]
    np.testing.assert_array_equal(strong_augment._histogram_by_increments(channels), expected)
    np.testing.assert_array_equal(strong_augment._histogram_by_product(channels), expected)


@pytest.fixture(scope="module")
def drawn():
    return jax.device_get(jax.jit(lambda key: strong_augment.draw(key, 6000, AUGMENT))(jax.random.PRNGKey(0)))


def test_probabilities(drawn):
    for found, probability in ((drawn.jitter, 0.8), (drawn.gray, 0.2), (drawn.sigma > 0, 0.5)):
        assert abs(found.mean() - probability) < 5 * np.sqrt(probability * (1 - probability) / 6000)


def assert_uniform(values, low, high):
    """Bounds, mean and variance of U[low, high]."""
    span = high - low
    assert low <= values.min() < low + 0.02 * span and high - 0.02 * span < values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 5 * span / np.sqrt(12 * len(values))
    assert abs(values.var() - span**2 / 12) < 5 * span**2 / np.sqrt(180 * len(values))


def test_jitter_is_drawn_from_its_ranges(drawn):
    spans = dict(zip(("brightness", "contrast", "color", "hue"), 3 * [(0.5, 1.5)] + [(-0.25, 0.25)], strict=True))
    for factor, operation in zip(drawn.factors.T, strong_augment.JITTER, strict=True):
        assert_uniform(factor, *spans[operation.__name__])
    assert_uniform(drawn.sigma[drawn.sigma > 0], 0.1, 2.0)
    orders, counts = np.unique(drawn.order, axis=0, return_counts=True)
    assert len(orders) == 24 and abs(counts - 250).max() < 5 * np.sqrt(250)


def test_operations_are_drawn_from_their_ranges(drawn):
    """1 to 3 of 11, with replacement; `identity` also stands for none, so the count shows in the others."""
    assert drawn.operations.shape == (6000, 3)
    for place, share in enumerate((1, 2 / 3, 1 / 3)):
        counts = np.bincount(drawn.operations[:, place], minlength=11)[1:]
        assert abs(counts - 6000 * share / 11).max() < 5 * np.sqrt(6000 * share / 11)
    for index, name in enumerate(strong_augment.OPERATIONS):
        span = photometric.RANGES[name]
        values = drawn.parameters[drawn.operations == index]
        if span and isinstance(span[0], int):
            assert set(values) <= set(range(span[0], span[1] + 1))
            assert_uniform(
                values + np.random.default_rng(0).uniform(-0.5, 0.5, len(values)), span[0] - 0.5, span[1] + 0.5
            )
        elif span:
            assert_uniform(values, *span)


@pytest.mark.slow
def test_views_have_the_statistics_of_pillows(images):
    """Mean and spread, over views, of the mean level, of its contrast and of the distance of neighbors."""
    views, rng = pascal.get_config().views, np.random.default_rng(0)
    image = images[0]
    host = np.stack([photometric.strong_view(image, views, rng) for _ in range(800)])
    batch = jnp.broadcast_to(image, (800, *image.shape))
    make = jax.jit(lambda key: strong_augment.apply(batch, strong_augment.draw(key, 800, AUGMENT), AUGMENT))
    device = np.asarray(make(jax.random.PRNGKey(1)))
    for statistic in (
        lambda view: view.mean((1, 2, 3)),
        lambda view: view.std((1, 2, 3)),
        lambda view: abs(np.diff(view.astype(float), axis=2)).mean((1, 2, 3)),
        lambda view: abs(np.diff(view.astype(float), axis=3)).mean((1, 2, 3)),
    ):
        one, other = statistic(host), statistic(device)
        assert abs(one.mean() - other.mean()) < 5 * np.hypot(one.std(), other.std()) / np.sqrt(800)
        assert 0.85 < one.std() / other.std() < 1.18


def batch_of(images):
    boxes = np.zeros((len(images), 2, 4), np.int32)
    labels, valid = np.zeros(images.shape[:3], np.uint8), np.ones(images.shape[:3], bool)
    return Batch(images, labels, images, valid, images[::-1].copy(), valid, boxes)


@pytest.mark.slow
def test_views_do_not_depend_on_the_number_of_devices():
    """And no device communicates with another."""
    images = np.random.default_rng(0).integers(256, size=(8, 16, 16, 3), dtype=np.uint8)
    key, views = jax.random.PRNGKey(3), []
    for devices in (1, 4):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        batch = sharding.put_batch(batch_of(images), mesh)
        draw = jax.jit(lambda batch, key: strong_augment.strong_views(batch, AUGMENT, key)).lower(batch, key).compile()
        text = draw.as_text()
        assert not any(name in text for name in ("all-to-all", "all-gather", "collective-permute", "all-reduce"))
        views.append(jax.device_get(draw(batch, key)))
    np.testing.assert_array_equal(*views)
    assert views[0].shape == (8, 2, 2, 16, 16, 3)
    for one, other in itertools.combinations(views[0].reshape(8, 4, -1).swapaxes(0, 1), 2):
        assert (one != other).any()  # Each view has its own draws.


def test_views_keep_their_place():
    """Without any augmentation, [:, v, 0] are the images and [:, v, 1] their partners."""
    images = np.random.default_rng(0).integers(256, size=(4, 8, 8, 3), dtype=np.uint8)
    batch, nothing = batch_of(images), strong_augment.StrongAugment(0, 0, 0, 0, 0, 0, 0, (0.1, 2.0), (0, 0))
    views = strong_augment.strong_views(batch, nothing, jax.random.PRNGKey(0))
    for i in range(2):
        np.testing.assert_array_equal(views[:, i, 0], batch.image_u)
        np.testing.assert_array_equal(views[:, i, 1], batch.image_m)


@pytest.mark.slow
def test_reversed_partners_are_not_augmented():
    """One view an image and box; those of the images are no others than the batch's."""
    images = np.random.default_rng(0).integers(256, size=(4, 8, 8, 3), dtype=np.uint8)
    batch = batch_of(images)._replace(image_m=None, valid_m=None)
    nothing = strong_augment.StrongAugment(0, 0, 0, 0, 0, 0, 0, (0.1, 2.0), (0, 0))
    views = strong_augment.strong_views(batch, nothing, jax.random.PRNGKey(0))
    np.testing.assert_array_equal(views, np.broadcast_to(images[:, None, None], (4, 2, 1, 8, 8, 3)))


def test_integer_bounds_of_the_blur_still_give_fractions():
    views = pascal.get_config().views
    views.blur_sigma = (1, 2)
    sigma = strong_augment.draw(jax.random.PRNGKey(0), 100, strong_augment.from_config(views)).sigma
    assert len(np.unique(sigma)) > 20


def test_a_batch_without_boxes_has_no_strong_views(images):
    batch = Batch(images, np.zeros(images.shape[:3], np.uint8))
    assert strong_augment.strong_views(batch, AUGMENT, jax.random.PRNGKey(0)) is None
