"""Trains the supervised baseline and DSSN on generated shapes with the same labels: `make demo`.

Prints the mean IoU of both and their difference. Further options are passed to main.py, for both runs.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import tabulate

ROOT = pathlib.Path(__file__).resolve().parent.parent


def train(method: str, workdir: pathlib.Path, options: list[str]) -> dict:
    """Trains one method with main.py and returns its summary."""
    command = ["main.py", f"--config=configs/shapes.py:method={method}", f"--workdir={workdir}", *options]
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return json.loads((workdir / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, help="folder for both runs (default: a new temporary folder)")
    arguments, options = parser.parse_known_args()
    workdir = (arguments.workdir or pathlib.Path(tempfile.mkdtemp(prefix="dssn_demo_"))).resolve()
    rows = []
    for method in ("supervised", "dssn"):
        summary = train(method, workdir / method, options)
        for network in ("student", "teacher"):
            if network in summary:
                scores = summary[network]
                rows.append((method, network, scores["last"]["miou"], scores["best"]["miou"], summary["seconds"]))
    print(f"\nMean IoU on the validation images, in percent ({workdir})")
    titles = ("method", "network", "last", "best", "seconds")
    print(tabulate.tabulate(rows, titles, floatfmt=("", "", ".2f", ".2f", ".0f")))
    supervised = rows[0][2]
    dssn = max(last for method, _, last, _, _ in rows if method == "dssn")
    print(f"DSSN over supervised, last evaluation: {dssn - supervised:+.2f} points")


if __name__ == "__main__":
    main()
