"""Evaluation: confusion matrices of the networks over the validation images. method.md, "Evaluation"."""

import pathlib
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

import input_pipeline
from dssn_jax import checkpoint, experiment, inference, metrics, recorder, scores, sharding, views
from dssn_jax.models import DeepLabV3Plus
from dssn_jax.recorder import duration, logger


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
        self._whole = jax.jit(lambda variables, images: inference.predict(model, variables, self._normalise(images)))

    def __call__(
        self,
        networks: dict[str, dict],
        groups: Iterable[input_pipeline.Group],
        progress: Callable[[int], None] = lambda images: None,
    ) -> dict[str, np.ndarray]:
        """Returns the confusion matrix int64 [K, K] of each network (name -> variables), reading the images once.

        `progress` is told the images done.
        """
        classes = self._model.num_classes
        totals = {name: np.zeros((classes, classes), np.int64) for name in networks}
        done = 0
        for _, images, labels in groups:
            done += len(images)
            if self._mode == "center_crop":
                images, labels = (_center_crop(array, self._crop) for array in (images, labels))
            batch = sharding.put_batch(self._padded(images, labels), self._mesh)
            counts = {
                name: self._confusion(variables, batch["images"], batch["labels"])
                for name, variables in networks.items()
            }
            for name, count in counts.items():
                totals[name] += np.asarray(count, np.int64)
            progress(done)
        return totals

    def class_maps(self, variables: dict, images: np.ndarray) -> np.ndarray:
        """Predicts whole images uint8 [n, H, W, 3] of one size: int32 [n, H, W]."""
        return np.asarray(self._whole(variables, images))

    def _padded(self, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Fills up to a power of two times the devices with images that do not count: few sizes to compile."""
        size = self._mesh.size
        while size < len(images):
            size *= 2
        missing = [(0, size - len(images)), (0, 0), (0, 0)]
        labels = np.pad(labels, missing, constant_values=self._data.ignore)
        return {"images": np.pad(images, [*missing, (0, 0)]), "labels": labels}

    def _confusion_of_batch(self, variables: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
        prediction = inference.predict(self._model, variables, self._normalise(images), self._mode, self._crop)
        return metrics.confusion_matrix(prediction, labels, self._model.num_classes, self._data.ignore)

    def _normalise(self, images: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(self._model.dtype, jnp.float32)
        return views.normalise(images, self._data.mean, self._data.std, dtype)


def _center_crop(array: np.ndarray, crop: int) -> np.ndarray:
    """The central `crop` x `crop` part of [n, H, W, ...], or all of a side that is shorter."""
    y, x = (max((size - crop) // 2, 0) for size in array.shape[1:3])
    return array[:, y : y + crop, x : x + crop]


def log_progress(total: int, every: float = 10.0) -> Callable[[int], None]:
    """Returns a callback for `Evaluator` that logs the images done, at most once in `every` seconds."""
    started = last = time.monotonic()

    def progress(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every:
            last = now
            left = (now - started) / done * (total - done)
            logger.info("evaluating: %d/%d images, %s left", done, total, duration(left))

    return progress


def evaluate(config, workdir: str, which: str) -> dict:
    """Scores the networks of a checkpoint ("latest", "best" or a step) of `workdir`; `--mode=eval`.

    Logs a table, writes and returns `workdir/eval_STEP.json`: {"student": {"miou", "iou"}, "teacher": ...}, per cent.
    """
    parts = experiment.build(config)
    recorder.log_to(None)
    saved = checkpoint.Checkpointer(workdir, read_only=True)
    step = saved.resolve(which)
    state, _ = saved.restore(step, parts.abstract_state(), config)
    saved.close()
    val = parts.sources.val
    logger.info("evaluating step %d of %s on %d images: %s", step, workdir, len(val), config.eval.mode)
    networks = state.networks()
    groups = input_pipeline.val_groups(val, config.eval.batch, config.data.threads)
    confusions = Evaluator(parts.model, config, parts.mesh)(networks, groups, log_progress(len(val)))
    found = {name: scores.of_confusion(confusion, config.data.classes) for name, confusion in confusions.items()}
    logger.info("IoU, per cent\n%s", recorder.class_table(found))
    path = pathlib.Path(workdir) / f"eval_{step}.json"
    recorder.write_json(path, {"name": config.name, "step": step, "mode": config.eval.mode, **found})
    logger.info("wrote %s", path)
    return found
