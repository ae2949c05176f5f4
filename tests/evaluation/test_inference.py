"""Images of many sizes in one padded batch are predicted as each alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax import models
from dssn_jax.evaluation import inference
from dssn_jax.models.extent import Extent
from dssn_jax.models.resize import resize

SIZES = np.array([(33, 48), (48, 33), (17, 29), (40, 41), (1, 20)])


@pytest.fixture
def setting(tiny_config):
    """(model, variables, images padded to 48x48 with noise, extent) in float64."""
    with jax.enable_x64(True):
        config = tiny_config(model__dtype="float64", model__param_dtype="float64")
        model = models.build(config.model, 6)
        images = jax.random.normal(jax.random.PRNGKey(1), (len(SIZES), 48, 48, 3), jnp.float64)
        variables = jax.jit(model.init)(jax.random.PRNGKey(0), images[:1])
        # Running statistics that are not those of the start, so that zeros outside do not stay zeros.
        variables = {**variables, "batch_stats": jax.tree.map(lambda x: x + 0.3, variables["batch_stats"])}
        yield model, variables, images, Extent(*jnp.asarray(SIZES.T, jnp.int32))


def alone(images, row):
    height, width = SIZES[row]
    return images[row : row + 1, :height, :width]


def test_padded_logits_are_those_of_the_image_alone(setting):
    model, variables, images, extent = setting
    together = jax.jit(lambda x: model.apply(variables, x, extent=extent))(images)
    for row, (height, width) in enumerate(SIZES):
        expected = jax.jit(model.apply)(variables, alone(images, row))
        np.testing.assert_allclose(together[row : row + 1, :height, :width], expected, rtol=1e-9, atol=1e-11)


def window_by_window(model, variables, image, window):
    """The original's loop: windows at the right and bottom edges are cut short."""
    total = np.zeros((*image.shape[1:3], model.num_classes))
    stride = int(window * 2 / 3)
    for y in range(0, image.shape[1], stride):
        for x in range(0, image.shape[2], stride):
            part = (slice(y, y + window), slice(x, x + window))
            total[part] += np.asarray(jax.nn.softmax(model.apply(variables, image[:, *part])))[0]
    return total


def test_sliding_windows_are_those_of_the_original(setting):
    model, variables, images, extent = setting
    found = jax.jit(lambda x: inference.Inference(window=32).scores(model, variables, x, extent))(images)
    row, (height, width) = 3, SIZES[3]
    expected = window_by_window(model, variables, alone(images, row), 32)
    np.testing.assert_allclose(found[row, :height, :width], expected, rtol=1e-9)


def test_flips_and_scales_add_up(setting):
    model, variables, images, extent = setting
    augmented = inference.Inference(flip=True, scales=(1.0, 0.5))
    found = jax.jit(lambda x: augmented.probabilities(model, variables, x, extent))(images)
    row, (height, width) = 3, SIZES[3]
    image, total = alone(images, row), 0
    for size in ((height, width), (height // 2, round(width / 2))):
        seen = resize(image, *size)
        passes = jax.nn.softmax(model.apply(variables, seen))
        passes += jax.nn.softmax(model.apply(variables, seen[:, :, ::-1]))[:, :, ::-1]
        total = total + resize(passes, height, width)
    np.testing.assert_allclose(found[row, :height, :width], total[0] / 4, rtol=1e-9)


def test_probabilities_and_class_maps_agree(setting):
    model, variables, images, extent = setting
    single = inference.Inference()
    probabilities = jax.jit(lambda x: single.probabilities(model, variables, x, extent))(images)
    predicted = jax.jit(lambda x: single.predict(model, variables, x, extent))(images)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-9)
    inside = np.asarray(extent.mask(48, 48))[..., 0]
    np.testing.assert_array_equal(predicted, np.where(inside, probabilities.argmax(-1), 0))


def test_interpolation_within_extents_by_hand():
    x = jnp.arange(20.0).reshape(1, 4, 5, 1)
    small, large = Extent(jnp.array([3]), jnp.array([4])), Extent(jnp.array([5]), jnp.array([7]))
    found = resize(x, 6, 9, small, large)[0, :5, :7]
    np.testing.assert_allclose(found, resize(x[:, :3, :4], 5, 7)[0], rtol=1e-6)
