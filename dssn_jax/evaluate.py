"""Evaluation: class maps of whole images, sliding windows or centre crops, and their scores. method.md, "Evaluation"."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from dssn_jax import metrics, sharding, views
from dssn_jax.models import DeepLabV3Plus

MODES = ("original", "sliding_window", "center_crop")


def predict(model: DeepLabV3Plus, variables: dict, images: jax.Array, mode: str = "original", crop: int = 0) -> jax.Array:
    """Class maps int32 [B, H, W] of normalised images [B, H, W, 3]; mode center_crop sees the images as they are.

    Sliding windows of side `crop` start every int(crop * 2 / 3) pixels; those at the right and bottom edges are cut
    short; class probabilities of overlapping windows are summed.
    """
    if mode != "sliding_window":
        return model.apply(variables, images).argmax(-1).astype(jnp.int32)
    height, width = images.shape[1:3]
    stride = int(crop * 2 / 3)
    total = jnp.zeros((*images.shape[:3], model.num_classes), jnp.promote_types(model.dtype, jnp.float32))
    for y in range(0, height, stride):
        for x in range(0, width, stride):
            window = (slice(None), slice(y, min(y + crop, height)), slice(x, min(x + crop, width)))
            total = total.at[window].add(jax.nn.softmax(model.apply(variables, images[window])))
    return total.argmax(-1).astype(jnp.int32)


class Evaluator:
    """Scores networks on groups of equally sized images; one compilation a size."""

    def __init__(self, model: DeepLabV3Plus, config, mesh: jax.sharding.Mesh):
        """Takes `config.eval` and `config.data` of a validated config; batches are split over `mesh`."""
        self._model, self._mesh = model, mesh
        self._mode = config.eval.mode
        self._crop = config.eval.crop or config.data.crop
        self._data = config.data
        everywhere, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
        self._confusion = jax.jit(
            self._confusion_of_batch, in_shardings=(everywhere, split, split), out_shardings=everywhere
        )

    def __call__(
        self,
        networks: dict[str, dict],
        groups: Iterable[tuple[np.ndarray, np.ndarray]],
        progress: Callable[[int], None] = lambda images: None,
    ) -> dict[str, np.ndarray]:
        """Returns the confusion matrix int64 [K, K] of each network (name -> variables), reading the images once.

        `groups` yields images uint8 [n, H, W, 3] and labels uint8 [n, H, W]; `progress` is told the images done.
        """
        classes = self._model.num_classes
        totals = {name: np.zeros((classes, classes), np.int64) for name in networks}
        done = 0
        for images, labels in groups:
            done += len(images)
            if self._mode == "center_crop":
                images, labels = (_center_crop(array, self._crop) for array in (images, labels))
            batch = sharding.put_batch(self._padded(images, labels), self._mesh)
            counts = {name: self._confusion(variables, **batch) for name, variables in networks.items()}
            for name, count in counts.items():
                totals[name] += np.asarray(count, np.int64)
            progress(done)
        return totals

    def _padded(self, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Fills up to a power of two times the devices with images that do not count: few sizes to compile."""
        size = self._mesh.size
        while size < len(images):
            size *= 2
        missing = [(0, size - len(images)), (0, 0), (0, 0)]
        labels = np.pad(labels, missing, constant_values=self._data.ignore)
        return {"images": np.pad(images, [*missing, (0, 0)]), "labels": labels}

    def _confusion_of_batch(self, variables: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(self._model.dtype, jnp.float32)
        images = views.normalise(images, self._data.mean, self._data.std, dtype)
        prediction = predict(self._model, variables, images, self._mode, self._crop)
        return metrics.confusion_matrix(prediction, labels, self._model.num_classes, self._data.ignore)


def _center_crop(array: np.ndarray, crop: int) -> np.ndarray:
    """The central `crop` x `crop` part of [n, H, W, ...], or all of a side that is shorter."""
    y, x = (max((size - crop) // 2, 0) for size in array.shape[1:3])
    return array[:, y : y + crop, x : x + crop]


def scores(confusion: np.ndarray, classes: tuple[str, ...]) -> dict:
    """Returns {"miou": per cent, "iou": {class: per cent}} of a confusion matrix."""
    iou = 100 * metrics.iou(confusion)
    return {"miou": float(iou.mean()), "iou": {name: float(value) for name, value in zip(classes, iou, strict=True)}}
