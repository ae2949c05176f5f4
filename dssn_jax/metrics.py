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
