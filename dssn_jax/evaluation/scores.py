"""Scores of the networks over a run: last and best, kept as plain dicts that go into checkpoints and the summary."""

import numpy as np

from dssn_jax.evaluation import metrics

NETWORKS = ("student", "teacher")


def of_confusion(confusion: np.ndarray, classes: tuple[str, ...]) -> dict:
    """Returns {"miou", "pixel_accuracy", "frequency_weighted_iou", "iou": {class: ...}}, per cent."""
    iou = 100 * metrics.iou(confusion)
    return {
        "miou": float(iou.mean()),
        "pixel_accuracy": 100 * metrics.pixel_accuracy(confusion),
        "frequency_weighted_iou": 100 * metrics.frequency_weighted_iou(confusion),
        "iou": {name: float(value) for name, value in zip(classes, iou, strict=True)},
    }


def new() -> dict:
    """The scores of a run that was not evaluated yet."""
    return {"best_step": None, "best_miou": None}


def update(scores: dict, step: int, evaluated: dict[str, dict]) -> None:
    """Enters what `of_confusion` gave for each network (name -> scores) after `step`.

    `best_step` is the step with the largest mean IoU of any network, the later one of equals, as checkpoints rank it.
    """
    for name, found in evaluated.items():
        entry = {"step": step, **found}
        networks = scores.setdefault(name, {"best": entry})
        networks["last"] = entry
        if entry["miou"] >= networks["best"]["miou"]:
            networks["best"] = entry
    miou = last_miou(scores)
    if scores["best_miou"] is None or miou >= scores["best_miou"]:
        scores["best_step"], scores["best_miou"] = step, miou


def last(scores: dict) -> dict[str, dict]:
    """The scores of each network at the last evaluation."""
    return {name: scores[name]["last"] for name in NETWORKS if name in scores}


def last_miou(scores: dict) -> float:
    """The larger mean IoU, per cent, of the networks at the last evaluation."""
    return max(entry["miou"] for entry in last(scores).values())
