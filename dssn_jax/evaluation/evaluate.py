"""Evaluation: confusion matrices of the networks over the validation images. method.md, "Evaluation"."""

import collections
import itertools
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dssn_jax import sharding
from dssn_jax.evaluation import inference, metrics, scores
from dssn_jax.learner import learner as experiment
from dssn_jax.methods import views
from dssn_jax.models import DeepLabV3Plus
from dssn_jax.models.extent import Extent
from dssn_jax.workdir import checkpoint, recorder
from dssn_jax.workdir import restore as saved_run
from dssn_jax.workdir.recorder import duration, logger
from input_pipeline.eval_batches import Group, eval_groups
from input_pipeline.sources.open import Source


class Evaluator:
    """Predicts and scores images of any size; one compilation for each size that they are padded to."""

    def __init__(self, model: DeepLabV3Plus, config, mesh: jax.sharding.Mesh):
        """Takes `config.eval` and `config.data` of a validated config; batches are split over `mesh`."""
        self._model, self._mesh, self._config = model, mesh, config
        self._inference = inference.from_config(config)
        everywhere, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
        self._score = jax.jit(self._score_batch, in_shardings=(everywhere, split), out_shardings=(everywhere, split))
        self._predict = jax.jit(self._predict_batch, in_shardings=(everywhere, split), out_shardings=split)

    def groups(self, source: Source, **options) -> Iterator[Group]:
        """The images of `source` as `config.eval` wants them batched, this process's rows.

        `options` go to `eval_groups`: indices, ahead, on_error.
        """
        config = self._config
        crop = (config.eval.crop or config.data.crop) if config.eval.mode == "center_crop" else 0
        return eval_groups(
            source,
            batch=-(-config.eval.batch // self._mesh.size) * self._mesh.size,
            ignore=config.data.ignore,
            buckets=config.eval.buckets,
            crop=crop,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=config.data.threads,
            **options,
        )

    def __call__(
        self,
        networks: dict[str, dict],
        groups: Iterable[Group],
        progress: Callable[[int], None] = lambda images: None,
    ) -> dict[str, np.ndarray]:
        """Returns the confusion matrix int64 [K, K] of each network (name -> variables), reading the images once.

        `progress` is told the images done (of this process).
        """
        classes = self._model.num_classes
        totals = {name: np.zeros((classes, classes), np.int64) for name in networks}
        done, ahead = 0, collections.deque()
        for group in itertools.chain(groups, [None]):
            if group is not None:
                batch = self._put(group)
                counts = {name: self._score(variables, batch)[0] for name, variables in networks.items()}
                ahead.append((len(group.indices), counts))
            while len(ahead) > (group is not None):  # The devices are one group ahead of the sums.
                images, counts = ahead.popleft()
                for name, count in counts.items():
                    totals[name] += np.asarray(count, np.int64)
                done += images
                progress(done)
        return totals

    def class_maps(self, variables: dict, group: Group) -> np.ndarray:
        """Predicts a group: uint8 [rows, H, W], ignored where there is no image."""
        return sharding.local_rows(self._score(variables, self._put(group))[1])

    def predict(self, variables: dict, group: Group) -> tuple[np.ndarray, np.ndarray]:
        """Predicts a group: class ids uint8 [rows, H, W], and the probability of the predicted class, 0 to 255."""
        return tuple(map(sharding.local_rows, self._predict(variables, self._put(group))))

    def _put(self, group: Group) -> dict[str, jax.Array]:
        arrays = {"images": group.images, "labels": group.labels, "sizes": group.sizes}
        return sharding.put_batch(arrays, self._mesh)

    def _score_batch(self, variables: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        """The confusion matrix int32 [K, K] of a group, and class maps uint8 [rows, H, W], ignored outside images."""
        images, extent = self._images(batch)
        found = self._inference.predict(self._model, variables, images, extent)
        ignore = self._config.data.ignore
        confusion = metrics.confusion_matrix(found, batch["labels"], self._model.num_classes, ignore)
        inside = extent.mask(*found.shape[1:])[..., 0]
        return confusion, jnp.where(inside, found, ignore).astype(jnp.uint8)

    def _predict_batch(self, variables: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        found, confidence = self._inference.predict_with_confidence(self._model, variables, *self._images(batch))
        return found.astype(jnp.uint8), jnp.round(255 * confidence).astype(jnp.uint8)

    def _images(self, batch: dict) -> tuple[jax.Array, Extent]:
        """Normalized images and their extent."""
        data = self._config.data
        dtype = jnp.promote_types(self._model.dtype, jnp.float32)
        images = views.normalize(batch["images"], data.mean, data.std, dtype)
        return images, Extent(batch["sizes"][:, 0], batch["sizes"][:, 1])


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
    parts = experiment.build(saved_run.continued(config, workdir))
    config = parts.config
    recorder.log_to(None)
    saved = checkpoint.Checkpointer(workdir, read_only=True)
    step = saved.resolve(which)
    state, _ = saved.restore(step, parts.abstract_state(), config)
    saved.close()
    val = parts.sources.val
    logger.info("evaluating step %d of %s on %d images: %s", step, workdir, len(val), config.eval.mode)
    networks = state.networks()
    evaluator = Evaluator(parts.model, config, parts.mesh)
    confusions = evaluator(networks, evaluator.groups(val), log_progress(len(val)))
    found = {name: scores.of_confusion(confusion, config.data.classes) for name, confusion in confusions.items()}
    logger.info("IoU, per cent\n%s", recorder.class_table(found))
    path = epath.Path(workdir) / f"eval_{step}.json"
    recorder.write_json(path, {"name": config.name, "step": step, "mode": config.eval.mode, **found})
    logger.info("wrote %s", path)
    return found
