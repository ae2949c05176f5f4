"""Draws docs/images/prediction.jpg: what runs predict on some of their validation images.

`python -m experiments.prediction_picture RUN [RUN...]`, such as the two runs of `python -m experiments.real_demo`.
Columns: image, predicted classes of each run (its last checkpoint, the deployed network), and ground truth. The images
are not chosen by what is predicted: of n rows, row i has the image in the middle of the i-th of n equal parts of the
validation list.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image

from dssn_jax import visualize
from dssn_jax.evaluation.evaluate import Evaluator
from dssn_jax.workdir.restore import pick_network, restore
from input_pipeline.sources.open import open_source

COLUMNS = ("image", "prediction", "truth")
WIDTH = 144  # Least width of a column, in pixels: smaller images are magnified.


def spread(rows: int, count: int) -> list[int]:
    """Returns the numbers of at most `rows` of `count` images, the middles of equal parts of their list."""
    rows = min(rows, count)
    return [(2 * row + 1) * count // (2 * rows) for row in range(rows)]


def columns(workdir: str, rows: int) -> dict[str, np.ndarray]:
    """Returns {"image", "prediction", "truth"} of validation images of a run, uint8 [rows, H, W, 3] each.

    Images smaller than the largest are padded with black.
    """
    restored = restore(workdir, "latest")
    learner = restored.learner
    evaluator, source = Evaluator(learner), open_source(learner.config, "val")
    variables = restored.networks[pick_network(restored.networks)]
    classes, pictures = learner.network.num_classes, {}
    for batch in evaluator.batches(source, indices=spread(rows, len(source))):
        class_maps = evaluator.class_maps(variables, batch)
        for row, (index, (height, width)) in enumerate(zip(batch.indices, batch.sizes, strict=False)):
            image, *maps = (each[row, :height, :width] for each in (batch.images, class_maps, batch.labels))
            pictures[index] = [image, *(visualize.overlay(image, each, classes) for each in maps)]
    chosen = [pictures[index] for index in sorted(pictures)]
    height, width = np.max([row[0].shape[:2] for row in chosen], axis=0)
    padded = [[_pad(picture, height, width) for picture in row] for row in chosen]
    return {name: np.stack(column) for name, column in zip(COLUMNS, zip(*padded, strict=True), strict=True)}


def _pad(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.pad(picture, ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="work directory")
    parser.add_argument("--rows", type=int, default=4, help="number of images")
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("docs/images/prediction.jpg"))
    arguments = parser.parse_args()
    runs = [columns(run, arguments.rows) for run in arguments.runs]
    panel = visualize.panel(runs[0]["image"], *(run["prediction"] for run in runs), runs[0]["truth"])
    picture = Image.fromarray(panel)
    magnification = -(-WIDTH // runs[0]["image"].shape[2])
    size = [magnification * side for side in picture.size]
    picture.resize(size, Image.Resampling.NEAREST).save(arguments.to, quality=90)
    print(f"wrote {arguments.to}")


if __name__ == "__main__":
    main()
