"""Results of `benchmarks.compare`: read from the runs, summarised over seeds, written as JSON, Markdown and a plot."""

import importlib.util
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import tables
from dssn_jax.evaluation.scores import NETWORKS
from dssn_jax.report import charts
from dssn_jax.workdir import files, recorder
from dssn_jax.workdir import restore as saved_run

RUNS = "runs"  # Folder of the work directories.
RESULT = "result.json"  # In each: which run it is, and that it is finished.
COMPARISON = "comparison.json"  # What all runs share.
BASELINE = "supervised"
RARE = 0.25  # Share of the classes, the rarest in the validation images, whose IoU is shown.
# What is compared. best: the largest mean IoU of any evaluation and of student and teacher, as the paper has it; it is
# chosen on the validation images | last: of the last evaluation, of the network that predictions and exports take (the
# teacher, if there is one); nothing is chosen.
COMPARED = {"best": "Best mIoU of student or teacher", "last": "Last mIoU of the deployed network"}
MEASURES = (*(f"{network}_{which}" for network in NETWORKS for which in COMPARED), *COMPARED)


class Outcome(NamedTuple):
    """A finished run. One that diverged has no scores."""

    variant: str
    changes: dict[str, str]  # Keys that tell the variant from its method.
    split: str
    values: dict[str, str]  # Of the grid.
    seed: int
    diverged: str  # How; "" if it did not.
    facts: dict  # `dssn_jax.train.facts`.
    scores: dict[str, float]  # By MEASURES that the run has, per cent.
    iou: dict[str, float]  # By class, of the last evaluation of the deployed network, per cent.
    shares: dict[str, float]  # By class, of the pixels of the validation images, in [0, 1].
    seconds: float
    compiled: dict[str, float]  # Programs compiled and found compiled, and the seconds that it took.

    @property
    def cell(self) -> tuple:
        """What its repetitions with other seeds share."""
        return self.split, self.variant, tuple(self.values.items())


class Statistic(NamedTuple):
    """Mean and sample standard deviation (None of one value) of n values."""

    mean: float
    deviation: float | None
    n: int


def read(out: pathlib.Path) -> list[Outcome]:
    """Returns the finished runs in `out`, in the order of variants, splits and values; raises WorkdirError."""
    folders = sorted(path.parent for path in (out / RUNS).glob(f"*/{RESULT}"))
    return [read_outcome(folder) for folder in folders]


def read_outcome(workdir: pathlib.Path) -> Outcome:
    """Returns what the files of a finished run say; raises WorkdirError."""
    result = saved_run.read_json(workdir, RESULT)
    diverged = result.get("diverged", "")
    summary = {} if diverged else saved_run.read_json(workdir, "summary.json")
    confusion = {} if diverged else saved_run.read_json(workdir, recorder.CONFUSION)
    networks = [name for name in NETWORKS if name in summary]
    scores = {f"{name}_{which}": summary[name][which]["miou"] for name in networks for which in COMPARED}
    iou, shares = {}, {}
    if networks:
        deployed = networks[-1]
        scores |= {"best": max(scores[f"{name}_best"] for name in networks), "last": scores[f"{deployed}_last"]}
        iou = summary[deployed]["last"]["iou"]
        pixels = np.array(confusion[deployed]).sum(1)
        shares = dict(zip(iou, (pixels / pixels.sum()).tolist(), strict=True))
    counted = {key: result[key] for key in ("compiled", "found_compiled", "compile_seconds") if key in result}
    return Outcome(
        **{key: result[key] for key in ("variant", "changes", "split", "values", "seed")},
        diverged=diverged,
        facts=saved_run.read_json(workdir, recorder.RUN),
        scores=scores,
        iou=iou,
        shares=shares,
        seconds=summary.get("seconds", math.nan),
        compiled=counted,
    )


