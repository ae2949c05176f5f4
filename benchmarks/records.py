"""Packing a data set, and reading it packed: `python -m benchmarks.records --json=records.json`.

Generated images and masks, laid out and of the size of VOC's, are packed as `--mode=records` does, beside a plain copy
of the same files (shutil.copytree, one after another, no checksum) and beside reading and hashing them alone. Then
records are read in a random order, encoded and decoded, as files and packed, in as many threads as cores. Files are in
the page cache of the system all the time, as far as they fit: the disk is not measured.
"""

import argparse
import concurrent.futures
import hashlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks import tables
from configs import pascal
from experiments import folder as files
from input_pipeline import decode
from input_pipeline.sources.open import open_sources

COLUMNS = ("work", "seconds", "files/s", "MB/s")


def timed(work: str, run: Callable[[], object], count: int, size: int) -> dict:
    """The row of what `run` does to `count` files of `size` bytes in all."""
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    row = {"work": work, "seconds": seconds, "files/s": count / seconds, "MB/s": size / 1e6 / seconds}
    tables.show([row], COLUMNS)
    return row


def measure(folder: pathlib.Path, images: int, shard_bytes: int) -> list[dict]:
    """Writes a data set below `folder` and returns the rows."""
    config, root = pascal.get_config("split=183"), folder / "files"
    files.write(root, [files.VOC] * images)
    config.data.root, config.data.splits, config.data.threads = str(root), "splits/pascal", os.cpu_count()
    paths = [path for path in root.rglob("*.*") if path.suffix != ".txt"]
    amount = len(paths), sum(path.stat().st_size for path in paths)

    def pack() -> None:
        pack(config, str(folder / "packed"), shard_bytes)

    rows = [
        timed("copy the files", lambda: shutil.copytree(root, folder / "copy"), *amount),
        timed(
            "read and hash the files", lambda: [hashlib.sha256(path.read_bytes()).digest() for path in paths], *amount
        ),
        timed("pack", pack, *amount),
        timed("pack again: look that all is whole", pack, *amount),
    ]
    order = np.random.default_rng(0).permutation(images).tolist()
    amount = images, sum((root / f"JPEGImages/{i:06d}.jpg").stat().st_size for i in range(images))
    for source, where in (("folder", root), ("array_record", folder / "packed")):
        config.data.update({"source": source, "root": str(where)})
        unlabeled = open_sources(config).unlabeled
        for work, read in (("encoded", _Encoded(unlabeled)), ("decoded", unlabeled.__getitem__)):
            rows.append(timed(f"read {work}, {source}", lambda read=read: _read_all(read, order), *amount))
    return rows


class _Encoded:
    """Reads the bytes of an image."""

    def __init__(self, source):
        self._source = source

    def __call__(self, index: int) -> bytes:
        return decode.read(self._source.files(index)[0])


def _read_all(read: Callable[[int], object], order: list[int]) -> None:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(read, order):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000, help="each with a mask")
    parser.add_argument("--shard", type=int, default=16, help="MiB of a shard")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(pathlib.Path(folder), arguments.images, arguments.shard << 20)
    tables.write(arguments.json, {"images": arguments.images, "rows": rows})
    print()
    tables.show(rows, COLUMNS)


if __name__ == "__main__":
    main()
