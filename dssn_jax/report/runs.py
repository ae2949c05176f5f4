"""Reads the runs that the report shows from their work directories."""

import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax
import numpy as np
from etils import epath

from dssn_jax.evaluation import metrics
from dssn_jax.training.class_shares import SHARES
from dssn_jax.workdir import files, records, restore
from dssn_jax.workdir.logs import logger
from dssn_jax.workdir.records import WorkdirError

# Types of the entries of `dssn_jax.training.run.run_info` that the page shows.
_INFO = {"parameters": int, "images": dict, "devices": str, "steps": int, "steps_per_epoch": int}


class Series(NamedTuple):
    """A recorded quantity over the run.

    Attributes:
      steps: int [n].
      values: float [n, ...].
      seconds: float [n], training time.
    """

    steps: np.ndarray
    values: np.ndarray
    seconds: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, finished or not; what it has not recorded yet is empty."""

    label: str  # Short, and unique on the page.
    workdir: epath.Path
    config: Any
    info: dict  # `dssn_jax.training.run.run_info`; empty for a work directory of converted weights.
    series: dict[str, Series]  # By name of the metric; "iou_NETWORK" and SHARES have values [n, K].
    confusions: dict[str, np.ndarray]  # Confusion matrix int [K, K] of the last evaluation, by network.
    steps: int  # Recorded so far.
    seconds: float  # Training time so far.
    recorded: datetime.datetime | None  # Time of the last record.

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config.data.classes)

    @property
    def networks(self) -> list[str]:
        """The networks of which every metric was recorded."""
        recorded = ("iou", *metrics.METRICS)
        return [name for name in metrics.NETWORKS if all(f"{metric}_{name}" in self.series for metric in recorded)]

    @property
    def total_steps(self) -> int | None:
        """The number of steps of the finished run, if known."""
        return self.info.get("steps") or self.config.train.steps or None

    @property
    def finished(self) -> bool:
        return self.total_steps is not None and self.steps >= self.total_steps

    @property
    def metric(self) -> str:
        """The metric that ranks its checkpoints."""
        return metrics.ranking(self.config)

    def last(self, network: str, metric: str) -> tuple[float, int]:
        """Returns a metric, in percent, of the last evaluation, and the step of that."""
        series = self.series[f"{metric}_{network}"]
        return float(series.values[-1]), int(series.steps[-1])

    def best(self, network: str) -> tuple[float, int]:
        """Returns the best score, in percent, and its step; the later step of equal scores, as for checkpoints."""
        series = self.series[f"{self.metric}_{network}"]
        index = len(series.values) - 1 - int(np.argmax(series.values[::-1]))
        return float(series.values[index]), int(series.steps[index])


def read(workdirs: Sequence[str]) -> list[Run]:
    """Reads runs in the given order; raises WorkdirError for a folder that is no work directory or is given twice."""
    paths = [files.absolute(workdir) for workdir in workdirs]
    for path in paths:
        if paths.count(path) > 1:
            raise WorkdirError(f"{path}: given twice in --workdir")
    return [_read(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _labels(paths: list[epath.Path]) -> list[str]:
    """Returns the shortest ends of the paths, in whole folder names, that are all different."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read(workdir: epath.Path, label: str) -> Run:
    config, path = records.read_config(workdir), workdir / records.METRICS
    restore.check_run(workdir)
    metrics.ranking(config)
    lines = [line for line in records.read_metrics(workdir) if _is_usable(line, len(config.data.classes))]
    return Run(
        label=label,
        workdir=workdir,
        config=config,
        info=_info(workdir),
        series=_series(lines),
        confusions=_confusions(workdir, len(config.data.classes)),
        steps=lines[-1]["step"] if lines else 0,
        seconds=lines[-1]["seconds"] if lines else 0.0,
        recorded=datetime.datetime.fromtimestamp(path.stat().mtime) if lines else None,
    )


def _is_usable(line: dict, classes: int) -> bool:
    """Whether a line of `metrics.jsonl` has numbers that can be drawn, one per class where they are by class."""
    lists = {SHARES, *(f"iou_{network}" for network in metrics.NETWORKS)}
    try:
        values = {name: np.array(value, float) for name, value in line.items()}
    except OverflowError:
        return False
    at = np.array([values["step"], values["seconds"]])
    shapes = all(value.shape == ((classes,) if name in lists else ()) for name, value in values.items())
    return shapes and bool((np.abs(at) < 2**53).all())


def _info(workdir: epath.Path) -> dict:
    """Returns what is recorded about a run; entries of another type than the program writes are left out."""
    info = _optional_json(workdir, records.RUN)
    usable = {name: value for name, value in info.items() if isinstance(value, _INFO.get(name, object))}
    if usable != info:
        logger.warning("%s: left out, of another type than expected: %s", workdir / records.RUN, {*info} - {*usable})
    return usable


def _confusions(workdir: epath.Path, classes: int) -> dict[str, np.ndarray]:
    """Returns the recorded confusion matrices by network; what is none of as many classes is left out."""
    content = _optional_json(workdir, records.CONFUSION)
    confusions = {}
    for network in (name for name in metrics.NETWORKS if name in content):
        rows = content[network]
        square = isinstance(rows, list) and all(isinstance(row, list) and len(row) == classes for row in rows)
        if square and len(rows) == classes and all(type(n) is int and 0 <= n < 2**53 for row in rows for n in row):
            confusions[network] = np.array(rows)
        else:
            logger.warning(
                "%s: %s is left out: no %dx%d counts", workdir / records.CONFUSION, network, classes, classes
            )
    return confusions


def _optional_json(workdir: epath.Path, name: str) -> dict:
    """Returns the content of a JSON file; {} if it does not exist (yet) or, with a warning, is damaged."""
    try:
        exists = os.path.lexists(workdir / name) or (workdir / name).exists()  # A broken link is damage.
        return records.read_json(workdir, name) if exists else {}
    except WorkdirError as error:
        logger.warning("left out: %s", error)
        return {}


def _series(lines: list[dict]) -> dict[str, Series]:
    """Returns the series of each metric, in the order in which they were first recorded."""
    columns: dict[str, list[tuple]] = {}
    for line in lines:
        step, seconds = line["step"], line["seconds"]
        for name, value in line.items():
            if name not in ("step", "seconds"):
                columns.setdefault(name, []).append((step, value, seconds))
    return {
        name: Series(*(np.array(column, float) for column in zip(*rows, strict=True))) for name, rows in columns.items()
    }


def flatten(config) -> dict[str, str]:
    """Returns every key of a configuration, such as "data.crop", with its value as text."""
    flat = flax.traverse_util.flatten_dict(json.loads(config.to_json()), sep=".")
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}