def describe(values: Iterable[float]) -> Statistic | None:
    """Summarises values; None of none."""
    values = list(values)
    if not values:
        return None
    return Statistic(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def difference(found: Statistic | None, baseline: Statistic | None) -> dict[str, float | None] | None:
    """Returns {"points", "deviations"}: how far `found` is above `baseline`.

    A deviation is the root of the mean of both variances (that of Cohen's d, for samples of one size); None where one
    is not known or both are 0.
    """
    if found is None or baseline is None:
        return None
    points, deviations = found.mean - baseline.mean, None
    if found.deviation is not None and baseline.deviation is not None:
        pooled = math.sqrt((found.deviation**2 + baseline.deviation**2) / 2)
        deviations = points / pooled if pooled > 0 else None
    return {"points": points, "deviations": deviations}


def summarize(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Returns a row for each split, variant and values of the grid; `chosen` marks the values of each variant.

    They are those with the most finished seeds and then the largest mean of "last", for all variants alike. Differences
    are to the baseline with its chosen values.
    """
    cells: dict[tuple, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.seed):
        cells.setdefault(outcome.cell, []).append(outcome)
    rows = [_row(runs) for runs in cells.values()]
    for split, variant in dict.fromkeys((row["split"], row["variant"]) for row in rows):
        candidates = [row for row in rows if (row["split"], row["variant"]) == (split, variant) and row["last"]]
        if candidates:
            max(candidates, key=lambda row: (row["last"].n, row["last"].mean))["chosen"] = True
    for row in rows:
        baselines = [base for base in rows if base["chosen"] and base["variant"] == BASELINE]
        baseline = next((base for base in baselines if base["split"] == row["split"]), dict.fromkeys(COMPARED))
        is_baseline = row["variant"] == BASELINE and row["chosen"]
        row["over_baseline"] = {
            name: None if is_baseline else difference(row[name], baseline[name]) for name in COMPARED
        }
    return sorted(rows, key=_place)


def _row(runs: list[Outcome]) -> dict[str, Any]:
    first, scored = runs[0], [run for run in runs if run.scores]
    return {
        "split": first.split,
        "labels": first.facts["images"]["labeled"],
        "steps": first.facts["steps"],
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
    """Where a row is in the tables: by labels, baselines first, DSSN's forms last."""
    named = [BASELINE, "fixmatch", "unimatch", "dssn"]
    rank = named.index(row["variant"]) if row["variant"] in named else len(named)
    return row["labels"], row["split"], rank, row["variant"], [_number(value) for value in row["values"].values()]


def _number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text


def rare_classes(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The rarest classes of the validation images and their share of the pixels, the rarest first."""
    shares = next((outcome.shares for outcome in outcomes if outcome.shares), {})
    return dict(sorted(shares.items(), key=lambda item: item[1])[: math.ceil(RARE * len(shares))])


def write(out: pathlib.Path) -> None:
    """Writes results.json, results.md, results.png and results.svg of the finished runs in `out`."""
    rows = write_tables(out)
    if not rows:
        print(f"no finished run in {out}", flush=True)
    elif importlib.util.find_spec("matplotlib") is None:
        print("no plot is drawn: matplotlib (requirements-dev.txt) is not installed", flush=True)
    else:
        draw(rows, [out / "results.png", out / "results.svg"])


def write_tables(out: pathlib.Path) -> list[dict]:
    """Writes results.json and results.md of the finished runs in `out`; returns the rows."""
    comparison, outcomes = saved_run.read_json(out, COMPARISON), read(out)
    rows, rare = summarize(outcomes), rare_classes(outcomes)
    plain = [
        {key: value._asdict() if isinstance(value, Statistic) else value for key, value in row.items()}
        | {"iou": {name: value._asdict() for name, value in row["iou"].items()}}
        for row in rows
    ]
    shared = {key: comparison[key] for key in ("config", "commands")}
    devices = sorted({outcome.facts["devices"] for outcome in outcomes})
    runs = [outcome._asdict() for outcome in outcomes]
    tables.write(out / "results.json", {**shared, "devices": devices, "rare": rare, "rows": plain, "runs": runs})
    with files.whole(out / "results.md") as part:
        part.write_text(markdown(rows, rare, devices, shared["config"], shared["commands"], outcomes))
    return rows


def markdown(
    rows: list[dict], rare: dict[str, float], devices: list[str], config: str, commands: list[str], outcomes: Sequence
) -> str:
    """Returns the tables: both measures over splits, then everything of each split."""
    parts = [f"# Methods compared: {config}", _legend(rows, devices, commands, outcomes)]
    for measure, title in COMPARED.items():
        parts += [f"## {title}", _overview(rows, measure)]
    for split in dict.fromkeys(row["split"] for row in rows):
        here = [row for row in rows if row["split"] == split]
        parts += [f"## Split {split}: {here[0]['labels']} labels, {here[0]['steps']} steps", _details(here, rare)]
    if rare:
        listed = ", ".join(f"{name} {100 * share:.2g}%" for name, share in rare.items())
        parts.append(f"Rarest classes and their share of the validation pixels: {listed}.")
    return "\n\n".join(parts) + "\n"


def _legend(rows: list[dict], devices: list[str], commands: list[str], outcomes: Sequence[Outcome]) -> str:
    counts = sorted({len(row["seeds"]) for row in rows})
    lines = [
        f"{len(outcomes)} runs, {' or '.join(map(str, counts)) or 'no'} seeds a cell, on {', '.join(devices) or '-'}. "
        "Mean ± sample standard deviation over seeds, per cent, on the validation images.",
        "",
        "- Best: the largest of all evaluations of a run, of student or teacher, as the paper reports it; it is "
        "selected on the validation images, and so flatters every method.",
        "- Last: at the end of training, of the network that predictions and exports take: the teacher, if there is "
        "one, else the student. Nothing is selected. IoU of single classes is of this network.",
        f"- Over {BASELINE}: difference of the means in points and, in brackets, in deviations; a deviation is the "
        "root of the mean of both variances.",
        "- Seconds a run: the median over seeds. What is compiled is compiled once, for all seeds.",
    ]
    if any(row["values"] for row in rows):
        lines.append(
            "- Of the values of a grid that a method was run with, the overview, and the baseline of all differences, "
            "take those with the largest mean of last (marked *)."
        )
    commands = "\n".join(f"    {command}" for command in commands)
    return "\n".join(lines) + f"\n\nRun by:\n\n{commands}"


def _overview(rows: list[dict], measure: str) -> str:
    chosen = [row for row in rows if row["chosen"]]
    labels = dict.fromkeys((row["split"], row["labels"]) for row in chosen)
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in sorted(chosen, key=lambda row: _place(row)[2:])):
        found = {row["split"]: row for row in chosen if row["variant"] == variant}
        cells = [_over(found[split], measure) if split in found else "" for split, _ in labels]
        lines.append([variant, *cells])
    return _table(["method", *(f"{split} ({count} labels)" for split, count in labels)], lines)


def _over(row: dict, measure: str) -> str:
    """A score, and how far it is over the baseline."""
    over = _text_difference(row["over_baseline"][measure])
    return _text(row[measure]) + (f"; {over}" if over else "")


def _details(rows: list[dict], rare: dict[str, float]) -> str:
    titles = [
        "method", "changes", "n", "student best", "student last", "teacher best", "teacher last",
        "best", f"best over {BASELINE}", "last", f"last over {BASELINE}", *rare, "seconds a run",
    ]  # fmt: skip
    tried = {name for row in rows for name in row["values"]}
    lines = []
    for row in rows:
        name = row["variant"] + (" *" if tried and row["chosen"] else "")
        changes = ", ".join(f"`{key}={value}`" for key, value in (row["changes"] | row["values"]).items())
        count = f"{len(row['seeds'])}" + (f", {row['diverged']} diverged" if row["diverged"] else "")
        scores = [_text(row[measure]) for measure in MEASURES[: -len(COMPARED)]]
        for measure in COMPARED:
            scores += [_text(row[measure]), _text_difference(row["over_baseline"][measure])]
        scores += [_text(row["iou"].get(label)) for label in rare]
        lines.append([name, changes, count, *scores, "" if row["seconds"] is None else f"{row['seconds']:.0f}"])
    return _table(titles, lines)


def _text(value: Statistic | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:.2f}" + ("" if value.deviation is None else f" ± {value.deviation:.2f}")


def _text_difference(value: dict | None) -> str:
    if value is None:
        return ""
    return f"{value['points']:+.2f}" + ("" if value["deviations"] is None else f" ({value['deviations']:+.1f})")


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruled = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def draw(rows: list[dict], paths: Sequence[pathlib.Path]) -> None:
    """Draws both measures: curves of the methods over labels, and bars of the split with the most variants.

    Of a single number of labels there are bars alone.
    """
    from matplotlib.figure import Figure

    chosen = [row for row in rows if row["chosen"]]
    counts = {
        split: sum(row["split"] == split for row in chosen) for split in dict.fromkeys(r["split"] for r in chosen)
    }
    shown = [row for row in chosen if row["split"] == max(counts, key=counts.get)] if counts else []
    drawn = [(draw_curves, chosen), (draw_bars, shown)]
    if len({row["labels"] for row in chosen}) <= 1:
        del drawn[0]
    panels = [(draw_panel, panel_rows, measure) for measure in COMPARED for draw_panel, panel_rows in drawn]
    figure = Figure(figsize=(12, 4.2 * len(panels) / 2), layout="constrained")
    for axes, (draw_panel, panel_rows, measure) in zip(figure.subplots(len(panels) // 2, 2).flat, panels, strict=True):
        draw_panel(axes, panel_rows, measure)
    for path in paths:
        with files.whole(path) as part:
            figure.savefig(part, dpi=120, format=path.suffix[1:])


def draw_curves(axes, rows: list[dict], measure: str) -> None:
    """A line with error bars for each method."""
    methods = dict.fromkeys(row["variant"] for row in rows if not row["changes"])
    for index, variant in enumerate(methods):
        points = [row for row in rows if row["variant"] == variant]
        axes.errorbar(
            [row["labels"] for row in points],
            [row[measure].mean for row in points],
            yerr=[row[measure].deviation or 0.0 for row in points],
            label=variant, color=charts.color(index), marker="o", markersize=4, capsize=3, linewidth=1.5,
        )  # fmt: skip
    labels = sorted({row["labels"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(labels, [str(label) for label in labels])
    axes.minorticks_off()
    axes.set(xlabel="labeled images", ylabel="mean IoU, %", title=COMPARED[measure])
    axes.grid(alpha=0.3)
    axes.legend()


def draw_bars(axes, rows: list[dict], measure: str) -> None:
    """A bar with an error bar for each variant on one split."""
    names = [row["variant"] for row in rows]
    colors = [charts.color(0) if not row["changes"] else charts.color(4) for row in rows]
    errors = [row[measure].deviation or 0.0 for row in rows]
    means = [row[measure].mean for row in rows]
    axes.barh(names, means, xerr=errors, color=colors, capsize=3)
    for place, (mean, error) in enumerate(zip(means, errors, strict=True)):
        axes.text(mean + error, place, f" {mean:.1f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)  # Room for the numbers.
    split = f"{rows[0]['labels']} labels" if rows else ""
    axes.set(xlabel="mean IoU, %", title=f"{COMPARED[measure]}, {split}")
    axes.grid(axis="x", alpha=0.3)
