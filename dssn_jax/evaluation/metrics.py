"""Scores of class maps."""

import jax
import jax.numpy as jnp
import numpy as np


def confusion_matrix(prediction: jax.Array, label: jax.Array, num_classes: int, ignore: int = 255) -> jax.Array:
    """Counts pixels: int32 [K, K], row = true class, column = predicted class.

    `prediction` and `label` are integers of one shape; pixels whose label is `ignore` are not counted.
    """
    valid = label != ignore
    cell = jnp.where(valid, label.astype(jnp.int32) * num_classes + prediction.astype(jnp.int32), num_classes**2)
    counts = jnp.bincount(cell.ravel(), length=num_classes**2 + 1)
    return counts[:-1].reshape(num_classes, num_classes).astype(jnp.int32)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, float64 [K] in [0, 1]; a class that is nowhere counts 0."""
    confusion = np.asarray(confusion, np.int64)
    intersection = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return intersection / np.maximum(union, 1)


def pixel_accuracy(confusion: np.ndarray) -> float:
    """Share of the counted pixels that are predicted right, in [0, 1]; 0 if none is counted."""
    confusion = np.asarray(confusion, np.int64)
    return float(np.diag(confusion).sum() / max(confusion.sum(), 1))


def frequency_weighted_iou(confusion: np.ndarray) -> float:
    """Mean IoU of the classes weighted by their share of the true pixels, in [0, 1]. Long et al., CVPR 2015."""
    confusion = np.asarray(confusion, np.int64)
    return float((confusion.sum(1) * iou(confusion)).sum() / max(confusion.sum(), 1))
