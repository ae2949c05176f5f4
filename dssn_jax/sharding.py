"""Placement of arrays: the global batch is split over all devices, the training state is replicated."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the one-axis mesh of `devices` (default: all)."""
    devices = jax.devices() if devices is None else list(devices)
    # Explicit axes, the default of make_mesh, are not what linen's modules expect.
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def platform(mesh: Mesh) -> str:
    """Returns what the devices are, as JAX names it: "cpu", "gpu", "tpu"."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the state: a complete copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: split along the first axis."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicate(tree, mesh: Mesh):
    """Copies the arrays of a tree, equal in every process, to every device."""
    sharding = replicated(mesh)

    def put(leaf) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def put_batch(batch, mesh: Mesh):
    """Moves this process's rows of a batch, a tree of arrays, to its devices, as rows of global arrays."""
    sharding = batch_sharded(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def local_rows(array: jax.Array) -> np.ndarray:
    """Returns this process's rows of an array that is split along its first axis."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def split_micro_batches(tree, count: int, mesh: Mesh):
    """Splits batches [N, ...] of a tree into [count, N / count, ...] in which rows stay on their device.

    With D devices, micro-batch i has the i-th of `count` equal stretches of the N / D rows of each device.
    """

    def split(array: jax.Array) -> jax.Array:
        rows = array.reshape(mesh.size, count, -1, *array.shape[1:]).swapaxes(0, 1)
        return rows.reshape(count, -1, *array.shape[1:])

    return jax.tree.map(split, tree)


def concat_sharded(*arrays: jax.Array, pieces: int | None = None) -> jax.Array:
    """Joins batches [N_i, ...] into one [sum(N_i), ...] in which rows of the same device stay on it.

    Each batch is cut into `pieces`, a multiple of the number of devices (default: as many as all sizes allow); the
    first pieces of all batches come first. `jnp.concatenate` of batch-sharded arrays would move rows between devices
    (an all-to-all). `split_sharded` inverts.
    """
    pieces = pieces or math.gcd(*(len(array) for array in arrays))
    joined = jnp.concatenate([array.reshape(pieces, -1, *array.shape[1:]) for array in arrays], 1)
    return joined.reshape(-1, *joined.shape[2:])


def split_sharded(array: jax.Array, sizes: Sequence[int], pieces: int | None = None) -> list[jax.Array]:
    """Splits what `concat_sharded` joined from batches of `sizes`, with the same `pieces`."""
    pieces = pieces or math.gcd(*sizes)
    joined = array.reshape(pieces, -1, *array.shape[1:])
    batches = jnp.split(joined, np.cumsum([size // pieces for size in sizes])[:-1], 1)
    return [batch.reshape(-1, *array.shape[1:]) for batch in batches]
