"""Reads the runs that the report shows from their work directories."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax
import numpy as np
from etils import epath

from dssn_jax.evaluation import metrics
from dssn_jax.workdir import files, recorder, restore
from dssn_jax.workdir.restore import WorkdirError


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
    series: dict[str, Series]  # By name of the metric; "iou_NETWORK" has values [n, K].
    confusions: dict[str, np.ndarray]  # Confusion matrix int [K, K] of the last evaluation, by network.
    steps: int  # Recorded so far.
    seconds: float  # Training time so far.
    recorded: datetime.datetime | None  # Time of the last record.

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config.data.classes)

    @property
    def networks(self) -> list[str]:
        """The networks that were evaluated."""
        return [name for name in metrics.NETWORKS if f"iou_{name}" in self.series]

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
    config, path = restore.read_config(workdir), workdir / recorder.METRICS
    metrics.ranking(config)
    try:
        lines = recorder.read_metrics(workdir)
        series = _series(lines)
    except (ValueError, TypeError, KeyError) as error:
        raise WorkdirError(f"{path}: damaged: {error}") from None
    confusions = _optional_json(workdir, recorder.CONFUSION)
    return Run(
        label=label,
        workdir=workdir,
        config=config,
        info=_optional_json(workdir, recorder.RUN),
        series=series,
        confusions={name: np.array(confusions[name]) for name in metrics.NETWORKS if name in confusions},
        steps=lines[-1]["step"] if lines else 0,
        seconds=lines[-1]["seconds"] if lines else 0.0,
        recorded=datetime.datetime.fromtimestamp(path.stat().mtime) if lines else None,
    )


def _optional_json(workdir: epath.Path, name: str) -> dict:
    """Returns the content of a JSON file, {} if it does not exist (yet)."""
    return restore.read_json(workdir, name) if (workdir / name).exists() else {}


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
