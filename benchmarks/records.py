"""Packing a data set, and reading it packed: `python -m benchmarks.records --json=records.json`.

Packs generated images and masks, laid out like VOC and of its size, as `--mode=records` does. For comparison the same
files are copied (shutil.copytree, in one thread, without checksums), and read and hashed. Then all images are read in a
random order, encoded and decoded, from the files and from the records, with one thread per core. Files stay in the page
cache of the system as far as they fit, so the disk is not measured.
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
from dssn_jax.prepare.pack import pack_files
from experiments import folder
from input_pipeline import decode
from input_pipeline.sources.open import open_source

COLUMNS = ("work", "seconds", "files/s", "MB/s")


def timed(work: str, run: Callable[[], object], count: int, size: int) -> dict:
    """Runs what processes `count` files of `size` bytes together; returns a row of the table."""
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    return {"work": work, "seconds": seconds, "files/s": count / seconds, "MB/s": size / 1e6 / seconds}


def measure(root: pathlib.Path, images: int, shard_bytes: int) -> list[dict]:
    """Writes a data set below `root` and returns the rows."""
    files, packed, config = root / "files", root / "packed", pascal.get_config("split=183")
    folder.write(files, [folder.VOC] * images)
    config.data.root, config.data.splits, config.data.threads = str(files), "splits/pascal", os.cpu_count()
    paths = [path for path in files.rglob("*.*") if path.suffix != ".txt"]
    amount = len(paths), sum(path.stat().st_size for path in paths)

    def pack() -> None:
        pack_files(config, str(packed), shard_bytes)

    rows = [
        timed("copy the files", lambda: shutil.copytree(files, root / "copy"), *amount),
        timed("read and hash the files", lambda: [hashlib.sha256(path.read_bytes()) for path in paths], *amount),
        timed("pack", pack, *amount),
        timed("pack again: verify the shards", pack, *amount),
    ]
    order = np.random.default_rng(0).permutation(images).tolist()
    amount = images, sum((files / f"JPEGImages/{i:06d}.jpg").stat().st_size for i in range(images))
    for source, where in (("folder", files), ("array_record", packed)):
        config.data.update({"source": source, "root": str(where)})
        unlabeled = open_source(config, "unlabeled")
        reads = {
            "encoded": lambda i, source=unlabeled: decode.read(source.files(i)[0]),
            "decoded": unlabeled.__getitem__,
        }
        for form, read in reads.items():
            rows.append(timed(f"read {form}, {source}", lambda read=read: _read_all(read, order), *amount))
    return rows


def _read_all(read: Callable[[int], object], order: list[int]) -> None:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(read, order):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000, help="number of images, each with a mask")
    parser.add_argument("--shard", type=int, default=16, help="size of a shard, MiB")
    parser.add_argument("--json", type=pathlib.Path, help="file of the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        rows = measure(pathlib.Path(root), arguments.images, arguments.shard << 20)
    tables.write(arguments.json, {"images": arguments.images, "rows": rows})
    tables.show(rows, COLUMNS)


if __name__ == "__main__":
    main()
