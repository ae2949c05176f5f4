"""Charts of runs, as plotly.js draws them: plain dicts of traces and layout, colored and themed by the page.

Color tells the run, the dash the network. Traces of a curve hold in "meta" what the page needs to show it over epochs
or time instead of steps, and every trace the run that it belongs to, so that runs can be hidden.
"""

import numpy as np

from dssn_jax import visualize as pictures
from dssn_jax.evaluation.scores import NETWORKS
from dssn_jax.report.runs import Run, Series

# Of runs: told apart on white and on black, the first ones also with the common kinds of color blindness.
COLORS = ("#3b82f6", "#f97316", "#10b981", "#db2777", "#a78bfa", "#ca8a04", "#06b6d4", "#84cc16")
DASHES = {"student": "dot", "teacher": "solid"}
SCORES = "Scores"  # The section of the page with the numbers of student and teacher.
# The other sections, and how the names of their metrics begin; the first that fits.
SECTIONS = {"Losses": ("loss", "contrast"), "Selected pixels": ("mask_ratio",), "Optimization and speed": ("",)}
TITLES = {
    "miou": "Mean IoU, %",
    "pixel_accuracy": "Pixel accuracy, %",
    "frequency_weighted_iou": "Frequency-weighted IoU, %",
    "loss": "Total loss",
    "loss_x": "Labeled loss L_x",
    "loss_s1": "Strong view 1, L_s1",
    "loss_s2": "Strong view 2, L_s2",
    "loss_fp1": "Feature view 1, L_fp1",
    "loss_fp2": "Feature view 2, L_fp2",
    "contrast_image": "Contrast, image level",
    "contrast_feature": "Contrast, feature level",
    "mask_ratio": "Share selected, weak view",
    "mask_ratio_s1": "Share selected, strong view 1",
    "mask_ratio_s2": "Share selected, strong view 2",
    "lr": "Learning rate, backbone",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images/s",
    "waiting": "Share of time waiting for data",
}
CELL_TEXT = 24  # Most classes for which the cells of a confusion matrix hold their number.


def color(index: int) -> str:
    """The color of the run with this place on the page."""
    return COLORS[index % len(COLORS)]


def curves(runs: list[Run]) -> dict[str, list[dict]]:
    """A chart for each recorded number, with a line for each run and network, by section of the page."""
    metrics: dict[str, list[dict]] = {}
    for index, run in enumerate(runs):
        for name, series in run.series.items():
            if series.values.ndim == 1:
                metric, network = _split(name)
                metrics.setdefault(metric, []).append(_line(index, run, network, series))
    order = list(TITLES)
    sections: dict[str, list[dict]] = {section: [] for section in (SCORES, *SECTIONS)}
    for metric in sorted(metrics, key=lambda metric: order.index(metric) if metric in order else len(order)):
        section = next(name for name, starts in SECTIONS.items() if metric.startswith(starts))
        if any(trace["meta"]["network"] for trace in metrics[metric]):
            section = SCORES
        sections[section].append(_chart(TITLES.get(metric, metric), "curve", metrics[metric], yaxis=_range(metric)))
    return sections


def class_bars(runs: list[Run]) -> list[dict]:
    """IoU of each class at the last evaluation, a bar for each run and network."""
    traces, classes = [], []
    for index, run in enumerate(runs):
        for network in run.networks:
            series = run.series.get(f"iou_{network}")
            if series is not None:
                classes += [name for name in run.classes if name not in classes]
                step, values = int(series.steps[-1]), series.values[-1].tolist()
                trace = {"type": "bar", "x": run.classes, "y": _plain(values), "name": f"{run.label} {network}"}
                trace["marker"] = {"color": color(index), "opacity": 1.0 if network == run.networks[-1] else 0.45}
                trace["hovertemplate"] = f"%{{x}}: %{{y:.2f}}<extra>{run.label} {network}, step {step}</extra>"
                traces.append(trace | {"meta": {"run": index}})
    if not traces:
        return []
    axes = {"xaxis": {"type": "category", "showgrid": False}, "yaxis": {"range": [0, 100], "title": {"text": "IoU, %"}}}
    layout = {"barmode": "group", "bargap": 0.25, **axes}
    chart = {"title": "", "kind": "bars", "traces": traces, "layout": layout}
    return [chart | {"width": len(classes) * (10 * len(traces) + 14)}]


