"""Checksums and ranges of the arrays of a state, which guard checkpoints against damage and divergence.

They are computed from the bytes in host memory, so they do not depend on devices, and take a few percent of the time
of a save (`python -m benchmarks.checksums`).
"""

import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

_THREADS = 4
_ROW = 512  # 64-bit words.


class Summary(NamedTuple):
    """Checksum and range of an array."""

    checksum: str  # 8 hexadecimal digits.
    low: float  # Smallest value; NaN if there is one.
    high: float  # Largest value; NaN if there is one.


def summarize(tree) -> dict[str, Summary]:
    """Returns the summary of each array of a tree, by its path, such as "student/params/decoder/fuse/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    with ThreadPoolExecutor(_THREADS) as pool:
        summaries = pool.map(_summarize, (leaf for _, leaf in leaves))
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        return dict(zip(names, summaries, strict=True))


def checksum(array: np.ndarray) -> str:
    """Returns the CRC-32 of the sums of rows and of columns of the array's bytes as a matrix of 64-bit words.

    Sums are several times faster than the CRC of every byte. A changed word changes the sums of its row and column.
    """
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    words = data[: data.size // (8 * _ROW) * (8 * _ROW)].view(np.uint64).reshape(-1, _ROW)
    crc = zlib.crc32(data[words.nbytes :])
    for axis in (0, 1):
        crc = zlib.crc32(words.sum(axis), crc)
    return f"{crc:08x}"


def _summarize(leaf) -> Summary:
    # Every device, of every process, holds the whole array.
    array = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
    if not array.size:
        return Summary(checksum(array), 0.0, 0.0)
    values = array.astype(np.float32) if array.dtype.itemsize == 2 else array  # NumPy is slow with bfloat16.
    return Summary(checksum(array), float(values.min()), float(values.max()))
