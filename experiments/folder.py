"""Writes generated images as a data set of files: `python -m benchmarks.folder FOLDER`, then --config.data.root=FOLDER.

The files are laid out as VOC's are (JPEGs of 500x375, PNG masks, lists of the split 183), for runs that must read what
real runs read where no data set is at hand.
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
TILE = 512  # Larger images are tiled: they take long to draw.


def write(folder: pathlib.Path, sizes: Sequence[Size], split: str = "pascal/183", validation: int = 8) -> None:
    """Writes an image and mask of each size: the first quarter is labeled, all are unlabeled, the first validate."""
    count = len(sizes)
    lists = folder / "splits" / split
    for path in (folder / "JPEGImages", folder / "SegmentationClass", lists):
        path.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lines = list(pool.map(lambda index: _write_pair(folder, index, count, sizes[index]), range(count)))
    (lists / "labeled.txt").write_text("".join(lines[: -(-count // 4)]))
    (lists / "unlabeled.txt").write_text("".join(lines))
    (lists.parent / "val.txt").write_text("".join(lines[:validation]))


def _write_pair(folder: pathlib.Path, index: int, count: int, size: Size) -> str:
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
    print(f"{arguments.count} images in {arguments.folder}")


if __name__ == "__main__":
    main()
