"""What padding to a few sizes saves an evaluation: `python -m benchmarks.eval_sizes`.

Evaluates one network on a folder of generated images of many sizes, padded to at most `config.eval.buckets` sizes, and
image by image at their own sizes, one compilation each. Prints compilations, seconds and mean IoU of both, and checks
that both count the same pixels. Times include compiling, which is what a user waits for.
"""

import argparse
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from benchmarks import tables
from configs import pascal
from dssn_jax.evaluation import evaluate, metrics
from dssn_jax.learner import learner as experiment
from experiments import folder as files
from input_pipeline.class_names import SHAPES_CLASSES

COMPILATION = "/jax/core/compile/backend_compile_duration"  # JAX reports each under this name.


class Compilations:
    """Counts XLA compilations of this process and their seconds."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_) -> None:
        if event == COMPILATION:
            self.count += 1
            self.seconds += seconds

    def reset(self) -> None:
        self.count, self.seconds = 0, 0.0


def sizes_of(images: int, different: int, smallest: int, largest: int) -> list[files.Size]:
    """`images` sizes, `different` of them, drawn like those of photographs: wide and tall ones."""
    rng = np.random.default_rng(0)
    found: dict[files.Size, None] = {}
    while len(found) < different:
        found[tuple(rng.integers(smallest, largest, 2, endpoint=True).tolist())] = None
    return list(itertools.islice(itertools.cycle(found), images))


def configuration(root: pathlib.Path, backbone: str, batch: int):
    config = pascal.get_config(f"split=183,encoder={backbone},method=supervised")
    config.data.root, config.data.classes, config.eval.batch = str(root), SHAPES_CLASSES, batch
    config.data.splits = str(root / "splits/pascal")
    return config


def one_by_one(evaluator: evaluate.Evaluator, source) -> Iterator:
    """Each image as a group of its own, at its own size."""
    return itertools.chain.from_iterable(evaluator.groups(source, indices=[index]) for index in range(len(source)))


def measure(name: str, evaluator, networks: dict, groups: Iterable, compilations: Compilations) -> tuple[dict, dict]:
    """Evaluates once; returns a row of the table and the confusion matrices."""
    compilations.reset()
    started = time.perf_counter()
    confusions = evaluator(networks, groups)
    seconds = time.perf_counter() - started
    miou = 100 * float(metrics.iou(confusions["student"]).mean())
    row = {"evaluation": name, "compilations": compilations.count, "of it s": compilations.seconds, "s": seconds}
    print(f"{name}: {compilations.count} compilations, {seconds:.1f} s", flush=True)
    return row | {"mIoU": miou}, confusions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--sizes", type=int, default=120, help="different ones among them")
    parser.add_argument("--smallest", type=int, default=48, help="smallest side, pixels")
    parser.add_argument("--largest", type=int, default=128, help="largest side, pixels")
    parser.add_argument("--backbone", default="resnet18w16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=pathlib.Path, help="where to write the results")
    arguments = parser.parse_args()
    sizes = sizes_of(arguments.images, arguments.sizes, arguments.smallest, arguments.largest)
    compilations = Compilations()
    rows, found = [], []
    with tempfile.TemporaryDirectory() as root:
        files.write(pathlib.Path(root), sizes, validation=len(sizes))
        for name, batch in (("padded to a few sizes", arguments.batch), ("one compilation a size", 1)):
            config = configuration(pathlib.Path(root), arguments.backbone, batch)
            parts = experiment.build(config, jax.devices()[:1])
            networks = parts.initial_state().networks()
            evaluator, source = evaluate.Evaluator(parts.model, config, parts.mesh), parts.sources.val
            groups = evaluator.groups(source) if batch > 1 else one_by_one(evaluator, source)
            row, confusions = measure(name, evaluator, networks, groups, compilations)
            rows.append(row)
            found.append(confusions["student"])
    tables.show(rows)
    ratio = rows[1]["s"] / rows[0]["s"]
    differing = int(np.abs(found[0] - found[1]).sum() // 2)
    print(
        f"{ratio:.1f} times the time without padding; {differing} of {found[0].sum()} pixels differ (float32 rounding)"
    )
    tables.write(arguments.json, {"arguments": {**vars(arguments), "json": None}, "rows": rows, "ratio": ratio})
    return 0 if found[0].sum() == found[1].sum() else 1


if __name__ == "__main__":
    sys.exit(main())
