"""Metrics of class maps, all functions of a confusion matrix, and the scores of a run."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tabulate

from configs.checks import check_choice
from dssn_jax.workdir.checkpoint import new_scores
from input_pipeline.errors import printable

NETWORKS = ("student", "teacher")


def confusion_matrix(prediction: jax.Array, label: jax.Array, num_classes: int, ignore: int = 255) -> jax.Array:
    """Counts pixels: int32 [K, K], row = true class, column = predicted class.

    `prediction` and `label` are integers of the same shape; pixels whose label is `ignore` are not counted.
    """
    valid = label != ignore
    cell = jnp.where(valid, label.astype(jnp.int32) * num_classes + prediction.astype(jnp.int32), num_classes**2)
    counts = jnp.bincount(cell.ravel(), length=num_classes**2 + 1)
    return counts[:-1].reshape(num_classes, num_classes).astype(jnp.int32)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of each class, float64 [K] in [0, 1] (docs/method.md, Eq. 14).

    A class that is neither labeled nor predicted counts as 0.
    """
    confusion = np.asarray(confusion, np.int64)
    intersection = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return intersection / np.maximum(union, 1)


def mean_iou(confusion: np.ndarray) -> float:
    """Returns the mean IoU over all classes, in [0, 1]."""
    return float(iou(confusion).mean())


def pixel_accuracy(confusion: np.ndarray) -> float:
    """Returns the share of the counted pixels that are predicted correctly, in [0, 1]; 0 if none is counted."""
    confusion = np.asarray(confusion, np.int64)
    return float(np.diag(confusion).sum() / max(confusion.sum(), 1))


def frequency_weighted_iou(confusion: np.ndarray) -> float:
    """Returns the IoU averaged with the frequencies of the true classes, in [0, 1]. Long et al., CVPR 2015."""
    confusion = np.asarray(confusion, np.int64)
    return float((confusion.sum(1) * iou(confusion)).sum() / max(confusion.sum(), 1))


class Metric(NamedTuple):
    """An entry of `METRICS`."""

    function: Callable[[np.ndarray], float]  # Maps a confusion matrix [K, K] to [0, 1]; larger is better.
    title: str


# Logs, tables, records, the report and `config.eval.metric` use every metric here; docs/extending.md.
METRICS = {
    "miou": Metric(mean_iou, "Mean IoU"),
    "pixel_accuracy": Metric(pixel_accuracy, "Pixel accuracy"),
    "frequency_weighted_iou": Metric(frequency_weighted_iou, "Frequency-weighted IoU"),
}


def ranking(config) -> str:
    """Returns `config.eval.metric`, the name of the metric that ranks checkpoints; raises ConfigError."""
    check_choice("config.eval.metric", config.eval.metric, METRICS)
    return config.eval.metric


def scores_of(confusion: np.ndarray, classes: tuple[str, ...]) -> dict:
    """Returns {METRIC: value for each of `METRICS`, "iou": {CLASS: value}}, in percent."""
    scores = {name: 100 * metric.function(confusion) for name, metric in METRICS.items()}
    return scores | {"iou": {name: float(value) for name, value in zip(classes, 100 * iou(confusion), strict=True)}}


def class_table(scores: dict[str, dict]) -> str:
    """Formats the scores of networks, by name, as a table: a row per class and per metric, a column per network."""
    networks = list(scores)
    classes = scores[networks[0]]["iou"]
    rows = [[printable(label), *(scores[name]["iou"][label] for name in networks)] for label in classes]
    rows.append(tabulate.SEPARATING_LINE)
    rows += [[metric.title, *(scores[name][key] for name in networks)] for key, metric in METRICS.items()]
    return tabulate.tabulate(rows, ["IoU, %", *networks], floatfmt=".2f", disable_numparse=[0])


def update_scores(run: dict, step: int, evaluated: dict[str, dict]) -> float:
    """Enters the scores of each network (name -> `scores_of`) at `step` into those of the run; returns the run's score.

    That is the larger value of `run["metric"]` of all networks. The step with the largest one, the later of equals, is
    the run's best, as it is for checkpoints.
    """
    metric = run["metric"]
    for name, scores in evaluated.items():
        entry = {"step": step, **scores}
        network = run.setdefault(name, {"best": entry})
        network["last"] = entry
        if entry[metric] >= network["best"][metric]:
            network["best"] = entry
    score = max(scores[metric] for scores in evaluated.values())
    if run["best_score"] is None or score >= run["best_score"]:
        run["best_step"], run["best_score"] = step, score
    return score


def continue_scores(saved: dict, metric: str) -> dict:
    """Returns the saved scores of a run that is continued; another metric starts a new ranking."""
    return saved if saved["metric"] == metric else saved | new_scores(metric)


def last_scores(run: dict) -> dict[str, dict]:
    """Returns the scores of each network at the last evaluation."""
    return {name: run[name]["last"] for name in NETWORKS if name in run}
