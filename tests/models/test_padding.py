"""Images of many sizes in a padded batch get the logits of each image alone, in float64.

Those of convolutional networks are compared with PyTorch's. The parts of transformers have their own tests against
PyTorch; here the whole network is compared with itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dssn_jax import models  # noqa: E402
from dssn_jax.models.extent import Extent  # noqa: E402
from dssn_jax.weights import names  # noqa: E402
from tests.reference import torch_twin  # noqa: E402
from tests.weights import tensors  # noqa: E402

SIZES = np.array([(48, 33), (9, 48), (17, 29), (40, 41)])  # Height and width.
CLASSES = 19


@pytest.mark.parametrize(
    ("encoder", "output_stride"),
    [
        pytest.param(tensors.BOTTLENECK, 8, marks=pytest.mark.slow),
        pytest.param(tensors.BOTTLENECK, 16, marks=pytest.mark.slow),
        pytest.param("xception", 8, marks=pytest.mark.slow),
        pytest.param("xception", 16, marks=pytest.mark.slow),
    ],
)
def test_logits_of_padded_images_are_those_of_each_alone(tiny_config, monkeypatch, encoder, output_stride):
    tensors.register_bottleneck(monkeypatch)
    twin = torch_twin.DeepLabV3Plus(encoder, CLASSES, output_stride=output_stride).double().eval()
    weights = tensors.made_up_like(twin)
    twin.load_state_dict({name: torch.from_numpy(value).double() for name, value in weights.items()}, strict=False)
    with jax.enable_x64(True):
        model = tiny_config(model__dtype="float64", model__param_dtype="float64").model
        model.update({"encoder": encoder, "output_stride": output_stride})
        model.update({"decoder_channels": 256, "aspp_dilations": (6, 12, 18)})  # As in the twin.
        network = models.build(model, CLASSES)
        images = np.random.default_rng(0).normal(size=(len(SIZES), *SIZES.max(0), 3))
        shapes = jax.eval_shape(network.init, jax.random.PRNGKey(0), images)
        apply = jax.jit(functools.partial(network.apply, names.from_state_dict(weights, shapes)))
        padded = np.asarray(apply(images, extent=Extent(*jnp.asarray(SIZES.T, jnp.int32))))
    for logits, image, (height, width) in zip(padded, images, SIZES, strict=True):
        alone = torch.from_numpy(image[None, :height, :width].transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            expected = twin(alone)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(logits[:height, :width], expected, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("encoder", "decoder", "patch"),
    [pytest.param("dinov2_w64", "dpt", 14, marks=pytest.mark.slow), ("dinov3_w64", "linear", 16)],
)
def test_transformers_give_padded_images_the_logits_of_each_alone(tiny_config, encoder, decoder, patch):
    sizes = patch * np.array([(3, 2), (1, 3)])
    with jax.enable_x64(True):
        model = tiny_config(model__dtype="float64", model__param_dtype="float64").model
        model.update({"encoder": encoder, "decoder": decoder})
        network = models.build(model, CLASSES)
        images = np.random.default_rng(0).normal(size=(len(sizes), *sizes.max(0), 3))
        shapes = jax.eval_shape(network.init, jax.random.PRNGKey(0), images)
        variables = names.from_state_dict(tensors.made_up(names.shapes(shapes)), shapes)
        apply = jax.jit(network.apply)
        padded = np.asarray(apply(variables, images, extent=Extent(*jnp.asarray(sizes.T, jnp.int32))))
        for logits, image, (height, width) in zip(padded, images, sizes, strict=True):
            alone = np.asarray(apply(variables, image[None, :height, :width])[0])
            np.testing.assert_allclose(logits[:height, :width], alone, atol=1e-10 * np.abs(alone).max())
