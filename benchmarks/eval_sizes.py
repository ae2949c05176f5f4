"""Times an evaluation with and without padding to a few sizes: `python -m benchmarks.eval_sizes`.

Evaluates a network on generated images of many sizes, first padded to at most `config.eval.buckets` sizes, then one by
one at their own sizes, with a program for each. Prints the compiled programs, seconds and mean IoU of both, and checks
that both count the same pixels. Times include compiling, because users wait for it too.
"""

import argparse
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks import tables, train_step
from configs import pascal
from dssn_jax.evaluation import metrics
from dssn_jax.evaluation.evaluate import Evaluator
from experiments import folder
from experiments.compilations import Compilations
from input_pipeline.class_names import SHAPES_CLASSES
from input_pipeline.eval_batches import EvalBatch
from input_pipeline.sources.open import Source, open_source


def random_sizes(images: int, different: int, smallest: int, largest: int) -> list[folder.Size]:
    """Returns the sizes of `images` wide and tall images, `different` ones among them."""
    rng = np.random.default_rng(0)
    sizes: dict[folder.Size, None] = {}
    while len(sizes) < different:
        sizes[tuple(rng.integers(smallest, largest, 2, endpoint=True).tolist())] = None
    return list(itertools.islice(itertools.cycle(sizes), images))


def configure(root: str, encoder: str, batch: int):
    """Returns the configuration of an evaluation of the images in the folder `root`."""
    config = pascal.get_config(f"split=183,encoder={encoder},method=supervised")
    config.data.root, config.data.classes, config.eval.batch = root, SHAPES_CLASSES, batch
    config.data.splits = f"{root}/splits/pascal"
    return config


def one_by_one(evaluator: Evaluator, source: Source) -> Iterator[EvalBatch]:
    """Yields each image in a batch of its own, at its own size."""
    return itertools.chain.from_iterable(evaluator.batches(source, indices=[index]) for index in range(len(source)))


def measure(name: str, config, padded: bool, compilations: Compilations) -> tuple[dict, np.ndarray]:
    """Evaluates once; returns a row of the table and the confusion matrix."""
    learner = train_step.build(config, jax.devices()[:1])
    networks = learner.init_state().networks()
    evaluator, source = Evaluator(learner), open_source(config, "val")
    compilations.take()
    started = time.perf_counter()
    batches = evaluator.batches(source) if padded else one_by_one(evaluator, source)
    confusion = evaluator(networks, batches)["student"]
    seconds, counts = time.perf_counter() - started, compilations.take()
    row = {"evaluation": name, "programs": counts["compiled"] + counts["loaded"]}
    row |= {"compile s": counts["compile_seconds"], "s": seconds, "mIoU": 100 * metrics.mean_iou(confusion)}
    tables.show([row])
    return row, confusion


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--sizes", type=int, default=120, help="number of different sizes")
    parser.add_argument("--smallest", type=int, default=48, help="smallest side, pixels")
    parser.add_argument("--largest", type=int, default=128, help="largest side, pixels")
    parser.add_argument("--encoder", default="resnet18w16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=pathlib.Path, help="file of the results")
    arguments = parser.parse_args()
    sizes = random_sizes(arguments.images, arguments.sizes, arguments.smallest, arguments.largest)
    compilations = Compilations()
    with tempfile.TemporaryDirectory() as root:
        folder.write(pathlib.Path(root), sizes, val=len(sizes))
        config = configure(root, arguments.encoder, arguments.batch)
        padded, padded_counts = measure("padded to a few sizes", config, True, compilations)
        config.eval.batch = 1
        alone, counts = measure("each at its own size", config, False, compilations)
    ratio = alone["s"] / padded["s"]
    differing = int(np.abs(padded_counts - counts).sum() // 2)
    print(f"{ratio:.1f} times the time without padding; {differing} of {counts.sum()} pixels differ (float32 rounding)")
    rows = [padded, alone]
    tables.write(arguments.json, {"arguments": {**vars(arguments), "json": None}, "rows": rows, "ratio": ratio})
    return 0 if padded_counts.sum() == counts.sum() else 1


if __name__ == "__main__":
    sys.exit(main())
