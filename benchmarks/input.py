"""Samples/s of the input pipeline against a PyTorch-style loader: `python -m benchmarks.input --json=input.json`.

Both make unlabeled samples from the same generated JPEGs: two weak crops of an image (for CutMix) and what the training
step needs of them. The loader does the work of the original's two loaders, with Pillow, in one process per core: it
decodes an image for each crop, resizes all of it, makes two strong views of each crop and normalizes the three. Nothing
is sent between its processes, which favors it. Ours runs as in training, threads and batches included; it makes no
strong views, which are part of the training step (`benchmarks.augment` times them).
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import tempfile
import time

import numpy as np
from PIL import Image

from benchmarks import tables
from configs import cityscapes, pascal
from experiments import folder
from input_pipeline.pipeline import train_dataset, train_iterator
from input_pipeline.sources.folder import FolderSource
from input_pipeline.sources.open import Sources
from input_pipeline.split_lists import read_list
from input_pipeline.transforms.cutmix import cutmix_box
from tests.reference.photometric import strong_view

SIZES = {"voc 500x375": (375, 500, pascal), "cityscapes 2048x1024": (1024, 2048, cityscapes)}
IMAGES = 32
COLUMNS = ("images", "loader", "cores", "samples/s", "crops/s", "crops/s per core", "ratio")


def pillow_crop(path: str, config, rng: np.random.Generator) -> list[np.ndarray]:
    """Returns a sample of one of the original's loaders: weak and two strong views of a random crop, normalized."""
    data = config.data
    with Image.open(path) as file:
        image = file.convert("RGB")
    long = rng.integers(int(max(image.size) * data.scale[0]), int(max(image.size) * data.scale[1]), endpoint=True)
    size = [int(side * long / max(image.size) + 0.5) for side in image.size]
    image = image.resize(size, Image.Resampling.BILINEAR)
    padded = Image.new("RGB", [max(side, data.crop) for side in size])
    padded.paste(image)
    left, top = (int(rng.integers(side - data.crop + 1)) for side in padded.size)
    image = padded.crop((left, top, left + data.crop, top + data.crop))
    if rng.random() < data.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    weak = np.asarray(image)
    views = [weak, *(strong_view(weak, config.views, rng) for _ in range(2))]
    for _ in range(2):
        cutmix_box(data.crop, config.views, rng)
    mean, std = np.float32(data.mean), np.float32(data.std)
    return [np.ascontiguousarray(((view.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)) for view in views]


def pillow_rate(paths: list[str], config, seed: int, seconds: float) -> float:
    """Makes samples, two crops of an image each, for `seconds`; returns samples/s."""
    rng, samples, started = np.random.default_rng(seed), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(2):
            pillow_crop(paths[samples % len(paths)], config, rng)
        samples += 1
    return samples / (time.perf_counter() - started)


def measure_pillow(paths: list[str], config, cores: int, seconds: float) -> float:
    """Returns the samples/s of `cores` processes."""
    with concurrent.futures.ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        for duration in (0.1, seconds):  # The first call starts the processes.
            rates = list(pool.map(pillow_rate, [paths] * cores, [config] * cores, range(cores), [duration] * cores))
    return sum(rates)


def measure_ours(source: FolderSource, config, cores: int, seconds: float) -> float:
    """Returns the samples/s of the pipeline with `cores` threads."""
    config.data.threads = cores
    iterator = train_iterator(train_dataset(Sources(_Pixel(), source, _Pixel()), config), config)
    for _ in range(2):
        next(iterator)
    started, samples = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(iterator)
        samples += config.data.unlabeled_batch
    rate = samples / (time.perf_counter() - started)
    iterator.close()
    return rate


class _Pixel:
    """A source whose labeled records cost nothing, so that the unlabeled ones are measured."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pixel = np.zeros((1, 1, 3), np.uint8)
        return {"image": pixel, "label": pixel[..., 0]}


def measure(name: str, seconds: float, core_counts: list[int]) -> list[dict]:
    """Returns the rows of one size of images."""
    height, width, module = SIZES[name]
    rows, all_cores = [], sorted(os.sched_getaffinity(0))
    config = module.get_config()
    config.data.labeled_batch = 1
    with tempfile.TemporaryDirectory() as root:
        folder.write(pathlib.Path(root), [(height, width)] * IMAGES, split="all")
        listed = f"{root}/splits/all/unlabeled.txt"
        source = FolderSource(root, read_list(listed, labeled=False), listed, labels=None)
        paths = [os.path.join(root, source.name(i)) for i in range(len(source))]
        for cores in core_counts:
            os.sched_setaffinity(0, all_cores[:cores])
            pillow = measure_pillow(paths, config, cores, seconds)
            ours = measure_ours(source, config, cores, seconds)
            os.sched_setaffinity(0, all_cores)
            for loader, rate in (("Pillow", pillow), ("ours", ours)):
                rows.append({
                    "images": name, "loader": loader, "cores": cores, "samples/s": rate, "crops/s": 2 * rate,
                    "crops/s per core": 2 * rate / cores, "ratio": rate / pillow,
                })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each measurement")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="measure with 1 and with this many cores")
    parser.add_argument("--json", type=pathlib.Path, help="file of the results")
    arguments = parser.parse_args()
    rows = []
    for name in SIZES:
        rows += measure(name, arguments.seconds, sorted({1, arguments.cores}))
        tables.show(rows, COLUMNS)
        tables.write(arguments.json, {"rows": rows})


if __name__ == "__main__":
    main()
