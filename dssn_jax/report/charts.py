"""Charts of runs for plotly.js: plain dicts of traces and layout, which the script of the page colors and themes.

Color identifies the run, the dash the network. The "meta" of a curve holds what the page needs to draw it over epochs
or time instead of steps, and that of every trace the index of its run, so that runs can be hidden.
"""

import html

import numpy as np

from dssn_jax import visualize
from dssn_jax.evaluation.metrics import METRICS, NETWORKS
from dssn_jax.report.runs import Run, Series
from dssn_jax.training.class_shares import SHARES
from input_pipeline.errors import printable

# Colors of runs: distinct on white and on black, the first ones also with common kinds of color blindness.
COLORS = ("#3b82f6", "#f97316", "#10b981", "#db2777", "#a78bfa", "#ca8a04", "#06b6d4", "#84cc16")
DASHES = {"student": "dot", "teacher": "solid"}
SCORES = "Scores"  # The section of the metrics of student and teacher.
# The other sections, and the prefixes of the names of their metrics; the first match counts.
SECTIONS = {"Losses": ("loss", "contrast"), "Selected pixels": ("mask_ratio",), "Optimization and speed": ("",)}
CELL_TEXT = 24  # Confusion matrices of more classes show no numbers in their cells.


def escape(name: str) -> str:
    """Returns a name as plotly shows it unchanged: plotly reads HTML, and %{...} as a variable."""
    return html.escape(printable(name), quote=False).replace("%{", "&#37;{")


def color(index: int) -> str:
    """Returns the color of the run with this index on the page."""
    return COLORS[index % len(COLORS)]


def curves(runs: list[Run]) -> dict[str, list[dict]]:
    """Returns the charts of each section: one per metric, with a line per run and network."""
    sections: dict[str, list[dict]] = {section: [] for section in (SCORES, *SECTIONS)}
    for name, metric in METRICS.items():
        lines = [_line(i, run, network, run.series[f"{name}_{network}"]) for i, run, network in _evaluated(runs)]
        if lines:
            sections[SCORES].append(_chart(f"{metric.title}, %", lines, {"rangemode": "tozero"}))
    shown = {f"{name}_{network}" for name in (*METRICS, "iou") for network in NETWORKS} | {SHARES}
    others = dict.fromkeys(name for run in runs for name in run.series if name not in shown)
    for name in sorted(others, key=lambda name: not name.startswith("loss")):  # The losses first.
        section = next(title for title, prefixes in SECTIONS.items() if name.startswith(prefixes))
        lines = [_line(i, run, None, run.series[name]) for i, run in enumerate(runs) if name in run.series]
        yaxis = {} if name in ("lr", "grad_norm") or name.startswith("contrast") else {"rangemode": "tozero"}
        sections[section].append(_chart(name, lines, yaxis))
    return sections


def class_bars(runs: list[Run]) -> list[dict]:
    """Returns a chart of the IoU of each class at the last evaluation, with a bar per run and network; [] if none."""
    traces, classes = [], {}
    for index, run, network in _evaluated(runs):
        series, name = run.series[f"iou_{network}"], escape(f"{run.label} {network}")
        classes |= dict.fromkeys(run.classes)
        traces.append({
            "type": "bar", "x": [*map(escape, run.classes)], "y": _json_numbers(series.values[-1]), "name": name,
            "marker": {"color": color(index), "opacity": 1.0 if network == run.networks[-1] else 0.45},
            "hovertemplate": f"%{{x}}: %{{y:.2f}}<extra>{name}, step {series.steps[-1]:.0f}</extra>",
            "meta": {"run": index},
        })  # fmt: skip
    if not traces:
        return []
    axes = {"xaxis": {"type": "category", "showgrid": False}, "yaxis": {"range": [0, 100], "title": {"text": "IoU, %"}}}
    layout = {"barmode": "group", "bargap": 0.25, **axes}
    width = len(classes) * (10 * len(traces) + 14)
    return [{"title": "", "kind": "bars", "traces": traces, "layout": layout, "width": width}]


