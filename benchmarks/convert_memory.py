"""Time and peak memory of converting weights: `python -m benchmarks.convert_memory --encoder=resnet101`.

Writes a checkpoint in the form of the original (student with the optimizer's state) and converts it, as student and
teacher, to a work directory and back, each with main.py in a process of its own. Needs PyTorch.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = {"resnet50": "cityscapes", "resnet101": "pascal", "xception": "coco"}
CLASSES = {"cityscapes": 19, "pascal": 21, "coco": 81}


def write_checkpoint(encoder: str, classes: int, path: str) -> None:
    """Writes a checkpoint of random weights in the form of the original's training."""
    import numpy as np
    import torch

    from tests.reference import torch_twin

    model = torch_twin.DeepLabV3Plus(encoder, classes)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state_dict = {f"module.{name}": value for name, value in model.state_dict().items()}
    checkpoint = {"model": state_dict, "optimizer": optimizer.state_dict(), "epoch": 1, "previous_best": np.float64(50)}
    torch.save(checkpoint, path)


def measure(work: str, *options: str) -> dict:
    """Runs `main.py --mode=convert` with options; returns a row with seconds and peak resident memory."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "main.py", "--mode=convert", *options], cwd=ROOT)
    # A process starts with the peak of its parent, so this one imports neither JAX nor PyTorch.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"converting failed: {' '.join(options)}")
    return {"work": work, "seconds": time.monotonic() - started, "peak MiB": round(usage.ru_maxrss / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=sorted(CONFIGS), default="resnet101")
    parser.add_argument("--write", help=argparse.SUPPRESS)  # The checkpoint to write, in a process of its own.
    arguments = parser.parse_args()
    encoder, dataset = arguments.encoder, CONFIGS[arguments.encoder]
    if arguments.write:
        write_checkpoint(encoder, CLASSES[dataset], arguments.write)
        return
    with tempfile.TemporaryDirectory(prefix="dssn_convert_") as folder:
        best, run = f"{folder}/best.pth", f"{folder}/run"
        command = [sys.executable, "-m", "benchmarks.convert_memory", f"--encoder={encoder}", f"--write={best}"]
        subprocess.run(command, cwd=ROOT, check=True)
        config = f"--config=configs/{dataset}.py:encoder={encoder}"
        rows = [
            measure("checkpoint -> work directory", config, f"--from={best}", f"--teacher={best}", f"--to={run}"),
            measure("work directory -> .pth", f"--from={run}", f"--to={folder}/back.pth"),
            measure("work directory -> .safetensors", f"--from={run}", f"--to={folder}/back.safetensors"),
            measure("encoder -> .safetensors", f"--from={best}", f"--to={folder}/b.safetensors", "--part=encoder"),
        ]
    from benchmarks import tables  # Imports JAX.

    print(f"\n{encoder}, {CLASSES[dataset]} classes")
    tables.show(rows)


if __name__ == "__main__":
    main()
