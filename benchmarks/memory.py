"""Memory of a training step by backbone: what `dssn_jax.automatic` chooses batches by. `python -m benchmarks.memory`.

Compiles the DSSN step, in float32, for 1 + 1 and for 2 + 2 images and reads the compiler's plan; nothing is run.
Columns: MiB of the state (parameters, teacher, momentum); MiB of temporary arrays that do not grow with the batch
(gradients); and bytes of temporary arrays for each pixel of each image of a batch (labeled or unlabeled).
"""

import argparse
import json
import pathlib
import subprocess
import sys

from benchmarks import tables

BACKBONES = ("resnet10w16", "resnet18w16", "resnet18", "resnet50", "resnet101", "xception")
CROP, CLASSES = 129, 21


def planned(backbone: str, batch: int, crop: int) -> dict[str, int]:
    """Returns the bytes that the compiled step of `batch` + `batch` images plans for: {"arguments", "temporary"}."""
    import jax

    from benchmarks.scaling import abstract_step
    from configs import defaults
    from dssn_jax import sharding

    config = defaults.get_config()
    config.data.classes = tuple(map(str, range(CLASSES)))
    config.data.labeled_batch = config.data.unlabeled_batch = batch
    config.data.crop, config.model.encoder = crop, backbone
    step, state, batch = abstract_step(config, sharding.make_mesh(jax.devices()[:1]))
    plan = step.lower(state, batch).compile().memory_analysis()
    return {"arguments": plan.argument_size_in_bytes, "temporary": plan.temp_size_in_bytes}


def row(backbone: str, crop: int) -> dict:
    """Compiles both batches, each in a process of its own, and returns a line of the table."""
    plans = []
    for batch in (1, 2):
        command = [sys.executable, "-m", "benchmarks.memory", f"--plan={backbone},{batch},{crop}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        plans.append(json.loads(done.stdout.splitlines()[-1])["temporary"])
    state = json.loads(done.stdout.splitlines()[-1])["arguments"]
    each = (plans[1] - plans[0]) / 2  # Two images more.
    return {
        "backbone": backbone, "state_MiB": round(state / 2**20), "fixed_MiB": round((plans[0] - 2 * each) / 2**20),
        "bytes_a_pixel": round(each / crop**2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, choices=BACKBONES)
    parser.add_argument("--crop", type=int, default=CROP)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        backbone, *numbers = options.plan.split(",")
        print(json.dumps(planned(backbone, *map(int, numbers))))
        return
    rows = []
    for backbone in options.backbones:
        rows.append(row(backbone, options.crop))
        print(rows[-1], flush=True)
        tables.write(options.json, {"crop": options.crop, "rows": rows})
    tables.show(rows)


if __name__ == "__main__":
    main()
