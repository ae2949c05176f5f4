"""The run report: one HTML file about one or several runs, which needs no network; `--mode=report`."""

import pathlib
from collections.abc import Sequence

import jinja2
import plotly.offline
from etils import epath

from configs import defaults
from configs.checks import check_output_file
from dssn_jax import visualize
from dssn_jax.evaluation.metrics import METRICS
from dssn_jax.report import charts, gallery, runs
from dssn_jax.report.runs import Run
from dssn_jax.workdir import files
from dssn_jax.workdir.logs import duration, logger

FOLDER = pathlib.Path(__file__).parent
MADE_BY = "dssn_jax report"  # Marks the page, which a later one may replace.


def report(workdirs: Sequence[str], *, to: str | None = None, images: int = 200) -> epath.Path:
    """Writes the page about the runs in `workdirs` and returns its path.

    Args:
      workdirs: of the runs, finished or not.
      to: the file; None: report.html in the first of `workdirs`.
      images: number of validation images per run among which the best and the worst are chosen; 0: no pictures.

    Raises:
      WorkdirError: a folder that is not the work directory of a run. Nothing is written then.
      ConfigError: `to` cannot be written.
    """
    shown = runs.read(workdirs)
    path = epath.Path(to or shown[0].workdir / "report.html")
    check_output_file(path, MADE_BY)
    page = render(shown, [gallery.draw(run, images) for run in shown])
    with files.atomic_write(path) as part:
        part.write_bytes(page.encode(errors="backslashreplace"))  # File names may hold bytes that are no text.
    logger.info("wrote %s (%.1f MB)", path, path.stat().length / 1e6)
    return path


def render(shown: list[Run], galleries: list[gallery.Gallery]) -> str:
    """Returns the page as HTML, from the template `page.html`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    drawn: list[dict] = []  # The charts in the order of their places on the page.

    def place(chart: dict) -> int:
        """Appends a chart and returns its index, by which the page's script finds it."""
        drawn.append(chart)
        return len(drawn) - 1

    return environment.get_template("page.html").render(
        made_by=MADE_BY,
        runs=[_card(index, run) for index, run in enumerate(shown)],
        galleries=galleries,
        curves=charts.curves(shown),
        bars=charts.class_bars(shown),
        class_curves=charts.class_curves(shown),
        share_curves=charts.share_curves(shown),
        confusions=[
            charts.confusion(run, network) | {"run": index}
            for index, run in enumerate(shown)
            for network in run.confusions
        ],
        scores=_scores(shown),
        differences=_differences(shown),
        configs=[runs.flatten(run.config) for run in shown],
        classes=_class_colors(shown),
        place=place,
        drawn=drawn,
        plotly=plotly.offline.get_plotlyjs(),
    )


def _card(index: int, run: Run) -> dict:
    """Returns the overview of a run at the top of the page."""
    network = run.config.model.encoder
    if "parameters" in run.info:
        network += f", {run.info['parameters'] / 1e6:.1f} M parameters"
    images = run.info.get("images", {})
    rows = {
        "State": _state(run),
        "Steps": f"{run.steps} of {run.total_steps or '?'}",
        "Time": duration(run.seconds) if run.seconds else "not recorded",
        "Devices": run.info.get("devices", "not recorded"),
        "Network": network,
        "Images": ", ".join(f"{count} {name}" for name, count in images.items()) or "not recorded",
        "Folder": str(run.workdir),
    }
    scores = {
        network: [f"{score:.2f} at step {step}" for score, step in (run.best(network), run.last(network, run.metric))]
        for network in run.networks
    }
    card = {"label": run.label, "name": run.config.name, "color": charts.color(index), "rows": rows}
    return card | {"metric": METRICS[run.metric].title, "scores": scores}


def _state(run: Run) -> str:
    if run.finished:
        return "finished"
    if run.recorded is None:
        return "nothing recorded yet"
    return f"not finished; last record {run.recorded:%Y-%m-%d %H:%M}"


def _class_colors(shown: list[Run]) -> dict[str, str]:
    """Returns the colors of the classes in the pictures."""
    return {
        name: f"rgb{tuple(int(value) for value in color)}"
        for run in shown
        for name, color in zip(run.classes, visualize.palette(len(run.classes)), strict=True)
    }


def _scores(shown: list[Run]) -> dict:
    """Returns the table of the last scores: {"columns": [...], "rows": {class or title of a metric: [...]}}."""
    columns, classes, tables = [], {}, []
    for run in shown:
        classes |= dict.fromkeys(run.classes if run.networks else ())
        for network in run.networks:
            columns.append(f"{run.label} {network}")
            ious = dict(zip(run.classes, run.series[f"iou_{network}"].values[-1], strict=True))
            tables.append((ious, {metric.title: run.last(network, name)[0] for name, metric in METRICS.items()}))
    rows = {name: [f"{ious[name]:.2f}" if name in ious else "" for ious, _ in tables] for name in classes}
    titles = [metric.title for metric in METRICS.values()] if tables else []
    return {"columns": columns, "rows": rows, "metrics": {t: [f"{m[t]:.2f}" for _, m in tables] for t in titles}}


def _differences(shown: list[Run]) -> list[tuple[str, str, list[str]]]:
    """Returns (key, default, value in each run) of keys in which the runs, or one run and the defaults, differ."""
    configs = [runs.flatten(run.config) for run in shown]
    default = runs.flatten(defaults.get_config())
    compared = configs if len(configs) > 1 else [*configs, default]
    keys = [key for key in default if key != "name"] + [key for key in configs[0] if key not in default]
    return [
        (key, default.get(key, "-"), [config.get(key, "-") for config in configs])
        for key in keys
        if len({config.get(key) for config in compared}) > 1
    ]
