"""Checksums notice every kind of damage, and ranges every value that is not finite."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dssn_jax.workdir import checksums


@pytest.mark.parametrize("size", [1, 3, 512, 1024, 1025, 3000])
def test_every_flipped_bit_changes_the_checksum(size):
    rng = np.random.default_rng(size)
    data = rng.integers(0, 256, 4 * size, np.uint8)
    array, before = data.view(np.float32), checksums.checksum(data.view(np.float32))
    for bit in rng.choice(8 * data.size, min(500, 8 * data.size), replace=False):
        data[bit // 8] ^= np.uint8(1 << bit % 8)
        assert checksums.checksum(array) != before
        data[bit // 8] ^= np.uint8(1 << bit % 8)
    assert checksums.checksum(array) == before


def test_moved_and_zeroed_bytes_change_the_checksum():
    array = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    zeroed, cut = array.copy(), array.copy()
    zeroed[7, 100:200], cut[32:] = 0, 0
    sums = {checksums.checksum(each) for each in (array, zeroed, cut, array[::-1], array[:, ::-1], np.roll(array, 1))}
    assert len(sums) == 6


def test_checksums_do_not_depend_on_devices():
    values = {"a": np.arange(5000, dtype=np.float32), "b": [np.int32(3), np.zeros((0, 4), np.uint8)]}
    expected = checksums.summarize(values)
    assert list(expected) == ["a", "b/0", "b/1"] and expected["a"][1:] == (0.0, 4999.0)
    for count in (1, 4):
        mesh = Mesh(np.array(jax.devices()[:count]), "devices")
        assert checksums.summarize(jax.device_put(values, NamedSharding(mesh, PartitionSpec()))) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_ranges_show_what_is_not_finite(dtype, value):
    array = np.ones(2000, dtype)
    array[1234] = value
    summary = checksums.summarize([array])["0"]
    assert not (abs(summary.low) <= 1e15 and abs(summary.high) <= 1e15)
    assert checksums.summarize([np.ones(2000, dtype)])["0"][1:] == (1.0, 1.0)
