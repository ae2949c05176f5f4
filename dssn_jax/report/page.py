"""The page itself: what is on it, rendered by the template `page.html` into one file that needs no network."""

import pathlib
from collections.abc import Sequence

import jinja2
import plotly.offline
from etils import epath

from configs import defaults
from configs.checks import check_output_file
from dssn_jax import visualize as pictures
from dssn_jax.report import charts, gallery, runs
from dssn_jax.report.runs import Run
from dssn_jax.workdir import files, recorder
from dssn_jax.workdir.recorder import duration, logger

FOLDER = pathlib.Path(__file__).parent


def report(workdirs: Sequence[str], to: str | None = None, images: int = 200) -> epath.Path:
    """Writes the page about the runs in `workdirs`; `--mode=report`.

    Args:
      workdirs: of the runs, finished or not.
      to: the file; None: report.html in the first of `workdirs`.
      images: most validation images of each run to choose the best and the worst from; 0: no pictures.

    Returns:
      The path of the page.

    Raises:
      WorkdirError: a folder that is not the work directory of a run. Nothing is written then.
      ConfigError: `to` cannot be written.
    """
    recorder.log_to(None)
    shown = runs.read(workdirs)
    path = epath.Path(to or shown[0].workdir / "report.html")
    check_output_file(path)
    page = render(shown, [gallery.draw(run, images) for run in shown])
    with files.whole(path) as part:
        part.write_text(page)
    logger.info("wrote %s (%.1f MB)", path, path.stat().length / 1e6)
    return path


def render(shown: list[Run], galleries: list[gallery.Gallery]) -> str:
    """Returns the page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    drawn: list[dict] = []  # The charts in the order of their places on the page.

    def place(chart: dict) -> int:
        """Takes a chart and tells its number, by which the page's script finds it."""
        drawn.append(chart)
        return len(drawn) - 1

    return environment.get_template("page.html").render(
        runs=[_card(index, run) for index, run in enumerate(shown)],
        galleries=galleries,
        legend=_legend(shown),
        curves=charts.curves(shown),
        bars=charts.class_bars(shown),
        class_curves=charts.class_curves(shown),
        confusions=[
            charts.confusion(run, network) | {"run": index}
            for index, run in enumerate(shown)
            for network in run.confusions
        ],
        scores=_scores(shown),
        differences=_differences(shown),
        configs=[runs.flatten(run.config) for run in shown],
        classes=_class_legend(shown),
        place=place,
        drawn=drawn,
        plotly=plotly.offline.get_plotlyjs(),
    )


def _card(index: int, run: Run) -> dict:
    """What the head of the page says of a run."""
    facts, images = run.facts, run.facts.get("images", {})
    rows = {
        "State": _state(run),
        "Steps": f"{run.steps} of {run.total_steps or '?'}",
        "Time": duration(run.seconds) if run.seconds else "not recorded",
        "Devices": facts.get("devices", "not recorded"),
        "Network": f"{run.config.model.encoder}, {facts['parameters'] / 1e6:.1f} M parameters"
        if "parameters" in facts
        else run.config.model.encoder,
        "Images": ", ".join(f"{count} {name}" for name, count in images.items()) or "not recorded",
        "Folder": str(run.workdir),
    }
    scores = {
        network: [f"{miou:.2f} at step {step}" for miou, step in (run.best(network), run.last(network))]
        for network in run.networks
    }
    return {"label": run.label, "name": run.config.name, "color": charts.color(index), "rows": rows, "scores": scores}


def _state(run: Run) -> str:
    if run.finished:
        return "finished"
    if run.recorded is None:
        return "nothing recorded yet"
    return f"not finished; last record {run.recorded:%Y-%m-%d %H:%M}"


def _legend(shown: list[Run]) -> list[dict]:
    return [{"label": run.label, "color": charts.color(index)} for index, run in enumerate(shown)]


def _class_legend(shown: list[Run]) -> dict[str, str]:
    """Colors of the classes in the pictures."""
    return {
        name: f"rgb{tuple(int(value) for value in color)}"
        for run in shown
        for name, color in zip(run.classes, pictures.palette(len(run.classes)), strict=True)
    }


def _scores(shown: list[Run]) -> dict:
    """A table of the IoU of each class at the last evaluation: {"columns": [...], "rows": {class: [...]}}."""
    columns, tables = [], []
    for run in shown:
        for network in run.networks:
            series = run.series.get(f"iou_{network}")
            if series is not None:
                columns.append(f"{run.label} {network}")
                tables.append(dict(zip(run.classes, series.values[-1], strict=True)) | {"mean": run.last(network)[0]})
    names = list(dict.fromkeys(name for table in tables for name in table if name != "mean"))
    rows = {
        name: [f"{table[name]:.2f}" if name in table else "" for table in tables]
        for name in ([*names, "mean"] if tables else [])
    }
    return {"columns": columns, "rows": rows}


def _differences(shown: list[Run]) -> list[tuple[str, str, list[str]]]:
    """Keys in which the runs differ (of one run: from the defaults), as (key, default, value in each run)."""
    configs = [runs.flatten(run.config) for run in shown]
    default = runs.flatten(defaults.get_config())
    compared = configs if len(configs) > 1 else [*configs, default]
    keys = [key for key in default if key != "name"] + [key for key in configs[0] if key not in default]
    return [
        (key, default.get(key, "-"), [config.get(key, "-") for config in configs])
        for key in keys
        if len({config.get(key) for config in compared}) > 1
    ]
