"""Trains the supervised baseline and DSSN on generated shapes with the same labels: `make demo`.

Prints the mean IoU of both and their difference. Further options are passed to main.py, for both runs.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import tabulate

from dssn_jax.evaluation import metrics
from dssn_jax.learner.state import deployed

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*arguments: str) -> None:
    """Runs main.py with `arguments` and shows the command; exits with its code if it fails."""
    print("$", shlex.join(["python", "main.py", *arguments]), flush=True)
    done = subprocess.run([sys.executable, "main.py", *arguments], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def train(config: str, methods: Sequence[str], workdir: pathlib.Path, options: list[str]) -> dict[str, dict]:
    """Trains `methods` of a config file with its arguments, in folders of their own; returns their summaries.

    A run that was stopped continues, a finished one is not repeated.
    """
    summaries = {}
    for method in methods:
        run(f"--config={config}method={method}", f"--workdir={workdir / method}", *options)
        summaries[method] = json.loads((workdir / method / "summary.json").read_text())
    return summaries


def print_scores(summaries: dict[str, dict], workdir: pathlib.Path) -> None:
    """Prints the scores of each method's networks, and how far the deployed ones are above the first method's."""
    rows, last = [], {}
    for method, summary in summaries.items():
        networks = metrics.last_scores(summary)
        for name, scores in networks.items():
            rows.append((method, name, scores["miou"], summary[name]["best"]["miou"], summary["seconds"]))
        last[method] = networks[deployed(networks)]["miou"]
    print(f"\nMean IoU on the validation images, in percent ({workdir})")
    titles = ("method", "network", "last", "best", "seconds")
    print(tabulate.tabulate(rows, titles, floatfmt=("", "", ".2f", ".2f", ".0f")))
    baseline, *others = last
    for method in others:
        print(
            f"{method} over {baseline}, deployed network, last evaluation: {last[method] - last[baseline]:+.2f} points"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, help="folder for both runs (default: a new temporary folder)")
    arguments, options = parser.parse_known_args()
    workdir = (arguments.workdir or pathlib.Path(tempfile.mkdtemp(prefix="dssn_demo_"))).resolve()
    print_scores(train("configs/shapes.py:", ("supervised", "dssn"), workdir, options), workdir)


if __name__ == "__main__":
    main()
