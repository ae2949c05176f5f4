import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax import sharding


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (4, 12), (6,), (2, 4, 8)])
def test_separate_undoes_interleave(sizes):
    arrays = [jnp.arange(size * 3.0).reshape(size, 3) + 100 * i for i, size in enumerate(sizes)]
    joined = sharding.interleave(*arrays)
    assert joined.shape == (sum(sizes), 3)
    for found, expected in zip(sharding.separate(joined, sizes), arrays, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_interleave_keeps_rows_on_their_device():
    """With rows split evenly over devices, the first half of each array stays in the first half of the joined one."""
    joined = sharding.interleave(jnp.arange(8), 100 + jnp.arange(4))
    assert set(np.asarray(joined[:6])) == {0, 1, 2, 3, 100, 101}
