import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax.models import batch_norm, layers
from dssn_jax.models.batch_norm import Batches


def test_batch_norm_by_hand():
    x = np.random.default_rng(0).normal(2, 3, (4, 5, 6, 3)).astype(np.float32)
    norm = batch_norm.BatchNorm(momentum=0.1)
    variables = norm.init(jax.random.PRNGKey(0), x, False)
    y, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
    mean, flat = x.mean((0, 1, 2)), x.reshape(-1, 3)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(flat.var(0) + 1e-5), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(norm.apply(variables, x, False), x / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 8])
def test_running_statistics_are_folded_into_the_convolution(groups):
    """With the same values; batch statistics still normalize."""

    class Unit(nn.Module):
        fold: bool

        @nn.compact
        def __call__(self, x, train=False):
            types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
            conv = layers.conv(8, 3, stride=2, groups=groups, name="conv", **types)
            norm = batch_norm.BatchNorm(name="norm", **types)
            return batch_norm.normalized(conv, norm, x, train) if self.fold else norm(conv(x), train)

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(2, 9, 9, 8)))
        variables = Unit(True).init(jax.random.PRNGKey(0), x)
        variables = jax.tree.map(lambda leaf: leaf + 0.1 + rng.random(leaf.shape), variables)
        plain = Unit(False).apply(variables, x)
        np.testing.assert_allclose(Unit(True).apply(variables, x), plain, rtol=0, atol=1e-12 * np.abs(plain).max())
        trained, _ = Unit(True).apply(variables, x, train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(trained.mean((0, 1, 2)), variables["params"]["norm"]["bias"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_batch_norm_are_those_of_its_formula(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + rng.normal(0, 2, (2, 4, 5, 3)), dtype)
    scale, bias, weights = (jnp.asarray(rng.normal(1, 0.3, shape), jnp.float32) for shape in ((3,), (3,), x.shape))

    def by_formula(x, scale, bias):
        wide = x.astype(jnp.float32)
        normalized = (wide - wide.mean((0, 1, 2))) / jnp.sqrt(wide.var((0, 1, 2)) + 1e-5)
        return (weights * (normalized * scale + bias)).sum()

    def by_layer(x, scale, bias):
        norm, stats = batch_norm.BatchNorm(dtype=x.dtype), {"mean": jnp.full(3, 2.5), "var": jnp.ones(3)}
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        return (weights * norm.apply(variables, x, True, mutable=["batch_stats"])[0]).sum()

    gradients, expected = (jax.grad(loss, (0, 1, 2))(x, scale, bias) for loss in (by_layer, by_formula))
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=(1e-4 if dtype == "float32" else 2e-2))


class Unit(nn.Module):
    """A convolution without bias, batch norm and an activation, in float64: by layers of their own, or in one."""

    joined: bool
    features: int = 16
    activation: batch_norm.Activation | None = None

    @nn.compact
    def __call__(self, x, train=False, residual=None):
        types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        conv, norm = layers.conv(self.features, name="conv", **types), batch_norm.BatchNorm(name="norm", **types)
        if self.joined:
            return batch_norm.normalized(conv, norm, x, train, self.activation, residual)
        y = conv(x)
        if not isinstance(train, Batches):
            y = norm(y, train)
        else:  # One batch after the other.
            rows = np.split(np.arange(len(x)), train.devices * train.count)
            rows = [np.concatenate(rows[batch :: train.count]) for batch in range(train.count)]
            outputs = [norm(y[each], True) for each in rows]
            y = jnp.concatenate(outputs)[np.argsort(np.concatenate(rows))]
        y = y if residual is None else y + residual
        return y if self.activation is None else self.activation(y)


@pytest.mark.parametrize(
    "train",
    [
        True,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (Batches(2), Batches(3, 1))),
        Batches(2, 2),
        Batches(2, 2, tiles=True),
    ],
)
@pytest.mark.parametrize("features", [16, 6], ids=["expansion", "same"])
@pytest.mark.parametrize("activation", [None, nn.relu, nn.relu6])
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "residual"])
def test_joined_layers_are_convolution_norm_and_activation(adds, activation, features, train):
    """With values, running statistics and gradients of the layers one after another, each batch on its own."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(1 + rng.normal(size=(12, 3, 5, 4)))
        variables = Unit(False, features).init(jax.random.PRNGKey(0), x)
        variables = jax.tree.map(lambda leaf: leaf + 0.1 + rng.random(leaf.shape), variables)
        weights = jnp.asarray(rng.normal(size=(12, 3, 5, features)))
        variables["params"]["norm"]["scale"] *= 4  # Some values are above 6.

        residual = jnp.asarray(rng.normal(size=weights.shape))

        def loss(x, residual, params, joined):
            unit, adding = Unit(joined, features, activation), residual if adds else None
            y, updated = unit.apply({**variables, "params": params}, x, train, adding, mutable=["batch_stats"])
            return (weights * y).sum(), (y, updated)

        gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        results = [gradients(x, residual, variables["params"], joined) for joined in (True, False)]
        for ours, expected in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-10 * np.abs(expected).max())


def test_expansions_are_convolutions_where_maps_are_in_tiles():
    x, unit = jnp.ones((4, 8, 8, 4)), Unit(True)

    def count(train: Batches, operation: str) -> int:
        step = jax.jit(lambda variables, x: unit.apply(variables, x, train, mutable=["batch_stats"])[0])
        with jax.enable_x64(True):
            variables = unit.init(jax.random.PRNGKey(0), x)
            return step.trace(variables, x).lower(lowering_platforms=("tpu",)).as_text().count(operation)

    assert count(Batches(2), "stablehlo.convolution") == 0 < count(Batches(2), "stablehlo.dot_general")
    assert count(Batches(2, tiles=True), "stablehlo.dot_general") == 0
    assert count(Batches(2, tiles=True), "stablehlo.convolution") == 1
