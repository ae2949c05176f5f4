"""Results of `experiments.compare`: reads finished runs, computes statistics over seeds, writes JSON and Markdown."""

import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tabulate

from dssn_jax.evaluation.metrics import NETWORKS
from dssn_jax.learner.state import deployed
from dssn_jax.workdir import files, records
from experiments import compare_plots

RUNS = "runs"  # Folder of the work directories.
RESULT = "result.json"  # In the work directory of a finished run: which run it is.
COMPARISON = "comparison.json"  # Config file, commands and base configuration, common to all runs.
_COMPARISON_TYPES = {"config": str, "commands": list, "base": dict}
BASELINE = "supervised"
_ORDER = (BASELINE, "fixmatch", "unimatch", "dssn")  # Order of the rows; other variants follow.
MOST_CLASSES = 40  # With more, the table by class is too wide to read; results.json has it.
RARE = 0.25  # Share of the classes, the rarest of the validation images, whose IoU is tabled.
# best: the largest mean IoU of all evaluations, of student or teacher, as the paper reports it; selected on the
# validation images | last: that of the last evaluation, of the deployed network; nothing is selected.
COMPARED = {"best": "Best mIoU of student or teacher", "last": "Last mIoU of the deployed network"}
MEASURES = (*(f"{network}_{name}" for network in NETWORKS for name in COMPARED), *COMPARED)
_LEGEND = f"""
- Best: the largest of all evaluations of a run, of student or teacher, as the paper reports it. It is selected on the
  validation images, and so flatters every method.
- Last: after the last step, of the deployed network, which predictions and exports use: the teacher if there is one,
  else the student. Nothing is selected. IoU of single classes is of this network.
- Over {BASELINE}: difference of the means in points and, in brackets, in standard deviations (Cohen's d; the root of
  the mean of both variances).
- Seconds per run: the median over seeds. Programs are compiled once for all seeds.
"""
_GRID_LEGEND = """- Of the values of a grid, the overview and the baseline of all differences use those with the largest
  mean of last, for each method (marked *).
"""


class Outcome(NamedTuple):
    """A finished run. A run that diverged has no scores."""

    variant: str
    changes: dict[str, str]  # Keys in which the variant differs from its method.
    split: str
    values: dict[str, str]  # Values of the grid.
    seed: int
    diverged: str  # The error message; "" if the run did not diverge.
    run_info: dict  # See `dssn_jax.training.loop.run_info`.
    scores: dict[str, float]  # By name of MEASURES, in percent.
    iou: dict[str, float]  # By class, of the last evaluation of the deployed network, in percent.
    shares: dict[str, float]  # Share of the pixels of the validation images by class, in [0, 1].
    seconds: float

    @property
    def cell(self) -> tuple:
        """Identifies the runs that differ by the seed alone."""
        return self.split, self.variant, tuple(self.values.items())


class Statistic(NamedTuple):
    """Mean and sample standard deviation (None for a single value) of n values."""

    mean: float
    std: float | None
    n: int


def read_comparison(out: pathlib.Path) -> dict[str, Any]:
    """Returns the content of `COMPARISON` in `out`; raises WorkdirError if keys are missing or of another type."""
    comparison = records.read_json(out, COMPARISON)
    for key, kind in _COMPARISON_TYPES.items():
        if not isinstance(comparison.get(key), kind):
            raise records.WorkdirError(
                f"{out / COMPARISON}: no {kind.__name__} {key!r} in it; expected the file that a comparison writes "
                "there, not its results. Delete it and repeat the command: finished runs are kept"
            )
    return comparison


def read(out: pathlib.Path) -> list[Outcome]:
    """Returns the finished runs in `out`, by name; raises WorkdirError."""
    folders = sorted(path.parent for path in (out / RUNS).glob(f"*/{RESULT}"))
    return [_read_outcome(folder) for folder in folders]


def _read_outcome(workdir: pathlib.Path) -> Outcome:
    result = records.read_json(workdir, RESULT)
    diverged = result.get("diverged", "")
    summary = {} if diverged else records.read_json(workdir, records.SUMMARY)
    networks = [name for name in NETWORKS if name in summary]
    scores = {f"{name}_{which}": summary[name][which]["miou"] for name in networks for which in COMPARED}
    iou, shares = {}, {}
    if networks:
        network = deployed(networks)
        scores |= {"best": max(scores[f"{name}_best"] for name in networks), "last": scores[f"{network}_last"]}
        iou = summary[network]["last"]["iou"]
        pixels = np.array(records.read_json(workdir, records.CONFUSION)[network]).sum(1)
        shares = dict(zip(iou, (pixels / pixels.sum()).tolist(), strict=True))
    return Outcome(
        **{key: result[key] for key in ("variant", "changes", "split", "values", "seed")},
        diverged=diverged,
        run_info=records.read_json(workdir, records.RUN),
        scores=scores,
        iou=iou,
        shares=shares,
        seconds=summary.get("seconds", math.nan),
    )


