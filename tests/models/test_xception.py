"""Xception's numbers against PyTorch, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax.models import xception
from dssn_jax.weights import names

torch = pytest.importorskip("torch")
from tests.reference import torch_twin  # noqa: E402

TYPES = {"dtype": jnp.float64, "param_dtype": jnp.float64}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def assert_equal(ours, twin, shape, train):
    """Compares outputs, and in training the running statistics, with those of a PyTorch module of the same weights."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    variables = jax.eval_shape(lambda x: ours.init(jax.random.PRNGKey(0), x, train), x)
    state = {name: rng.uniform(0.3, 0.8, shape) for name, shape in names.shapes(variables).items()}
    twin.double().train(train)
    twin.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)
    variables = names.from_state_dict(state, variables)
    outputs, updated = jax.jit(lambda v, x: ours.apply(v, x, train, mutable=["batch_stats"]))(variables, x)
    expected = twin(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    for output, theirs in zip(
        jax.tree.leaves(outputs), [expected] if torch.is_tensor(expected) else expected, strict=True
    ):
        theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(output, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())
    for name, value in names.to_state_dict(updated).items():
        np.testing.assert_allclose(value, twin.state_dict()[name].numpy(), rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"channels": 12, "features": 12, "dilation": 2},  # The shortcut is relu(x).
        {"channels": 8, "features": 12, "stride": 2},
        {"channels": 8, "features": 12, "grow_first": False},
    ],
)
def test_blocks(options, train):
    channels = options.pop("channels")
    twin = torch_twin.XceptionBlock(
        channels, options["features"], *[options.get("stride", 1), options.get("dilation", 1)]
    )
    if "grow_first" in options:
        twin = torch_twin.XceptionBlock(channels, options["features"], grow_first=False)
    assert_equal(xception.Block(**options, **TYPES), twin, (2, 9, 11, channels), train)
    options["channels"] = channels


def test_separable_convolution_with_a_relu_after_each():
    ours = xception.SeparableConv(10, dilation=2, relu_first=False, **TYPES)
    assert_equal(ours, torch_twin.SeparableConv(6, 10, dilation=2, relu_first=False), (2, 7, 7, 6), True)


@pytest.mark.slow
@pytest.mark.parametrize("output_stride", [16, 8])
def test_the_whole_encoder(output_stride):
    ours = xception.Xception(output_stride=output_stride, **TYPES)
    assert_equal(ours, torch_twin.Xception(output_stride), (1, 33, 41, 3), False)
