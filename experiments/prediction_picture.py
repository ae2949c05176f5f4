"""Draws docs/images/prediction.png: what runs on the generated shapes predict.

`python -m experiments.prediction_picture RUN [RUN...]`, such as the two runs of
`python -m experiments.demo --workdir=FOLDER`. Columns: image, predicted classes of each run, and ground truth.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image

from dssn_jax import visualize
from dssn_jax.evaluation.evaluate import Evaluator
from dssn_jax.workdir.restore import pick_network, restore
from input_pipeline.sources.open import open_source

MAGNIFICATION = 3


def columns(workdir: str, rows: int) -> dict[str, np.ndarray]:
    """Returns {"image", "prediction", "truth"} of the first validation images of a run, uint8 [rows, H, W, 3] each."""
    restored = restore(workdir, "latest")
    learner = restored.learner
    evaluator = Evaluator(learner)
    batch = next(evaluator.batches(open_source(learner.config, "val")))
    images = batch.images[:rows]
    class_maps = evaluator.class_maps(restored.networks[pick_network(restored.networks)], batch)[:rows]
    maps = {"prediction": class_maps, "truth": batch.labels[:rows]}
    overlaid = {name: visualize.overlay(images, each, learner.network.num_classes) for name, each in maps.items()}
    return {"image": images, **overlaid}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="work directory")
    parser.add_argument("--rows", type=int, default=4, help="number of images")
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("docs/images/prediction.png"))
    arguments = parser.parse_args()
    runs = [columns(run, arguments.rows) for run in arguments.runs]
    panel = visualize.panel(runs[0]["image"], *(run["prediction"] for run in runs), runs[0]["truth"])
    picture = Image.fromarray(panel)
    size = [MAGNIFICATION * side for side in picture.size]
    picture.resize(size, Image.Resampling.NEAREST).save(arguments.to)
    print(f"wrote {arguments.to}")


if __name__ == "__main__":
    main()
