"""Layers that networks share, against flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax.models import layers


@pytest.mark.parametrize(("height", "width"), [(9, 9), (8, 8), (5, 6), (1, 2)])
def test_max_pooling_and_its_gradient_are_flaxes(height, width):
    """The first of several equal values gets the gradient."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-3, 3, (2, height, width, 4)), jnp.float32)

    def flax_pool(x):
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    ours, gradient = jax.vjp(layers.max_pool, x)
    expected, expected_gradient = jax.vjp(flax_pool, x)
    np.testing.assert_array_equal(ours, expected)
    weights = jnp.asarray(rng.integers(-9, 9, ours.shape), jnp.float32)
    np.testing.assert_array_equal(gradient(weights)[0], expected_gradient(weights)[0])


@pytest.mark.parametrize(("height", "width"), [(9, 9), (8, 8), (5, 6), (1, 2)])
def test_largest_values_by_axis_are_those_of_the_windows(height, width):
    """GPUs have one of the two forms, CPUs the other."""
    x = np.random.default_rng(0).integers(-3, 3, (2, height, width, 4)).astype(np.float32)
    for ours, expected in zip(layers._largest_by_axis(x), layers._largest(x), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


def test_tpus_have_their_own_instructions_for_max_pooling():
    def gradient(x):
        return jax.grad(lambda x: layers.max_pool(x).sum())(x)

    for platform, count in (("tpu", 1), ("cuda", 0), ("cpu", 0)):
        lowered = jax.jit(gradient).trace(jnp.ones((2, 8, 8, 4))).lower(lowering_platforms=(platform,))
        assert lowered.as_text().count("stablehlo.select_and_scatter") == count, platform
