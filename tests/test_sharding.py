import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax import sharding


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (4, 12), (6,), (2, 4, 8)])
def test_split_inverts_concat(sizes):
    arrays = [jnp.arange(size * 3.0).reshape(size, 3) + 100 * i for i, size in enumerate(sizes)]
    joined = sharding.concat_sharded(*arrays)
    assert joined.shape == (sum(sizes), 3)
    for array, expected in zip(sharding.split_sharded(joined, sizes), arrays, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_concat_keeps_rows_on_their_device():
    """With rows split evenly over devices, the first half of each array stays in the first half of the joined one."""
    joined = sharding.concat_sharded(jnp.arange(8), 100 + jnp.arange(4))
    assert set(np.asarray(joined[:6])) == {0, 1, 2, 3, 100, 101}


def test_pieces_hold_the_rows_of_a_device():
    first, second = jnp.arange(4), 100 + jnp.arange(4)
    joined = sharding.concat_sharded(first, second, pieces=2)
    assert joined.tolist() == [0, 1, 100, 101, 2, 3, 102, 103]
    for array, expected in zip(sharding.split_sharded(joined, [4, 4], pieces=2), (first, second), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_batches_and_states_go_to_devices_and_back():
    mesh = sharding.make_mesh(jax.devices()[:4])
    rows = np.arange(24.0).reshape(8, 3)
    batch = sharding.put_batch({"rows": rows, "none": None}, mesh)
    assert {shard.data.shape for shard in batch["rows"].addressable_shards} == {(2, 3)} and batch["none"] is None
    np.testing.assert_array_equal(sharding.local_rows(batch["rows"]), rows)
    copies = sharding.replicate(rows, mesh).addressable_shards
    assert len(copies) == 4 and all(np.array_equal(copy.data, rows) for copy in copies)


def test_micro_batches_take_rows_of_every_device():
    mesh = sharding.make_mesh(jax.devices()[:2])
    first, second = sharding.split_micro_batches(jnp.arange(8), 2, mesh)
    assert first.tolist() == [0, 1, 4, 5] and second.tolist() == [2, 3, 6, 7]
