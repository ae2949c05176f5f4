"""Draws docs/images/prediction.png: what a run on the generated shapes predicts.

`python -m benchmarks.prediction_picture RUN [RUN...]`, such as the two of `python -m benchmarks.demo --workdir=FOLDER`:
columns are the image, the class map of each run (teacher, if it has one) and the truth, laid over the image.
"""

import argparse
import functools
import pathlib

import numpy as np
from PIL import Image

from dssn_jax import sharding
from dssn_jax import visualize as pictures
from dssn_jax.evaluation import evaluate
from dssn_jax.workdir import restore as saved_run
from input_pipeline.sources.open import open_sources

MAGNIFIED = 3  # The images are small.


def columns(workdir: str, rows: int) -> dict[str, np.ndarray]:
    """The image, prediction and truth of the first validation images of a run, uint8 [rows, H, W, 3] each."""
    mesh = sharding.make_mesh()
    saved = saved_run.restore_networks(workdir, "latest", mesh=mesh)
    variables = saved.variables[saved_run.choose_network(workdir, saved.variables, None)]
    evaluator = evaluate.Evaluator(saved.model, saved.config, mesh)
    group = next(evaluator.groups(open_sources(saved.config).val))
    over = functools.partial(pictures.overlay, group.images[:rows], num_classes=len(saved.config.data.classes))
    prediction = evaluator.class_maps(variables, group)[:rows]
    return {"image": group.images[:rows], "prediction": over(prediction), "truth": over(group.labels[:rows])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("docs/images/prediction.png"))
    arguments = parser.parse_args()
    found = [columns(run, arguments.rows) for run in arguments.runs]
    panel = pictures.panel(found[0]["image"], *(each["prediction"] for each in found), found[0]["truth"])
    picture = Image.fromarray(panel)
    picture.resize([MAGNIFIED * side for side in picture.size], Image.Resampling.NEAREST).save(arguments.to)
    print(f"wrote {arguments.to}")


if __name__ == "__main__":
    main()
