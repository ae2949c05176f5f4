"""Runs as the page shows them, read from their work directories (`dssn_jax.recorder` wrote the files)."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax
import numpy as np
from etils import epath

from dssn_jax.evaluation.scores import NETWORKS
from dssn_jax.workdir import files, recorder
from dssn_jax.workdir import restore as saved_run


class Series(NamedTuple):
    """A recorded number over the run: `steps` int [n], `values` float [n, ...] and `seconds` of training, float [n]."""

    steps: np.ndarray
    values: np.ndarray
    seconds: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. What it did not record (yet) is empty."""

    label: str  # Short, and different from those of the other runs on the page.
    workdir: epath.Path
    config: Any
    facts: dict  # `dssn_jax.train.facts`.
    series: dict[str, Series]  # By the name of the metric; "iou_NETWORK" has values [n, K].
    confusions: dict[str, np.ndarray]  # Of the last evaluation, int [K, K], by network.
    steps: int  # Recorded so far.
    seconds: float  # Of training so far.
    recorded: datetime.datetime | None  # When the last of it was.

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config.data.classes)

    @property
    def networks(self) -> list[str]:
        """The networks that were evaluated."""
        return [name for name in NETWORKS if f"miou_{name}" in self.series]

    @property
    def total_steps(self) -> int | None:
        """The steps of the whole run, where known."""
        return self.facts.get("steps") or self.config.train.steps or None

    @property
    def finished(self) -> bool:
        return self.total_steps is not None and self.steps >= self.total_steps

    def last(self, network: str) -> tuple[float, int]:
        """The mean IoU, per cent, of the last evaluation, and its step."""
        series = self.series[f"miou_{network}"]
        return float(series.values[-1]), int(series.steps[-1])

    def best(self, network: str) -> tuple[float, int]:
        """The largest mean IoU, per cent, and its step: the later one of equals, as checkpoints rank them."""
        series = self.series[f"miou_{network}"]
        where = len(series.values) - 1 - int(np.argmax(series.values[::-1]))
        return float(series.values[where]), int(series.steps[where])


def read(workdirs: Sequence[str]) -> list[Run]:
    """Reads the runs in their order; raises `dssn_jax.saved_run.WorkdirError` for a folder that is none, or twice."""
    paths = [files.absolute(workdir) for workdir in workdirs]
    for path in paths:
        if paths.count(path) > 1:
            raise saved_run.WorkdirError(f"{path}: named twice in --workdir")
    labels = _labels(paths)
    return [_read(path, label) for path, label in zip(paths, labels, strict=True)]


def _labels(paths: list[epath.Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read(workdir: epath.Path, label: str) -> Run:
    config = saved_run.read_config(workdir)
    try:
        lines = recorder.read_metrics(workdir)
        if lines and not all(isinstance(line, dict) and "step" in line for line in lines):
            raise ValueError("a line without a step")
    except ValueError as error:
        raise saved_run.WorkdirError(f"{workdir / recorder.METRICS}: damaged: {error}") from None
    metrics = workdir / recorder.METRICS
    return Run(
        label=label,
        workdir=workdir,
        config=config,
        facts=_optional(workdir, recorder.RUN),
        series=_series(lines),
        confusions={
            name: np.array(counts)
            for name, counts in _optional(workdir, recorder.CONFUSION).items()
            if name in NETWORKS
        },
        steps=max((line["step"] for line in lines), default=0),
        seconds=lines[-1].get("seconds", 0.0) if lines else 0.0,
        recorded=datetime.datetime.fromtimestamp(metrics.stat().mtime) if lines else None,
    )


def _optional(workdir: epath.Path, name: str) -> dict:
    """The content of a JSON file that a run may not have written (yet)."""
    return saved_run.read_json(workdir, name) if (workdir / name).exists() else {}


def _series(lines: list[dict]) -> dict[str, Series]:
    """Collects lines into series by metric, in the order of their first appearance."""
    found: dict[str, list[tuple]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "seconds"):
                found.setdefault(name, []).append((line["step"], value, line.get("seconds", np.nan)))
    return {
        name: Series(*(np.array(column, float) for column in zip(*rows, strict=True))) for name, rows in found.items()
    }


def flatten(config) -> dict[str, str]:
    """Every key of a configuration, such as "data.crop", with its value as text."""
    flat = flax.traverse_util.flatten_dict(json.loads(config.to_json()), sep=".")
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}
