"""Plots of `experiments.compare`, with matplotlib: curves over the number of labels, and bars of one split."""

import importlib.util
import pathlib

from dssn_jax.workdir import files

_METHOD_COLOR, _ABLATION_COLOR = "C0", "C4"  # Names in matplotlib's color cycle.


def write(rows: list[dict], measures: dict[str, str], out: pathlib.Path) -> None:
    """Draws `rows` of `compare_results.summarize` to results.png and results.svg in `out`, if matplotlib is installed.

    Args:
      rows: one per split and variant.
      measures: name -> title of what is drawn: curves over the number of labels, unless there is only one, and bars of
        the split with the most variants.
      out: folder.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib (requirements-dev.txt) is not installed", flush=True)
        return
    from matplotlib.figure import Figure

    splits = [row["split"] for row in rows]
    largest = [row for row in rows if row["split"] == max(splits, key=splits.count)]
    kinds = [(draw_curves, rows)] if len({row["labels"] for row in rows}) > 1 else []
    kinds.append((draw_bars, largest))
    figure = Figure(figsize=(12, 4.2 * len(kinds)), layout="constrained")
    axes = iter(figure.subplots(len(kinds) * len(measures) // 2, 2).flat)
    for measure, title in measures.items():
        for draw, drawn in kinds:
            panel = next(axes)
            draw(panel, drawn, measure)
            panel.set_title(title if drawn is rows else f"{title}, {drawn[0]['labels']} labels")
    for path in (out / "results.png", out / "results.svg"):
        with files.atomic_write(path) as part:
            figure.savefig(part, dpi=120, format=path.suffix[1:])


def draw_curves(axes, rows: list[dict], measure: str) -> None:
    """Draws a line with error bars per method."""
    methods = dict.fromkeys(row["variant"] for row in rows if not row["changes"])
    for index, variant in enumerate(methods):
        points = [row for row in rows if row["variant"] == variant]
        axes.errorbar(
            [row["labels"] for row in points],
            [row[measure].mean for row in points],
            yerr=[row[measure].std or 0.0 for row in points],
            label=variant, color=f"C{index}", marker="o", markersize=4, capsize=3, linewidth=1.5,
        )  # fmt: skip
    labels = sorted({row["labels"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(labels, [str(label) for label in labels])
    axes.minorticks_off()
    axes.set(xlabel="labeled images", ylabel="mean IoU, %")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_bars(axes, rows: list[dict], measure: str) -> None:
    """Draws a bar with an error bar per variant."""
    colors = [_ABLATION_COLOR if row["changes"] else _METHOD_COLOR for row in rows]
    errors = [row[measure].std or 0.0 for row in rows]
    means = [row[measure].mean for row in rows]
    axes.barh([row["variant"] for row in rows], means, xerr=errors, color=colors, capsize=3)
    for place, (mean, error) in enumerate(zip(means, errors, strict=True)):
        axes.text(mean + error, place, f" {mean:.1f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)  # Room for the numbers.
    axes.set(xlabel="mean IoU, %")
    axes.grid(axis="x", alpha=0.3)
