"""Memory of a training step by encoder, by which `dssn_jax.auto_config` chooses batches: `python -m benchmarks.memory`.

Compiles the DSSN step in float32 for 1 + 1 and for 2 + 2 images and reads the compiler's plan; nothing is run. The crop
is 129; with a vision transformer, whose attention takes more per pixel the larger the crop, that of VOC. Columns:
MiB of the state (parameters, teacher, momentum); MiB of temporary arrays that do not grow with the batch (gradients);
bytes of temporary arrays per pixel of each image of a batch (labeled or unlabeled).
"""

import argparse
import json
import pathlib
import subprocess
import sys

import jax

from benchmarks import tables, train_step
from configs import arguments, encoders

ENCODERS = (
    "resnet10w16", "resnet18w16", "resnet18", "resnet50", "resnet101", "xception", "efficientnet_lite0",
    "efficientnet_lite2", "dinov2_w64", "dinov2_small", "dinov2_base",
)  # fmt: skip
CROP, VOC_CROP, CLASSES = 129, 513, 21


def planned(encoder: str, batch: int, crop: int) -> dict[str, int]:
    """Returns the bytes planned for the compiled step of `batch` + `batch` images: {"arguments", "temporary"}."""
    values = {"encoder": encoder, "method": "dssn", "crop": crop}
    config = arguments.recipe("", values, tuple(map(str, range(CLASSES))))
    config.data.labeled_batch = config.data.unlabeled_batch = batch
    config.views.mix_partner = "other"  # A single image has no partner in its batch.
    plan = train_step.lower(config, jax.devices()[:1]).compile().memory_analysis()
    return {"arguments": plan.argument_size_in_bytes, "temporary": plan.temp_size_in_bytes}


def measure(encoder: str, crop: int) -> dict:
    """Compiles both batches, each in a process of its own, and returns a row of the table."""
    plans = []
    for batch in (1, 2):
        command = [sys.executable, "-m", "benchmarks.memory", f"--plan={encoder},{batch},{crop}"]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        plans.append(json.loads(output.splitlines()[-1]))
    small, large = (plan["temporary"] for plan in plans)
    per_image = (large - small) / 2  # Two more images.
    return {
        "encoder": encoder,
        "crop": crop,
        "state_MiB": round(plans[1]["arguments"] / 2**20),
        "fixed_MiB": round((small - 2 * per_image) / 2**20),
        "bytes_per_pixel": round(per_image / crop**2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=ENCODERS, choices=ENCODERS)
    parser.add_argument("--crop", type=int, default=0, help="0: see above")
    parser.add_argument("--json", type=pathlib.Path, help="file of the results")
    parser.add_argument("--plan", help=argparse.SUPPRESS)  # Encoder, batch, crop: one plan, as JSON.
    options = parser.parse_args()
    if options.plan:
        encoder, *numbers = options.plan.split(",")
        print(json.dumps(planned(encoder, *map(int, numbers))))
        return
    rows = []
    for encoder in options.encoders:
        default = CROP if encoders.find_family(encoder) is None else encoders.nearest_crop(encoder, VOC_CROP)
        rows.append(measure(encoder, options.crop or default))
        print(rows[-1], flush=True)
        tables.write(options.json, {"rows": rows})
    tables.show(rows)


if __name__ == "__main__":
    main()
