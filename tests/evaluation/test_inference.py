"""Images of many sizes in one padded batch are predicted as each alone."""

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


@pytest.fixture(scope="module")
def exact_setting(tiny_config):
    """(network, variables, images padded to 48x48 with noise, extent) in float64."""
    with jax.enable_x64(True):
        config = tiny_config(model__dtype="float64", model__param_dtype="float64")
        network = models.build(config.model, 6)
        images = jax.random.normal(jax.random.PRNGKey(1), (len(SIZES), 48, 48, 3), jnp.float64)
        variables = jax.jit(network.init)(jax.random.PRNGKey(0), images[:1])
        # Running statistics that are not those of the start, so that zeros outside do not stay zeros.
        variables = {**variables, "batch_stats": jax.tree.map(lambda x: x + 0.3, variables["batch_stats"])}
        return network, variables, images, Extent(*jnp.asarray(SIZES.T, jnp.int32))


@pytest.fixture
def setting(exact_setting):
    """`exact_setting`, for computations in float64."""
    with jax.enable_x64(True):
        yield exact_setting


def alone(images, row):
    height, width = SIZES[row]
    return images[row : row + 1, :height, :width]


@pytest.mark.slow
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
    apply = jax.jit(network.apply)
    for y in range(0, image.shape[1], stride):
        for x in range(0, image.shape[2], stride):
            part = (slice(y, y + window), slice(x, x + window))
            total[part] += np.asarray(jax.nn.softmax(apply(variables, image[:, *part])))[0]
    return total


def test_sliding_windows_are_those_of_the_original(setting):
    network, variables, images, extent = setting
    windows = Inference(network, window=32)
    scores = jax.jit(lambda x: windows.scores(variables, x, extent))(images)
    row, (height, width) = 3, SIZES[3]
    expected = window_by_window(network, variables, alone(images, row), 32)
    np.testing.assert_allclose(scores[row, :height, :width], expected, rtol=1e-9)


@pytest.mark.slow
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


def moved_window_by_window(predict, image, window):
    """UniMatch V2's loop, which ends where a window touches the edge; an image smaller than a window is one.

    Maps an image [H, W, 3] to summed probabilities; `predict` maps a window of any size to its probabilities.
    """
    total, stride = 0.0, int(window * 2 / 3)
    height, width = image.shape[:2]
    row = 0
    while True:
        column = 0
        while True:
            part = (slice(row, row + window), slice(column, column + window))
            probabilities = predict(image[part])
            total = np.zeros((height, width, probabilities.shape[-1])) if row == column == 0 else total
            total[part] += probabilities
            if column + window >= width:
                break
            column = min(column + stride, width - window)
        if row + window >= height:
            return total
        row = min(row + stride, height - window)


@pytest.mark.slow
def test_windows_that_are_moved_inside(setting):
    network, variables, images, extent = setting
    windows = Inference(network, window=32, windows="inside")
    scores = jax.jit(lambda x: windows.scores(variables, x, extent))(images)
    apply = jax.jit(network.apply)
    for row in (2, 3):  # Smaller than a window, and larger.
        height, width = SIZES[row]
        image = np.asarray(alone(images, row))[0]
        expected = moved_window_by_window(lambda part: softmax(np.asarray(apply(variables, part[None])))[0], image, 32)
        np.testing.assert_allclose(scores[row, :height, :width], expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("side", "starts"), [(1024, [0, 226]), (2048, [0, 532, 1064, 1250]), (798, [0]), (799, [0, 1])]
)
def test_windows_of_cityscapes(side, starts):
    """UniMatch V2's windows of 798 pixels in its images of 1024 x 2048, and at the limits."""
    one = Inference(Patches(), window=798, windows="inside")
    assert one._window_count(side) == len(starts)
    spans = [one._window_span(np.array([side]), number) for number in range(len(starts) + 1)]
    assert [int(start[0]) for start, _ in spans[:-1]] == starts
    assert [int(length[0]) for _, length in spans] == [798] * len(starts) + [0]


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


def test_windows_and_crops_that_do_not_fit_are_refused(tiny_config):
    config, network = tiny_config(eval__mode="sliding_window", eval__crop=20), Patches(supports_padding=False)
    with pytest.raises(ConfigError, match="is 20; resnet10w16 needs a multiple of 7: 14 or 21"):
        inference.from_config(config, network)
    config.eval.crop = 21
    with pytest.raises(ConfigError, match="config.eval.windows is 'cut'.*supports no padding and needs 'inside'"):
        inference.from_config(config, network)
    config.eval.windows = "inside"
    assert inference.from_config(config, network).windows == "inside"
    with pytest.raises(ConfigError, match="config.eval.crop and config.data.crop are 0; config.eval.mode=sliding"):
        inference.from_config(tiny_config(eval__mode="sliding_window", data__crop=0), network)


