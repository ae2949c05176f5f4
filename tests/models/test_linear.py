"""The linear decoder against batch norm and a 1x1 convolution of PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dssn_jax.models import linear  # noqa: E402
from dssn_jax.models.extent import Extent  # noqa: E402
from dssn_jax.weights import names  # noqa: E402

CLASSES, WIDTH, STRIDE = 5, 24, 16


def twin():
    torch.manual_seed(0)
    module = torch.nn.Sequential()
    module.add_module("bn", torch.nn.BatchNorm2d(WIDTH))
    module.add_module("conv_seg", torch.nn.Conv2d(WIDTH, CLASSES, 1))
    torch.nn.init.normal_(module.bn.weight)
    torch.nn.init.normal_(module.bn.running_mean)
    return module.double()


@pytest.mark.parametrize("train", [False, True])
def test_logits_and_statistics_are_those_of_pytorch(train):
    module, maps = twin().train(train), np.random.default_rng(0).normal(1, 2, (2, 2, 3, 4, WIDTH))
    state_dict = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    with torch.no_grad():
        expected = module(torch.from_numpy(maps[-1].transpose(0, 3, 1, 2).copy())).permute(0, 2, 3, 1).numpy()
    with jax.enable_x64(True):
        decoder = linear.Linear(CLASSES, STRIDE, dtype=jnp.float64, param_dtype=jnp.float64)
        like = jax.eval_shape(functools.partial(decoder.init, train=False), jax.random.PRNGKey(0), tuple(maps))
        variables = names.from_state_dict(state_dict, like)
        logits, updated = decoder.apply(variables, tuple(maps), train, mutable=["batch_stats"])
    np.testing.assert_allclose(logits, expected, atol=1e-12)
    ours = names.to_state_dict({**variables, **updated})
    for name, value in module.state_dict().items():
        if value.ndim:
            np.testing.assert_allclose(ours[name], value.numpy(), rtol=1e-12, err_msg=name)


def test_initial_weights():
    """DINOv2 and DINOv3 draw the classifier from N(0, 0.01) and start from bias 0."""
    maps = (jnp.zeros((1, 1, 1, 500)),)
    params = linear.Linear(40, STRIDE).init(jax.random.PRNGKey(0), maps, False)["params"]["conv_seg"]
    assert np.std(params["kernel"]) == pytest.approx(0.01, rel=0.03) and abs(np.mean(params["kernel"])) < 3e-4
    assert not np.any(params["bias"])


def test_extent_of_logits_is_that_of_the_last_map():
    extent = linear.Linear(CLASSES, STRIDE).logits_extent(Extent(jnp.array([33, 16]), jnp.array([1, 48])))
    np.testing.assert_array_equal(extent, [[3, 1], [1, 3]])
