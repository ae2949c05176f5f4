"""The DPT decoder against the module in PyTorch, whole and in padded batches, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dssn_jax.models import dpt  # noqa: E402
from dssn_jax.models.extent import Extent  # noqa: E402
from dssn_jax.weights import names  # noqa: E402
from tests.reference.torch_dpt import DPTHead  # noqa: E402

CLASSES, PATCH, WIDTH = 5, 14, 32
SIZE = dpt.Size(8, (6, 10, 12, 14))


@pytest.fixture(scope="module")
def twin():
    torch.manual_seed(0)
    return DPTHead(WIDTH, SIZE.features, SIZE.channels, CLASSES).double().eval()


def decoder(**options):
    options = {"dtype": jnp.float64, "param_dtype": jnp.float64, **options}
    return dpt.DPT(CLASSES, PATCH, SIZE, **options)


def features(rng, height, width, batch=1):
    return tuple(rng.normal(size=(batch, height, width, WIDTH)) for _ in range(4))


def variables_like(twin, module, maps):
    state_dict = {f"head.{name}": value.numpy() for name, value in twin.state_dict().items()}
    variables = jax.eval_shape(functools.partial(module.init, train=False), jax.random.PRNGKey(0), maps)
    # As in a network, whose variables of the decoder have no prefix.
    variables = {collection: {"decoder": tree} for collection, tree in variables.items()}
    assert set(names.shapes(variables)) == set(state_dict)
    filled = names.from_state_dict(state_dict, variables)
    return {collection: tree["decoder"] for collection, tree in filled.items()}


def in_torch(twin, maps):
    with torch.no_grad():
        logits = twin([torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in maps])
    return logits.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("height", "width"), [(5, 8), (1, 2)])
def test_logits_are_those_of_pytorch(twin, height, width):
    maps = features(np.random.default_rng(0), height, width, batch=2)
    with jax.enable_x64(True):
        variables = variables_like(twin, decoder(), maps)
        logits = jax.jit(functools.partial(decoder().apply, train=False))(variables, maps)
    expected = in_torch(twin, maps)
    assert logits.shape == (2, 8 * height, 8 * width, CLASSES)
    np.testing.assert_allclose(logits, expected, atol=1e-12 * np.abs(expected).max())


def test_logits_of_padded_images_are_those_of_each_alone(twin):
    sizes = np.array([(7, 4), (2, 7), (5, 5), (1, 1)])
    maps = features(np.random.default_rng(1), 7, 7, batch=len(sizes))
    with jax.enable_x64(True):
        extent = Extent(*jnp.asarray(PATCH * sizes.T, jnp.int32))
        variables = variables_like(twin, decoder(), maps)
        logits = np.asarray(jax.jit(functools.partial(decoder().apply, train=False))(variables, maps, extent=extent))
        inside = np.asarray(decoder().logits_extent(extent)).T
    np.testing.assert_array_equal(inside, 8 * sizes)
    for row, (height, width) in enumerate(sizes):
        expected = in_torch(twin, [x[row : row + 1, :height, :width] for x in maps])[0]
        ours = logits[row, : 8 * height, : 8 * width]
        np.testing.assert_allclose(ours, expected, atol=1e-12 * np.abs(expected).max())


@pytest.mark.slow
def test_gradients_with_and_without_remat_are_those_of_pytorch(twin):
    maps = features(np.random.default_rng(2), 3, 4)
    gradients = []
    with jax.enable_x64(True):
        variables = variables_like(twin, decoder(), maps)
        for remat in (False, True):
            module = decoder(remat=remat)

            def loss(params, module=module):
                return jnp.square(module.apply({**variables, "params": params}, maps, train=True)).sum()

            assert ("remat" in str(jax.make_jaxpr(loss)(variables["params"]))) == remat
            gradients.append(names.to_state_dict({"params": jax.jit(jax.grad(loss))(variables["params"])}))
    twin.zero_grad()
    twin([torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in maps]).square().sum().backward()
    expected = {f"head.{name}": value.grad for name, value in twin.named_parameters()}
    unused = {name for name, value in expected.items() if value is None}
    assert set(gradients[0]) == set(expected) - unused
    assert unused == {
        f"head.scratch.refinenet4.resConfUnit1.{name}"
        for name in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")
    }
    for ours in gradients:
        for name, value in ours.items():
            theirs = expected[name].numpy()
            np.testing.assert_allclose(value, theirs, atol=1e-12 * np.abs(theirs).max(), err_msg=name)


@pytest.fixture(scope="module")
def initialized():
    """Returns initial variables in float32."""
    maps = features(np.random.default_rng(0), 2, 2)
    module = decoder(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    return jax.jit(functools.partial(module.init, train=False))(jax.random.PRNGKey(0), maps)


@pytest.mark.slow
def test_initial_weights_are_distributed_as_pytorchs(twin, initialized):
    ours = names.to_state_dict({collection: {"decoder": tree} for collection, tree in initialized.items()})
    for name, value in twin.state_dict().items():
        # Both are uniform: the largest of n draws is close to the bound.
        largest, count = np.abs(ours[f"head.{name}"]).max(), value.numel()
        if count > 500:
            assert largest == pytest.approx(float(value.abs().max()), rel=0.02), name
            assert np.std(ours[f"head.{name}"]) == pytest.approx(float(value.std()), rel=0.1), name
        else:
            assert 0 < largest <= 1.5 * float(value.abs().max()), name


@pytest.mark.parametrize(("width", "millions"), [(384, 2.74), (768, 10.95), (1024, 31.2)])
def test_parameters_of_the_published_heads(width, millions):
    """UniMatch V2, with 21 classes; the unused unit counts."""
    module = dpt.DPT(21, PATCH, dpt.size_for(width))
    maps = (jax.ShapeDtypeStruct((1, 1, 1, width), jnp.float32),) * 4
    variables = jax.eval_shape(functools.partial(module.init, train=False), jax.random.PRNGKey(0), maps)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.slow
def test_bfloat16_computes_over_float32_weights(initialized):
    assert {leaf.dtype for leaf in jax.tree.leaves(initialized)} == {jnp.dtype("float32")}
    maps = tuple(x.astype(np.float32) for x in features(np.random.default_rng(3), 3, 4))
    exact, rounded = (
        jax.jit(functools.partial(decoder(dtype=dtype, param_dtype=jnp.float32).apply, train=False))(initialized, maps)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.05 * np.abs(exact).max())