def describe(values: Iterable[float]) -> Statistic | None:
    """Returns the statistic of `values`, or None if there are none."""
    values = list(values)
    if not values:
        return None
    return Statistic(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def difference(method: Statistic | None, baseline: Statistic | None) -> dict[str, float | None] | None:
    """Returns {"points", "cohens_d"} of `method` over `baseline`.

    Cohen's d divides by the root of the mean of both variances, as for samples of equal size. It is None if one of them
    is unknown or both are 0.
    """
    if method is None or baseline is None:
        return None
    points, cohens_d = method.mean - baseline.mean, None
    if method.std is not None and baseline.std is not None:
        pooled = math.sqrt((method.std**2 + baseline.std**2) / 2)
        cohens_d = points / pooled if pooled > 0 else None
    return {"points": points, "cohens_d": cohens_d}


def summarize(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Returns a row per split, variant and values of the grid; in "chosen" ones a variant has its best values.

    Those have the most finished seeds and then the largest mean of "last", for all variants alike. Differences are to
    the baseline with its chosen values.
    """
    cells: dict[tuple, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.seed):
        cells.setdefault(outcome.cell, []).append(outcome)
    rows = [_row(runs) for runs in cells.values()]
    for split, variant in dict.fromkeys((row["split"], row["variant"]) for row in rows):
        candidates = [row for row in rows if (row["split"], row["variant"]) == (split, variant) and row["last"]]
        if candidates:
            max(candidates, key=lambda row: (row["last"].n, row["last"].mean))["chosen"] = True
    baselines = {row["split"]: row for row in rows if row["chosen"] and row["variant"] == BASELINE}
    for row in rows:
        baseline = baselines.get(row["split"], dict.fromkeys(COMPARED))
        row["over_baseline"] = {
            name: None if row is baseline else difference(row[name], baseline[name]) for name in COMPARED
        }
    return sorted(rows, key=_place)


def _row(runs: list[Outcome]) -> dict[str, Any]:
    first, scored = runs[0], [run for run in runs if run.scores]
    return {
        "split": first.split,
        "labels": first.run_info["images"]["labeled"],
        "steps": first.run_info["steps"],
        "variant": first.variant,
        "changes": first.changes,
        "values": first.values,
        "chosen": False,
        "diverged": sum(bool(run.diverged) for run in runs),
        **{name: describe(run.scores[name] for run in scored if name in run.scores) for name in MEASURES},
        "iou": {name: describe(run.iou[name] for run in scored) for name in (scored[0].iou if scored else ())},
        "seconds": statistics.median(run.seconds for run in scored) if scored else None,
        "seeds": {run.seed: run.scores for run in runs},
    }


def _place(row: dict) -> tuple:
    """Returns the sort key of a row: by number of labels, baselines before the ablations."""
    variant = row["variant"]
    rank = _ORDER.index(variant) if variant in _ORDER else len(_ORDER)
    return row["labels"], row["split"], rank, variant, list(row["values"].values())


def rare_classes(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Returns the rarest classes of the validation images with their share of the pixels, the rarest first."""
    shares = next((outcome.shares for outcome in outcomes if outcome.shares), {})
    return dict(sorted(shares.items(), key=lambda item: item[1])[: math.ceil(RARE * len(shares))])


def write(out: pathlib.Path) -> None:
    """Writes results.json, results.md, results.png and results.svg of the finished runs in `out`."""
    rows = write_tables(out)
    if rows:
        compare_plots.write([row for row in rows if row["chosen"]], COMPARED, out)
    else:
        print(f"{out}: no run is finished", flush=True)


def write_tables(out: pathlib.Path) -> list[dict]:
    """Writes results.json and results.md of the finished runs in `out`; returns the rows."""
    comparison, outcomes = read_comparison(out), read(out)
    rows, rare = summarize(outcomes), rare_classes(outcomes)
    content = {key: comparison[key] for key in ("config", "commands")}
    content["devices"] = sorted({outcome.run_info["devices"] for outcome in outcomes})
    runs = [outcome._asdict() for outcome in outcomes]
    records.write_json(out / "results.json", {**content, "rare": rare, "rows": _plain(rows), "runs": runs})
    with files.atomic_write(out / "results.md") as part:
        part.write_text(_markdown(rows, rare, content, len(outcomes)))
    return rows


def _plain(value):
    """Returns nested rows with statistics as dicts, which JSON would write as lists."""
    if isinstance(value, Statistic):
        return value._asdict()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _markdown(rows: list[dict], rare: dict[str, float], content: dict, runs: int) -> str:
    """Returns both measures of the methods over the splits, then everything about each split."""
    counts = " or ".join(str(count) for count in sorted({len(row["seeds"]) for row in rows})) or "no"
    legend = (
        f"{runs} runs, {counts} seeds per cell, on {', '.join(content['devices']) or 'no device'}. Mean ± sample "
        f"standard deviation over seeds, in percent, on the validation images.\n{_LEGEND}"
    ) + _GRID_LEGEND * any(row["values"] for row in rows)
    commands = "\n".join(f"    {command}" for command in content["commands"])
    sections = [f"# Methods compared: {content['config']}", legend.strip(), f"Run by:\n\n{commands}"]
    for measure, title in COMPARED.items():
        sections += [f"## {title}", _overview([row for row in rows if row["chosen"]], measure)]
    for split in dict.fromkeys(row["split"] for row in rows):
        of_split = [row for row in rows if row["split"] == split]
        first = of_split[0]
        sections += [f"## Split {split}: {first['labels']} labels, {first['steps']} steps", _details(of_split, rare)]
        if by_class := _by_class(of_split):
            sections += [f"IoU by class, last, and points over {BASELINE}:", by_class]
    if rare:
        listed = ", ".join(f"{name} {100 * share:.2g}%" for name, share in rare.items())
        sections.append(f"Rarest classes and their share of the validation pixels: {listed}.")
    return "\n\n".join(sections) + "\n"


def _overview(rows: list[dict], measure: str) -> str:
    """Returns a table of methods x splits."""
    table = {}
    for row in sorted(rows, key=lambda row: _place(row)[2:]):
        over = _difference_text(row["over_baseline"][measure])
        text = _text(row[measure]) + (f"; {over}" if over else "")
        table.setdefault(row["variant"], {})[row["split"]] = text
    titles = {row["split"]: f"{row['split']} ({row['labels']} labels)" for row in rows}
    lines = [[variant, *(cells.get(split, "") for split in titles)] for variant, cells in table.items()]
    return _table(["method", *titles.values()], lines)


def _details(rows: list[dict], rare: dict[str, float]) -> str:
    """Returns a table with a line per method and values of the grid, and every measure."""
    titles = [
        "method", "changes", "n", "student best", "student last", "teacher best", "teacher last",
        "best", f"best over {BASELINE}", "last", f"last over {BASELINE}", *rare, "seconds per run",
    ]  # fmt: skip
    lines = []
    for row in rows:
        mark = " *" if row["values"] and row["chosen"] else ""
        changes = ", ".join(f"`{key}={value}`" for key, value in (row["changes"] | row["values"]).items())
        count = f"{len(row['seeds'])}" + (f", {row['diverged']} diverged" if row["diverged"] else "")
        scores = [_text(row[measure]) for measure in MEASURES if measure not in COMPARED]
        for measure in COMPARED:
            scores += [_text(row[measure]), _difference_text(row["over_baseline"][measure])]
        scores += [_text(row["iou"].get(label)) for label in rare]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append([row["variant"] + mark, changes, count, *scores, seconds])
    return _table(titles, lines)


def _by_class(rows: list[dict]) -> str:
    """Returns a table of methods x classes: mean IoU over seeds and, in brackets, its difference to the baseline's.

    It is empty without classes, or if there are too many.
    """
    rows = [row for row in rows if row["chosen"] and row["iou"]]
    baseline = next((row["iou"] for row in rows if row["variant"] == BASELINE), {})
    classes = rows[0]["iou"] if rows else {}
    if not 0 < len(classes) <= MOST_CLASSES:
        return ""

    def cell(row: dict, name: str) -> str:
        mean = row["iou"][name].mean
        if row["variant"] == BASELINE or name not in baseline:
            return f"{mean:.1f}"
        return f"{mean:.1f} ({mean - baseline[name].mean:+.1f})"

    lines = [[row["variant"], *(cell(row, name) for name in classes)] for row in rows]
    return _table(["method", *classes], lines)


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return tabulate.tabulate(lines, titles, tablefmt="github", disable_numparse=True)


def _text(value: Statistic | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:.2f}" + ("" if value.std is None else f" ± {value.std:.2f}")


def _difference_text(value: dict | None) -> str:
    if value is None:
        return ""
    return f"{value['points']:+.2f}" + ("" if value["cohens_d"] is None else f" ({value['cohens_d']:+.1f})")
