"""Checksums notice every kind of damage, and ranges every value that is not finite."""

import zlib

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dssn_jax.workdir import checksums


def checksum(array):
    return checksums.summarize([array])["0"].checksum


@pytest.mark.parametrize("size", [1, 3, 1024, 3000, 2**18 + 5])
def test_every_flipped_bit_changes_the_checksum(size):
    rng = np.random.default_rng(size)
    data = rng.integers(0, 256, 4 * size, np.uint8)
    array, before = data.view(np.int32), checksum(data.view(np.int32))
    assert before == f"{zlib.crc32(data):08x}"
    for bit in rng.choice(8 * data.size, min(300, 8 * data.size), replace=False):
        data[bit // 8] ^= np.uint8(1 << bit % 8)
        assert checksum(array) != before
        data[bit // 8] ^= np.uint8(1 << bit % 8)
    assert checksum(array) == before


def test_moved_and_zeroed_bytes_change_the_checksum():
    array = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    zeroed, cut = array.copy(), array.copy()
    zeroed[7, 100:200], cut[32:] = 0, 0
    sums = {checksum(each) for each in (array, zeroed, cut, array[::-1], array[:, ::-1], np.roll(array, 1))}
    assert len(sums) == 6


def test_checksums_do_not_depend_on_devices():
    values = {"a": np.arange(5000, dtype=np.float32), "b": [np.int32(3), np.zeros((0, 4), np.uint8)]}
    expected = checksums.summarize(values)
    assert list(expected) == ["a", "b/0", "b/1"]
    for count in (1, 4):
        mesh = Mesh(np.array(jax.devices()[:count]), "devices")
        assert checksums.summarize(jax.device_put(values, NamedSharding(mesh, PartitionSpec()))) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e16])
def test_values_that_are_not_finite_are_seen(dtype, value):
    array = np.ones(600_000, dtype)
    array[423_456] = value
    np.testing.assert_allclose(checksums.summarize([array])["0"].bad, value, rtol=0.01)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.uint32])
def test_large_values_are_fine(dtype):
    """Many of them have a large sum of squares."""
    array = np.full(200_000, 2**32 - 1 if dtype == np.uint32 else -9e14, dtype)
    assert checksums.summarize([array])["0"].bad is None
