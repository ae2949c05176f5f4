"""Images of many sizes in one padded batch are predicted as each alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.checks import ConfigError
from dssn_jax import models
from dssn_jax.evaluation import inference
from dssn_jax.evaluation.inference import Inference
from dssn_jax.models.extent import Extent
from dssn_jax.models.resize import resize

SIZES = np.array([(33, 48), (48, 33), (17, 29), (40, 41), (1, 20)])


@pytest.fixture
def setting(tiny_config):
    """(network, variables, images padded to 48x48 with noise, extent) in float64."""
    with jax.enable_x64(True):
        config = tiny_config(model__dtype="float64", model__param_dtype="float64")
        network = models.build(config.model, 6)
        images = jax.random.normal(jax.random.PRNGKey(1), (len(SIZES), 48, 48, 3), jnp.float64)
        variables = jax.jit(network.init)(jax.random.PRNGKey(0), images[:1])
        # Running statistics that are not those of the start, so that zeros outside do not stay zeros.
        variables = {**variables, "batch_stats": jax.tree.map(lambda x: x + 0.3, variables["batch_stats"])}
        yield network, variables, images, Extent(*jnp.asarray(SIZES.T, jnp.int32))


def alone(images, row):
    height, width = SIZES[row]
    return images[row : row + 1, :height, :width]


def test_padded_logits_are_those_of_the_image_alone(setting):
    network, variables, images, extent = setting
    together = jax.jit(lambda x: network.apply(variables, x, extent=extent))(images)
    for row, (height, width) in enumerate(SIZES):
        expected = jax.jit(network.apply)(variables, alone(images, row))
        np.testing.assert_allclose(together[row : row + 1, :height, :width], expected, rtol=1e-9, atol=1e-11)


def window_by_window(network, variables, image, window):
    """The original's loop: windows at the right and bottom edges are cut short."""
    total = np.zeros((*image.shape[1:3], network.num_classes))
    stride = int(window * 2 / 3)
    for y in range(0, image.shape[1], stride):
        for x in range(0, image.shape[2], stride):
            part = (slice(y, y + window), slice(x, x + window))
            total[part] += np.asarray(jax.nn.softmax(network.apply(variables, image[:, *part])))[0]
    return total


def test_sliding_windows_are_those_of_the_original(setting):
    network, variables, images, extent = setting
    windows = Inference(network, window=32)
    scores = jax.jit(lambda x: windows.scores(variables, x, extent))(images)
    row, (height, width) = 3, SIZES[3]
    expected = window_by_window(network, variables, alone(images, row), 32)
    np.testing.assert_allclose(scores[row, :height, :width], expected, rtol=1e-9)


def test_flips_and_scales_add_up(setting):
    network, variables, images, extent = setting
    augmented = Inference(network, flip=True, scales=(1.0, 0.5))
    scores = jax.jit(lambda x: augmented.scores(variables, x, extent))(images)
    row, (height, width) = 3, SIZES[3]
    image, total = alone(images, row), 0
    for size in ((height, width), (height // 2, round(width / 2))):
        scaled = resize(image, *size)
        passes = jax.nn.softmax(network.apply(variables, scaled))
        passes += jax.nn.softmax(network.apply(variables, scaled[:, :, ::-1]))[:, :, ::-1]
        total = total + resize(passes, height, width)
    np.testing.assert_allclose(scores[row, :height, :width], total[0], rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"flip": True}])
def test_class_maps_have_the_largest_probability(setting, options):
    network, variables, images, extent = setting
    one = Inference(network, **options)
    class_maps, confidence = jax.jit(lambda x: one.predict(variables, x, extent))(images)
    scores = np.asarray(jax.jit(lambda x: one.scores(variables, x, extent))(images))
    probabilities = scores / 2 if options else np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    inside = np.asarray(extent.mask(48, 48))[..., 0]
    np.testing.assert_array_equal(class_maps, np.where(inside, scores.argmax(-1), 0))
    np.testing.assert_allclose(confidence[inside], probabilities.max(-1)[inside], rtol=1e-9)


class Unpadded(nn.Module):
    """A network that takes no extent and only sizes that are multiples of 7: the mean color of a pixel, as logits."""

    num_classes, size_multiple, supports_padding, image_dtype = 2, 7, False, jnp.float32

    def __call__(self, images, extent=None):
        assert extent is None and images.shape[1] % 7 == images.shape[2] % 7 == 0
        return jnp.stack([images.mean(-1), -images.mean(-1)], -1)


def test_networks_without_padding_see_the_stretched_image():
    ramp = np.broadcast_to(np.linspace(0, 1, 10)[:, None, None], (10, 13, 3))
    images = np.full((1, 14, 14, 3), 9.0)
    images[0, :10, :13] = ramp
    extent = Extent(jnp.array([10]), jnp.array([13]))
    scores = Inference(Unpadded()).scores({}, jnp.asarray(images), extent)
    np.testing.assert_allclose(scores[0, :10, :13, 0], ramp[..., 0], atol=1e-6)  # Nothing of the padding's 9.
    halved = Inference(Unpadded(), scales=(0.5,)).scores({}, jnp.asarray(images), extent)  # 5 x 6 pixels, in 7 x 7.
    np.testing.assert_allclose(halved[0, :10, :13, 0], 1 / (1 + np.exp(-2 * ramp[..., 0])), atol=0.01)


def test_windows_and_crops_that_do_not_fit_are_refused(tiny_config):
    config = tiny_config(eval__mode="sliding_window", eval__crop=20)
    with pytest.raises(ConfigError, match="is 20; resnet10w16 needs a multiple of 7"):
        inference.from_config(config, Unpadded())
    with pytest.raises(ConfigError, match="config.eval.crop and config.data.crop are 0; config.eval.mode=sliding"):
        inference.from_config(tiny_config(eval__mode="sliding_window", data__crop=0), Unpadded())


def test_interpolation_within_extents_by_hand():
    x = jnp.arange(20.0).reshape(1, 4, 5, 1)
    small, large = Extent(jnp.array([3]), jnp.array([4])), Extent(jnp.array([5]), jnp.array([7]))
    resized = resize(x, 6, 9, small, large)[0, :5, :7]
    np.testing.assert_allclose(resized, resize(x[:, :3, :4], 5, 7)[0], rtol=1e-6)
