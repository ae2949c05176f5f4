"""Images/s of the input pipeline beside a PyTorch-style loader: `python -m benchmarks.input --json=input.json`.

Both make unlabeled samples from the same generated JPEGs: two weak crops of an image (for CutMix) and all that the
training step needs of them. The loader does what the original's two loaders do, with Pillow in as many processes as
cores: it decodes an image for each crop, resizes all of it, makes two strong views of each crop and normalizes the
three. Nothing is sent between its processes, which favors it. Ours runs as in training, threads and batches included;
`host views` is ours with Pillow's strong views on the host (config.views.device=False).
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
from experiments import folder as files
from input_pipeline import pipeline
from input_pipeline.pipeline import train_iterator
from input_pipeline.sources.folder import FolderSource
from input_pipeline.sources.open import Sources
from input_pipeline.split_lists import read_list
from input_pipeline.transforms.cutmix import cutmix_box
from tests.reference.photometric import strong_view

SIZES = {"voc 500x375": (500, 375, pascal), "cityscapes 2048x1024": (2048, 1024, cityscapes)}
COLUMNS = ("images", "loader", "cores", "samples/s", "crops/s", "crops/s per core", "ratio")


def pil_crop(path: str, config, rng: np.random.Generator) -> list[np.ndarray]:
    """A sample of one of the original's loaders: the weak and two strong views, normalized, of a random crop."""
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


def pil_rate(paths: list[str], config, seed: int, seconds: float) -> float:
    """Makes samples (two crops of an image each) for so long; returns samples/s."""
    rng, made, started = np.random.default_rng(seed), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(2):
            pil_crop(paths[made % len(paths)], config, rng)
        made += 1
    return made / (time.perf_counter() - started)


def measure_pil(paths: list[str], config, cores: int, seconds: float) -> float:
    """Samples/s of `cores` processes."""
    with concurrent.futures.ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        for stretch in (0.1, seconds):  # The first starts the processes.
            rates = list(pool.map(pil_rate, [paths] * cores, [config] * cores, range(cores), [stretch] * cores))
    return sum(rates)


def measure_ours(source: FolderSource, config, cores: int, seconds: float) -> float:
    """Samples/s of the pipeline of unlabeled batches with `cores` threads."""
    config.data.threads = cores
    sources = Sources(_Nothing(), source, _Nothing())
    dataset = pipeline.train_dataset(sources, config)
    iterator = train_iterator(dataset, config)
    for _ in range(2):
        next(iterator)
    started, made = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(iterator)
        made += config.data.unlabeled_batch
    rate = made / (time.perf_counter() - started)
    iterator.close()
    return rate


class _Nothing:
    """A labeled source whose records cost nothing: what is measured are the unlabeled ones."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pixel = np.zeros((1, 1, 3), np.uint8)
        return {"image": pixel, "label": pixel[..., 0]}


def measure(name: str, seconds: float, core_counts: list[int]) -> list[dict]:
    """The rows of one size of images."""
    width, height, module = SIZES[name]
    rows, all_cores = [], sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        files.write(pathlib.Path(folder), [(height, width)] * 32, split="all")
        listed = f"{folder}/splits/all/unlabeled.txt"
        source = FolderSource(folder, read_list(listed, labeled=False), listed, labels=None)
        paths = [os.path.join(folder, source.name(i)) for i in range(len(source))]
        for cores in core_counts:
            os.sched_setaffinity(0, all_cores[:cores])
            pil = measure_pil(paths, _config(module), cores, seconds)
            found = {"PIL": pil}
            for loader, device in (("ours", True), ("ours, host views", False)):
                config = _config(module)
                config.views.device = device
                found[loader] = measure_ours(source, config, cores, seconds)
            os.sched_setaffinity(0, all_cores)
            for loader, rate in found.items():
                rows.append({
                    "images": name, "loader": loader, "cores": cores, "samples/s": rate, "crops/s": 2 * rate,
                    "crops/s per core": 2 * rate / cores, "ratio": rate / pil,
                })  # fmt: skip
                tables.show(rows[-1:], COLUMNS)
    return rows


def _config(module):
    config = module.get_config()
    config.data.labeled_batch = 1
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each measurement")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="measured with 1 and with so many cores")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the results")
    arguments = parser.parse_args()
    rows = []
    for name in SIZES:
        rows += measure(name, arguments.seconds, sorted({1, arguments.cores}))
        tables.write(arguments.json, {"rows": rows})
    print()
    tables.show(rows, COLUMNS)


if __name__ == "__main__":
    main()
