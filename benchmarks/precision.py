"""Whether faster forms of the training step change results: `python -m benchmarks.precision --json=precision.json`.

Trains DSSN on the generated shapes with each form and seed, one run after the other, and prints the mean IoU after the
last step, in percent, with mean and standard deviation over seeds.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from benchmarks import tables

FORMS = {
    "float32": {"model.dtype": "float32"},
    "bfloat16": {"model.dtype": "bfloat16"},
    "float32, lean": {"model.dtype": "float32", "method.perturb_labeled": False},
}
NETWORKS = ("student", "teacher")


def train(form: str, seed: int, argument: str) -> dict[str, float]:
    """Trains once; returns the last mean IoU of each network."""
    keys = FORMS[form] | {"seed": seed, "train.pictures": 0}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "main.py", f"--config=configs/shapes.py:{argument}", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in keys.items()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((pathlib.Path(workdir) / "summary.json").read_text())
    return {network: summary[network]["last"]["miou"] for network in NETWORKS}


def table(scores: dict[str, list[dict]]) -> list[dict]:
    """Returns a row per form and network."""
    rows = []
    for form, runs in scores.items():
        for network in NETWORKS:
            values = [run[network] for run in runs]
            std = statistics.stdev(values) if len(values) > 1 else None
            row = {"form": form, "network": network, "mean": statistics.mean(values), "std": std}
            rows.append(row | {f"seed {i}": value for i, value in enumerate(values)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ...")
    parser.add_argument("--argument", default="steps=200", help="argument of configs/shapes.py")
    parser.add_argument("--json", type=pathlib.Path, help="file of the results")
    arguments = parser.parse_args()
    scores = {form: [] for form in arguments.forms}
    for seed in range(arguments.seeds):
        for form in arguments.forms:
            scores[form].append(train(form, seed, arguments.argument))
            print(f"{form}, seed {seed}: {scores[form][-1]}", flush=True)
            tables.write(arguments.json, {"argument": arguments.argument, "scores": scores})
    tables.show(table(scores))


if __name__ == "__main__":
    main()