def class_curves(runs: list[Run]) -> list[dict]:
    """IoU over the run: a chart for each class with a line for each run and network."""
    charts: dict[str, list[dict]] = {}
    swatches: dict[str, str] = {}
    for index, run in enumerate(runs):
        for network in run.networks:
            series = run.series.get(f"iou_{network}")
            for k, name in enumerate(run.classes if series is not None else ()):
                swatches.setdefault(name, _hex(pictures.palette(k + 1)[k]))
                line = Series(series.steps, series.values[:, k], series.seconds)
                charts.setdefault(name, []).append(_line(index, run, network, line))
    return [
        _chart(name, "curve", traces, yaxis={"range": [0, 100]}) | {"swatch": swatches[name]}
        for name, traces in charts.items()
    ]


def confusion(run: Run, network: str) -> dict:
    """The confusion matrix of the last evaluation: of the pixels of each class, how many were called what, per cent."""
    counts = run.confusions[network]
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    trace = {
        "type": "heatmap", "x": run.classes, "y": run.classes, "z": np.round(shares, 2).tolist(),
        "colorscale": "Cividis", "zmin": 0, "zmax": 100, "xgap": 1, "ygap": 1,
        "colorbar": {"thickness": 10}, "showscale": len(run.classes) > CELL_TEXT,
        "hovertemplate": "%{y} called %{x}: %{z:.2f} %<extra></extra>",
    }  # fmt: skip
    if len(run.classes) <= CELL_TEXT:
        trace["texttemplate"] = "%{z:.0f}"
    axis = {"type": "category", "dtick": 1, "showgrid": False}
    layout = {"xaxis": axis, "yaxis": {"autorange": "reversed", **axis}}
    side = max(320, 18 * len(run.classes))
    chart = {"title": f"{run.label}, {network}", "kind": "confusion", "traces": [trace], "layout": layout}
    return chart | {"height": side + 80, "width": side}


def _split(name: str) -> tuple[str, str | None]:
    """Splits "miou_teacher" into ("miou", "teacher"); numbers of no network have None."""
    metric, _, network = name.rpartition("_")
    return (metric, network) if network in NETWORKS else (name, None)


def _line(index: int, run: Run, network: str | None, series: Series) -> dict:
    label = f"{run.label} {network}" if network else run.label
    few = len(series.steps) < 40
    return {
        "type": "scatter", "mode": "lines+markers" if few else "lines", "name": label,
        "x": series.steps.astype(int).tolist(), "y": _plain(series.values.tolist()),
        "line": {"color": color(index), "width": 2, "dash": DASHES.get(network, "solid")}, "marker": {"size": 5},
        "meta": {
            "run": index,
            "network": network,
            "seconds": _plain(series.seconds.tolist()),
            "steps_per_epoch": run.facts.get("steps_per_epoch"),
        },
    }  # fmt: skip


def _chart(title: str, kind: str, traces: list[dict], yaxis: dict) -> dict:
    return {"title": title, "kind": kind, "traces": traces, "layout": {"yaxis": yaxis}}


def _range(metric: str) -> dict:
    return {"rangemode": "tozero"} if metric.startswith(("loss", "miou", "mask_ratio", "images", "waiting")) else {}


def _plain(values: list[float]) -> list[float | None]:
    """Numbers that JSON can hold: rounded to 5 digits, None where not finite."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]


def _hex(color: np.ndarray) -> str:
    return "#" + bytes(color).hex()
