"""Trains the supervised baseline and DSSN on generated shapes with the same labels: `make demo`.

Prints the mean IoU of both and their difference, whichever way it comes out.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def train(method: str, workdir: pathlib.Path, options: list[str]) -> dict:
    """Trains one method through main.py and returns its summary."""
    command = [
        sys.executable,
        "main.py",
        f"--config=configs/shapes.py:method={method}",
        f"--workdir={workdir}",
        *options,
    ]
    print("$ python", *command[1:], flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((workdir / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, help="folder of both runs; default: a new temporary one")
    arguments, options = parser.parse_known_args()
    workdir = arguments.workdir or pathlib.Path(tempfile.mkdtemp(prefix="dssn_demo_"))
    rows = []
    for method in ("supervised", "dssn"):
        summary = train(method, workdir / method, options)
        for network in ("student", "teacher"):
            if network in summary:
                scores = summary[network]
                rows.append((method, network, scores["last"]["miou"], scores["best"]["miou"], summary["seconds"]))
    print(f"\nMean IoU on the validation images, per cent ({workdir})")
    print(f"{'method':12s} {'network':8s} {'last':>6s} {'best':>6s} {'seconds':>8s}")
    for method, network, last, best, seconds in rows:
        print(f"{method:12s} {network:8s} {last:6.2f} {best:6.2f} {seconds:8.0f}")
    supervised = rows[0][2]
    semi = max(last for method, _, last, _, _ in rows if method == "dssn")
    print(f"DSSN over supervised, last evaluation: {semi - supervised:+.2f} points")


if __name__ == "__main__":
    main()
