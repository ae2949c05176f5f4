"""Time and peak memory of converting weights: `python -m benchmarks.convert_memory --backbone=resnet101`.

Makes a checkpoint in the original's form (student and teacher, with an optimizer's state) and converts it to a work
directory and back, each in a process of its own, through main.py. Needs PyTorch.
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


def write_checkpoint(backbone: str, classes: int, path: str) -> None:
    """Writes random weights as the original's training does."""
    import numpy as np
    import torch

    from tests.reference import torch_twin

    model = torch_twin.DeepLabV3Plus(backbone, classes)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state_dict = {f"module.{name}": value for name, value in model.state_dict().items()}
    checkpoint = {"model": state_dict, "optimizer": optimizer.state_dict(), "epoch": 1, "previous_best": np.float64(50)}
    torch.save(checkpoint, path)


def measure(*options: str) -> tuple[float, float]:
    """Runs `main.py --mode=convert` with options; returns its seconds and its peak resident memory, MiB."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "main.py", "--mode=convert", *options], cwd=ROOT)
    # A process starts with its parent's peak, so this one, which imports neither JAX nor PyTorch, must stay small.
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"converting failed: {' '.join(options)}")
    return time.monotonic() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=sorted(CONFIGS), default="resnet101")
    parser.add_argument("--write", help=argparse.SUPPRESS)  # The checkpoint to write, in a process of its own.
    arguments = parser.parse_args()
    backbone, dataset = arguments.backbone, CONFIGS[arguments.backbone]
    if arguments.write:
        write_checkpoint(backbone, CLASSES[dataset], arguments.write)
        return
    with tempfile.TemporaryDirectory(prefix="dssn_convert_") as folder:
        best, run = f"{folder}/best.pth", f"{folder}/run"
        command = [sys.executable, "-m", "benchmarks.convert_memory", f"--backbone={backbone}", f"--write={best}"]
        subprocess.run(command, cwd=ROOT, check=True)
        config = f"--config=configs/{dataset}.py:encoder={backbone}"
        rows = [
            ("checkpoint -> work directory", measure(config, f"--from={best}", f"--teacher={best}", f"--to={run}")),
            ("work directory -> .pth", measure(f"--from={run}", f"--to={folder}/back.pth")),
            ("work directory -> .safetensors", measure(f"--from={run}", f"--to={folder}/back.safetensors")),
            ("backbone -> .safetensors", measure(f"--from={best}", f"--to={folder}/b.safetensors", "--part=backbone")),
        ]
    print(f"\n{backbone}, {CLASSES[dataset]} classes{'':14s} {'seconds':>8s} {'peak MiB':>9s}")
    for name, (seconds, memory) in rows:
        print(f"{name:34s} {seconds:8.1f} {memory:9.0f}")


if __name__ == "__main__":
    main()
