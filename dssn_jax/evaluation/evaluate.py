"""Evaluation: confusion matrices of networks over the validation images; `--mode=eval`."""

import collections
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dssn_jax import sharding
from dssn_jax.evaluation import inference, metrics
from dssn_jax.learner.learner import Learner
from dssn_jax.models.extent import Extent
from dssn_jax.validate import validate_evaluation
from dssn_jax.workdir import recorder
from dssn_jax.workdir.recorder import duration, logger
from dssn_jax.workdir.restore import inherit_choices, restore
from input_pipeline.eval_batches import EvalBatch, EvalOptions, eval_batches
from input_pipeline.sources.open import Source, open_source


class Scored(NamedTuple):
    """Results of one batch."""

    confusion: jax.Array  # int32 [K, K]
    class_maps: jax.Array  # uint8 [rows, H, W], ignored outside images.
    images: jax.Array  # int32 []: images in the batch, over all processes.


class Evaluator:
    """Predicts and scores images of any size; compiles one program per padded size."""

    def __init__(self, learner: Learner):
        """Uses `config.eval` and splits batches over the mesh of `learner`; raises ConfigError."""
        self._learner, config = learner, learner.config
        validate_evaluation(config)
        metrics.ranking(config)
        self._inference = inference.from_config(config, learner.network)
        self._options = EvalOptions(
            batch=-(-config.eval.batch // learner.mesh.size) * learner.mesh.size,
            ignore=config.data.ignore,
            buckets=config.eval.buckets,
            crop=inference.eval_crop(config) if config.eval.mode == "center_crop" else 0,
            size_multiple=learner.network.size_multiple,
            threads=config.data.threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        replicated, split = sharding.replicated(learner.mesh), sharding.batch_sharded(learner.mesh)
        shardings = {"in_shardings": (replicated, split), "out_shardings": Scored(replicated, split, replicated)}
        self._score = jax.jit(self._score_batch, **shardings)
        self._predict = jax.jit(self._predict_batch, **shardings | {"out_shardings": split})

    def batches(self, source: Source, **options) -> Iterator[EvalBatch]:
        """Yields the images of `source` in batches, this process's rows; `options` go to `eval_batches`."""
        return eval_batches(source, self._options, **options)

    def __call__(
        self,
        networks: dict[str, dict],
        batches: Iterable[EvalBatch],
        progress: Callable[[int], None] = lambda images: None,
    ) -> dict[str, np.ndarray]:
        """Returns the confusion matrix int64 [K, K] of each network (name -> variables), reading the images once.

        `progress` is called with the number of images done so far, over all processes.
        """
        classes = self._learner.network.num_classes
        totals = {name: np.zeros((classes, classes), np.int64) for name in networks}
        done, ahead = 0, collections.deque()
        for batch in itertools.chain(batches, [None]):
            if batch is not None:
                arrays = self._put(batch)
                scored = {name: self._score(variables, arrays) for name, variables in networks.items()}
                ahead.append({name: (each.confusion, each.images) for name, each in scored.items()})
            while len(ahead) > (batch is not None):  # The devices are one batch ahead of the sums.
                counts = ahead.popleft()
                for name, (confusion, _) in counts.items():
                    totals[name] += np.asarray(confusion, np.int64)
                done += max(int(images) for _, images in counts.values())
                progress(done)
        return totals

    def class_maps(self, variables: dict, batch: EvalBatch) -> np.ndarray:
        """Predicts a batch: class ids uint8 [rows, H, W], ignored outside images."""
        return sharding.local_rows(self._score(variables, self._put(batch)).class_maps)

    def predict(self, variables: dict, batch: EvalBatch) -> tuple[np.ndarray, np.ndarray]:
        """Predicts a batch: class ids and their probabilities, 0 to 255, both uint8 [rows, H, W]."""
        return tuple(map(sharding.local_rows, self._predict(variables, self._put(batch))))

    def _put(self, batch: EvalBatch) -> dict[str, jax.Array]:
        arrays = {"images": batch.images, "labels": batch.labels, "sizes": batch.sizes}
        return sharding.put_batch(arrays, self._learner.mesh)

    def _score_batch(self, variables: dict, batch: dict) -> Scored:
        class_maps, _, extent = self._infer(variables, batch)
        ignore = self._learner.config.data.ignore
        confusion = metrics.confusion_matrix(class_maps, batch["labels"], self._learner.network.num_classes, ignore)
        inside = extent.mask(*class_maps.shape[1:])[..., 0]
        return Scored(confusion, jnp.where(inside, class_maps, ignore).astype(jnp.uint8), (extent.height > 0).sum())

    def _predict_batch(self, variables: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        class_maps, probabilities, _ = self._infer(variables, batch)
        return class_maps.astype(jnp.uint8), jnp.round(255 * probabilities).astype(jnp.uint8)

    def _infer(self, variables: dict, batch: dict) -> tuple[jax.Array, jax.Array, Extent]:
        extent = Extent(batch["sizes"][:, 0], batch["sizes"][:, 1])
        return *self._inference.predict(variables, self._learner.normalize(batch["images"]), extent), extent


def log_progress(total: int, period: float = 10.0) -> Callable[[int], None]:
    """Returns a callback for `Evaluator` that logs the images done, at most once per `period` seconds."""
    started = last = time.monotonic()

    def progress(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= period:
            last = now
            left = (now - started) / done * (total - done)
            logger.info("evaluating: %d/%d images, %s left", done, total, duration(left))

    return progress


def evaluate(workdir: epath.PathLike, *, config, checkpoint: str = "best") -> dict:
    """Scores the networks of a checkpoint on the validation images, on any number of devices.

    Args:
      workdir: of the run.
      config: names the validation images and describes the networks.
      checkpoint: "best", "latest" or a step.

    Returns:
      {"student": `metrics.scores_of`, "teacher": ...}, which is logged as a table and written to
      workdir/eval_STEP.json.

    Raises:
      WorkdirError, CheckpointError, ConfigError or DataError.
    """
    config = inherit_choices(config, workdir)
    validate_evaluation(config)
    val = open_source(config, "val")
    learner, step, networks, _ = restore(workdir, checkpoint, config=config)
    evaluator = Evaluator(learner)
    logger.info("evaluating step %d of %s on %d images: %s", step, workdir, len(val), config.eval.mode)
    confusions = evaluator(networks, evaluator.batches(val), log_progress(len(val)))
    scores = {name: metrics.scores_of(confusion, config.data.classes) for name, confusion in confusions.items()}
    logger.info("scores in percent\n%s", metrics.class_table(scores))
    path = epath.Path(workdir) / f"eval_{step}.json"
    recorder.write_json(path, {"name": config.name, "step": step, "mode": config.eval.mode, **scores})
    logger.info("wrote %s", path)
    return scores