def class_curves(runs: list[Run]) -> list[dict]:
    """Returns a chart of the IoU over the run for each class, with a line per run and network."""
    series = [(index, run, network, run.series[f"iou_{network}"]) for index, run, network in _evaluated(runs)]
    return _by_class(series, {"range": [0, 100]})


def share_curves(runs: list[Run]) -> list[dict]:
    """Returns a chart of the share of pseudo-labeled pixels over the run for each class, with a line per run."""
    series = [(index, run, None, run.series[SHARES]) for index, run in enumerate(runs) if SHARES in run.series]
    return _by_class(series, {"rangemode": "tozero"})


def _by_class(recorded: list[tuple[int, Run, str | None, Series]], yaxis: dict) -> list[dict]:
    """Returns a chart per class with a line per (index of a run, run, network, its series with values [n, K])."""
    lines: dict[str, list[dict]] = {}
    swatches: dict[str, str] = {}
    for index, run, network, series in recorded:
        for k, name in enumerate(run.classes):
            swatches.setdefault(name, _hex(visualize.palette(k + 1)[k]))
            lines.setdefault(name, []).append(_line(index, run, network, series._replace(values=series.values[:, k])))
    return [_chart(name, traces, yaxis) | {"swatch": swatches[name]} for name, traces in lines.items()]


def confusion(run: Run, network: str) -> dict:
    """Returns the confusion matrix of the last evaluation: predictions of the pixels of each class, in percent."""
    counts = run.confusions[network]
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [*map(escape, run.classes)]
    trace = {
        "type": "heatmap", "x": names, "y": names, "z": np.round(percent, 2).tolist(),
        "colorscale": "Cividis", "zmin": 0, "zmax": 100, "xgap": 1, "ygap": 1,
        "colorbar": {"thickness": 10}, "showscale": len(run.classes) > CELL_TEXT,
        "hovertemplate": "%{y} predicted as %{x}: %{z:.2f} %<extra></extra>",
    }  # fmt: skip
    if len(run.classes) <= CELL_TEXT:
        trace["texttemplate"] = "%{z:.0f}"
    axis = {"type": "category", "dtick": 1, "showgrid": False}
    layout = {"xaxis": axis, "yaxis": {"autorange": "reversed", **axis}}
    side = max(320, 18 * len(run.classes))
    chart = {"title": f"{run.label}, {network}", "kind": "confusion", "traces": [trace], "layout": layout}
    return chart | {"height": side + 80, "width": side}


def _evaluated(runs: list[Run]) -> list[tuple[int, Run, str]]:
    """Returns (index, run, network) for each evaluated network."""
    return [(index, run, network) for index, run in enumerate(runs) for network in run.networks]


def _line(index: int, run: Run, network: str | None, series: Series) -> dict:
    label = escape(f"{run.label} {network}" if network else run.label)
    few = len(series.steps) < 40
    return {
        "type": "scatter", "mode": "lines+markers" if few else "lines", "name": label,
        "x": series.steps.astype(int).tolist(), "y": _json_numbers(series.values),
        "line": {"color": color(index), "width": 2, "dash": DASHES.get(network, "solid")}, "marker": {"size": 5},
        "meta": {
            "run": index,
            "seconds": _json_numbers(series.seconds),
            "steps_per_epoch": run.info.get("steps_per_epoch"),
        },
    }  # fmt: skip


def _chart(title: str, lines: list[dict], yaxis: dict) -> dict:
    return {"title": title, "kind": "curve", "traces": lines, "layout": {"yaxis": yaxis}}


def _json_numbers(values: np.ndarray) -> list[float | None]:
    """Rounds values to 5 digits; None replaces what is not finite, which JSON cannot hold."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]


def _hex(color: np.ndarray) -> str:
    return "#" + bytes(color).hex()
