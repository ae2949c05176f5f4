"""Checksums and ranges of the arrays of a state, which guard checkpoints against damage and divergence.

They are computed from the bytes in host memory, so they do not depend on devices, and take less than a tenth of the
time of a save (`python -m benchmarks.saving`).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from isal import isal_zlib  # CRC-32 by the instructions for it, several times faster than zlib.

LARGEST = 1e15  # Greatest magnitude of a value in a state: the norm of 10^8 of them is still a float32.
_THREADS = 2
_CHUNK = 2**18  # Values that stay in the cache of a core between the two passes over them.


class Summary(NamedTuple):
    """Checksum of an array, and what shows that it has diverged."""

    checksum: str  # CRC-32 of its bytes, 8 hexadecimal digits.
    bad: float | None  # A value that is not a number, or of a magnitude above `LARGEST`; None if there is none.


def summarize(tree) -> dict[str, Summary]:
    """Returns the summary of each array of a tree, by its path, such as "student/params/decoder/fuse/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    with ThreadPoolExecutor(_THREADS) as pool:
        summaries = pool.map(_summarize, (leaf for _, leaf in leaves))
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        return dict(zip(names, summaries, strict=True))


def _summarize(leaf) -> Summary:
    # Every device, of every process, holds the whole array.
    array = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
    values = np.ascontiguousarray(array).reshape(-1)
    crc, bad = 0, None
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK]
        crc = isal_zlib.crc32(chunk.view(np.uint8), crc)
        bad = _bad(chunk) if bad is None else bad
    return Summary(f"{crc:08x}", bad)


def _bad(values: np.ndarray) -> float | None:
    """Returns the `Summary.bad` of values [N]."""
    if values.dtype.kind in "biu":
        return None
    wide = values.astype(np.float32) if values.dtype.itemsize == 2 else values  # NumPy is slow with bfloat16.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.dot(wide, wide) <= LARGEST**2:  # Bounds every value; a sum is faster than a minimum and a maximum.
            return None
    least, most = float(wide.min()), float(wide.max())
    extreme = most if not most <= -least else least  # Not a number is neither.
    return None if abs(extreme) <= LARGEST else extreme
