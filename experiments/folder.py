"""Writes generated images as a data set of files, laid out like VOC: `python -m experiments.folder FOLDER`.

JPEGs of 500x375, PNG masks and the lists of split 183, for runs without a data set that must read files:
`main.py --config=configs/pascal.py:split=183 --config.data.root=FOLDER`.
"""

import argparse
import concurrent.futures
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from input_pipeline.sources.shapes import ShapesSource

Size = tuple[int, int]  # Height and width, pixels.

VOC: Size = (375, 500)
TILE = 512  # Side of the generated image that larger ones are tiled with, because drawing takes long; pixels.


def write(folder: pathlib.Path, sizes: Sequence[Size], split: str = "pascal/183", val: int = 8) -> None:
    """Writes an image and a mask per size and the lists: all are unlabeled, the first quarter labeled, `val` val."""
    count = len(sizes)
    lists = folder / "splits" / split
    for path in (folder / "JPEGImages", folder / "SegmentationClass", lists):
        path.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lines = list(pool.map(lambda index: _write_pair(folder, index, count, sizes[index]), range(count)))
    (lists / "labeled.txt").write_text("".join(lines[: -(-count // 4)]))
    (lists / "unlabeled.txt").write_text("".join(lines))
    (lists.parent / "val.txt").write_text("".join(lines[:val]))


def _write_pair(folder: pathlib.Path, index: int, count: int, size: Size) -> str:
    """Writes an image and its mask; returns their line of the lists."""
    height, width = size
    side = min(max(width, height), TILE)
    record = ShapesSource(side, count, 0, part="train", labeled=True)[index]
    repeats = (-(-height // side), -(-width // side))
    image = np.tile(record["image"], (*repeats, 1))[:height, :width]
    label = np.tile(record["label"], repeats)[:height, :width]
    names = f"JPEGImages/{index:06d}.jpg", f"SegmentationClass/{index:06d}.png"
    Image.fromarray(image).save(folder / names[0], quality=90)
    Image.fromarray(label).save(folder / names[1])
    return " ".join(names) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=128, help="number of images")
    arguments = parser.parse_args()
    write(arguments.folder, [VOC] * arguments.count)
    print(f"wrote {arguments.count} images to {arguments.folder}")


if __name__ == "__main__":
    main()
