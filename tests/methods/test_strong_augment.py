"""Strong views on the device against Pillow's on the host: each operation, the draws, and the views of both."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import pascal
from dssn_jax import sharding
from dssn_jax.methods import strong_augment as augment
from tests.reference import photometric

OPERATIONS = {operation.__name__: operation for operation in (*augment.OPERATIONS, augment.gray)}
RECIPE = augment.from_config(pascal.get_config().views)


@pytest.fixture(scope="module")
def images():
    """A smooth image with noise, noise, one color, black and white, and two levels a channel: uint8 [5, 24, 32, 3]."""
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
    """To the level, but for those whose products Pillow cuts off in float: one level at a few pixels."""
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
    found = jax.jit(augment.hue)(colors[None], jnp.array([-0.37]))[0]
    np.testing.assert_array_equal(found, photometric.hue(Image.fromarray(colors), -0.37))


def test_both_histograms_count(images):
    channels = jnp.asarray(images.reshape(5, -1, 3))
    expected = [[np.bincount(channel, minlength=256) for channel in image.reshape(-1, 3).T] for image in images]
    np.testing.assert_array_equal(augment._histogram_by_increments(channels), expected)
    np.testing.assert_array_equal(augment._histogram_by_product(channels), expected)


@pytest.fixture(scope="module")
def drawn():
    return jax.device_get(jax.jit(lambda key: augment.draw(key, 6000, RECIPE))(jax.random.PRNGKey(0)))


def test_probabilities(drawn):
    for found, probability in ((drawn.jitter, 0.8), (drawn.gray, 0.2), (drawn.sigma > 0, 0.5)):
        assert abs(found.mean() - probability) < 5 * np.sqrt(probability * (1 - probability) / 6000)


def assert_uniform(values, low, high):
    """Bounds, mean and variance of U[low, high]."""
    span = high - low
    assert low <= values.min() < low + 0.02 * span and high - 0.02 * span < values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 5 * span / np.sqrt(12 * len(values))
    assert abs(values.var() - span**2 / 12) < 5 * span**2 / np.sqrt(180 * len(values))


def test_jitter_is_drawn_as_on_the_host(drawn):
    spans = dict(zip(("brightness", "contrast", "color", "hue"), 3 * [(0.5, 1.5)] + [(-0.25, 0.25)], strict=True))
    for factor, operation in zip(drawn.factors.T, augment.JITTER, strict=True):
        assert_uniform(factor, *spans[operation.__name__])
    assert_uniform(drawn.sigma[drawn.sigma > 0], 0.1, 2.0)
    orders, counts = np.unique(drawn.order, axis=0, return_counts=True)
    assert len(orders) == 24 and abs(counts - 250).max() < 5 * np.sqrt(250)


def test_operations_are_drawn_as_on_the_host(drawn):
    """1 to 3 of 11, with replacement; `identity` also stands for none, so the number shows in the others."""
    assert drawn.operations.shape == (6000, 3)
    for place, share in enumerate((1, 2 / 3, 1 / 3)):
        counts = np.bincount(drawn.operations[:, place], minlength=11)[1:]
        assert abs(counts - 6000 * share / 11).max() < 5 * np.sqrt(6000 * share / 11)
    for index, operation in enumerate(augment.OPERATIONS):
        span = photometric.RANGES[operation.__name__]
        values = drawn.parameters[drawn.operations == index]
        if span and isinstance(span[0], int):
            assert set(values) <= set(range(span[0], span[1] + 1))
            assert_uniform(
                values + np.random.default_rng(0).uniform(-0.5, 0.5, len(values)), span[0] - 0.5, span[1] + 0.5
            )
        elif span:
            assert_uniform(values, *span)


def test_views_of_both_paths_are_alike(images):
    """Mean and spread, over views, of the mean level, of its contrast and of the distance of neighbors."""
    views, rng = pascal.get_config().views, np.random.default_rng(0)
    image = images[0]
    host = np.stack([photometric.strong_view(image, views, rng) for _ in range(800)])
    batch = jnp.broadcast_to(image, (800, *image.shape))
    make = jax.jit(lambda key: augment.strong_views(batch, augment.draw(key, 800, RECIPE), RECIPE))
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
    boxes = np.zeros((len(images), 4), np.int32)
    return {"image_x": images, "image_u": images, "image_m": images[::-1].copy(), "box1": boxes, "box2": boxes}


def test_views_do_not_depend_on_the_number_of_devices():
    """And no device asks another for anything."""
    images = np.random.default_rng(0).integers(256, size=(8, 16, 16, 3), dtype=np.uint8)
    found = []
    for devices in (1, 4):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        batch = sharding.put_batch(batch_of(images), mesh)
        add = jax.jit(lambda batch, rng, step: augment.add_strong_views(batch, RECIPE, rng, step))
        add = add.lower(batch, jax.random.PRNGKey(3), jnp.int32(5)).compile()
        text = add.as_text()
        assert not any(name in text for name in ("all-to-all", "all-gather", "collective-permute", "all-reduce"))
        found.append(jax.device_get(add(batch, jax.random.PRNGKey(3), jnp.int32(5))))
    jax.tree.map(np.testing.assert_array_equal, *found)
    added = set(found[0]) - set(batch)
    assert added == {"image_s1", "image_s2", "image_m1", "image_m2"}
    for one, other in itertools.combinations(added, 2):  # Each view has its own draws.
        assert (found[0][one] != found[0][other]).any()


def test_a_deviation_of_whole_numbers_is_still_drawn_from_all():
    views = pascal.get_config().views
    views.blur_sigma = (1, 2)
    sigma = augment.draw(jax.random.PRNGKey(0), 100, augment.from_config(views)).sigma
    assert len(np.unique(sigma)) > 20


def test_only_batches_that_lack_views_get_them(images):
    batch = batch_of(images)
    assert augment.add_strong_views(batch, None, jax.random.PRNGKey(0), 0) is batch
    supervised = {"image_x": images}
    assert augment.add_strong_views(supervised, RECIPE, jax.random.PRNGKey(0), 0) is supervised
    views = pascal.get_config().views
    views.device = False
    assert augment.from_config(views) is None