def test_interpolation_within_extents_by_hand():
    x = jnp.arange(20.0).reshape(1, 4, 5, 1)
    small, large = Extent(jnp.array([3]), jnp.array([4])), Extent(jnp.array([5]), jnp.array([7]))
    resized = resize(x, 6, 9, small, large)[0, :5, :7]
    np.testing.assert_allclose(resized, resize(x[:, :3, :4], 5, 7)[0], rtol=1e-6)


class Patches:
    """A network of 7 x 7 patches. Its logits depend on all of the image, on its size and on the place of the patch."""

    num_classes, size_multiple, image_dtype = 3, 7, jnp.float64

    def __init__(self, supports_padding=True):
        self.supports_padding = supports_padding

    def apply(self, variables, images, extent=None):
        """Maps images [B, H, W, 3] to logits [B, H, W, 3]; takes no extent if it does not support padding."""
        assert self.supports_padding or extent is None
        patches = images.reshape(len(images), images.shape[1] // 7, 7, images.shape[2] // 7, 7, 3).mean((2, 4, 5))
        if extent is None:
            extent = Extent(*(jnp.full(len(images), side) for side in images.shape[1:3]))
        height, width = (side[:, None, None] // 7 for side in extent)
        rows, columns = jnp.arange(patches.shape[1])[:, None], jnp.arange(patches.shape[2])
        mean = jnp.where((rows < height) & (columns < width), patches, 0).sum((1, 2), keepdims=True) / (height * width)
        logits = [patches * (1 + rows / height), columns / width - patches, jnp.broadcast_to(mean, patches.shape)]
        return 3 * jnp.stack(logits, -1).repeat(7, 1).repeat(7, 2)


def patches_alone(image):
    """`Patches` for one image [H, W, 3] whose sides are multiples of 7, in NumPy."""
    height, width = (side // 7 for side in image.shape[:2])
    patches = image.reshape(height, 7, width, 7, 3).mean((1, 3, 4))
    rows, columns = np.mgrid[:height, :width]
    logits = [patches * (1 + rows / height), columns / width - patches, np.full_like(patches, patches.mean())]
    return 3 * np.stack(logits, -1).repeat(7, 0).repeat(7, 1)


def interpolate(image, size):
    """Resizes [H, W, C] with PyTorch."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    x = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=True)
    return x[0].permute(1, 2, 0).numpy()


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def rounded_alone(image):
    """UniMatch V2's evaluation of a whole image (its `evaluate`): logits at the size of the image."""
    size = image.shape[:2]
    return interpolate(patches_alone(interpolate(image, [max(7, int(side / 7 + 0.5) * 7) for side in size])), size)


def probabilities_alone(image):
    return softmax(rounded_alone(image))


def augmented_alone(image):
    """The image and its mirror image, at its size and at 0.6 times of it, for which it is resized only once."""
    size = image.shape[:2]
    total = probabilities_alone(image) + probabilities_alone(image[:, ::-1])[:, ::-1]
    scaled = interpolate(image, [max(7, int(round(0.6 * side) / 7 + 0.5) * 7) for side in size])
    passes = softmax(patches_alone(scaled)) + softmax(patches_alone(scaled[:, ::-1]))[:, ::-1]
    return total + interpolate(passes, size)


PASSES = {
    "whole": ({}, rounded_alone),
    "windows": (
        {"window": 21, "windows": "inside"},
        lambda image: moved_window_by_window(probabilities_alone, image, 21),
    ),
    "augmented": ({"flip": True, "scales": (1.0, 0.6)}, augmented_alone),
}


@pytest.mark.parametrize("name", PASSES)
def test_sizes_are_rounded_to_patches_for_each_image_of_a_batch(name):
    """As a loop over the images; one image is smaller than a patch, another than a window, and one row is empty."""
    sizes = [(33, 48), (10, 13), (61, 20), (28, 28), (3, 40), (24, 25), (0, 0)]
    options, expected = PASSES[name]
    with jax.enable_x64(True):
        images = np.random.default_rng(0).normal(size=(len(sizes), 61, 48, 3))
        extent = Extent(*jnp.asarray(np.array(sizes).T, jnp.int32))
        scores = np.asarray(jax.jit(Inference(Patches(), **options).scores)({}, images, extent))
    assert np.isfinite(scores).all()
    for row, (height, width) in enumerate(sizes[:-1]):
        np.testing.assert_allclose(
            scores[row, :height, :width], expected(images[row, :height, :width]), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("size", [(33, 48), (10, 24)])
def test_networks_without_padding_take_images_of_one_size(name, size):
    options, expected = PASSES[name]
    with jax.enable_x64(True):
        images = np.random.default_rng(0).normal(size=(3, *size, 3))
        extent = Extent(*jnp.array([[size[0], size[0], 0], [size[1], size[1], 0]], jnp.int32))
        network = Patches(supports_padding=False)
        scores = np.asarray(jax.jit(Inference(network, **options).scores)({}, images, extent))
    for row in range(2):
        np.testing.assert_allclose(scores[row], expected(images[row]), rtol=1e-10, atol=1e-12)
