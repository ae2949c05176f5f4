"""Evaluation: confusion matrices of networks over the validation images; `--mode=eval`."""

import collections
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from configs.checks import shorten
from dssn_jax import auto_config, compiler, sharding
from dssn_jax.evaluation import inference, metrics
from dssn_jax.learner.learner import Learner
from dssn_jax.models.extent import Extent
from dssn_jax.validate import validate_evaluation
from dssn_jax.workdir import records
from dssn_jax.workdir.logs import duration, logger
from dssn_jax.workdir.restore import inherit_choices, restore
from input_pipeline.errors import DataError, first_messages, printable
from input_pipeline.eval_batches import EvalBatch, EvalOptions, eval_batches, padded_sizes
from input_pipeline.sources.open import Source, open_source

_MOST_SCORES = 2**29  # Per device at a time, in number: 2 GiB of float32; of images for fewer than 32 classes, for 32.


class Scored(NamedTuple):
    """Results of one batch."""

    confusion: jax.Array  # int32 [K, K]
    class_maps: jax.Array  # uint8 [rows, H, W], ignored outside images.
    images: jax.Array  # int32 []: images in the batch, over all processes.


class MemoryLimitError(DataError):
    """A batch that needs more memory than there is."""


class Program(NamedTuple):
    """A program for batches of one size."""

    compiled: Callable | None  # None: too large even to compile.
    needed: float  # Bytes per device, without the parameters.
    free: float  # Bytes per device, the least of all processes.


class Evaluator:
    """Predicts and scores images of any size; compiles one program per padded size.

    Without `network.supports_padding` batches hold images of equal size, and every size has a program of its own.
    """

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
            equal_sizes=not learner.network.supports_padding,
            crop=inference.eval_crop(config) if config.eval.mode == "center_crop" else 0,
            threads=config.data.threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            devices=learner.mesh.size,
            pixels=int(_MOST_SCORES / max(learner.network.num_classes, 32) / max(1.0, *config.eval.scales) ** 2),
        )
        self._programs: dict[tuple, Program] = {}
        self._warned = False
        replicated, split = sharding.replicated(learner.mesh), sharding.batch_sharded(learner.mesh)
        options = {"in_shardings": (replicated, split), "compiler_options": compiler.options(learner.mesh)}
        self._score = jax.jit(self._score_batch, **options, out_shardings=Scored(replicated, split, replicated))
        self._predict = jax.jit(self._predict_batch, **options, out_shardings=split)

    def batches(
        self,
        source: Source,
        *,
        probabilities: bool = False,
        indices: Sequence[int] | None = None,
        on_error: Callable[[int, DataError], None] | None = None,
    ) -> Iterator[EvalBatch]:
        """Yields images of `source` in batches that fit into memory, this process's rows.

        Args:
          source: with or without labels.
          probabilities: whether the batches are for `predict`.
          indices: records to read; default all.
          on_error: receives the index and the error of an image that is left out, because it cannot be read or needs
            more memory than there is. By default an image that cannot be read raises its DataError, and a warning at
            the end names those that are too large.
        """
        self._warn_of_sizes(source, indices)
        program, too_large, fitting = self._predict if probabilities else self._score, [], 0
        for batch in eval_batches(source, self._options, indices=indices, on_error=on_error):
            for piece in self._fitting(program, batch):
                if isinstance(piece, EvalBatch):
                    fitting += len(piece.indices)
                    yield piece
                    continue
                for index in piece:
                    error = self._too_large(program, source, index, batch)
                    too_large.append(error) if on_error is None else on_error(index, error)
        if too_large and not fitting and jax.process_count() == 1:
            raise MemoryLimitError(first_messages(too_large))
        if too_large:
            logger.warning("%d images are left out: %s", len(too_large), first_messages(too_large))

    def _warn_of_sizes(self, source: Source, indices: Sequence[int] | None) -> None:
        """Warns, once, if images cannot be padded to few sizes and have many."""
        if not self._options.equal_sizes or self._warned:
            return
        sizes = len(set(padded_sizes(source, self._options, indices).values()))
        self._warned = sizes > self._options.buckets
        if self._warned:
            logger.warning(
                "%s supports no padding: images of %d sizes need a program for each, which is compiled first",
                self._learner.config.model.encoder, sizes,
            )  # fmt: skip

    def _fitting(self, program: Callable, batch: EvalBatch) -> Iterator[EvalBatch | tuple[int, ...]]:
        """Yields `batch`, or batches of one row per device if it needs too much memory, or the indices of these."""
        rows = self._options.devices // self._options.process_count
        for size in dict.fromkeys((len(batch.images), rows)):
            plan = self._program(program, (size, *batch.images.shape[1:3]))
            if plan.needed <= plan.free:
                yield from batch.split(size)
                return
        yield batch.indices

    def _too_large(self, program: Callable, source: Source, index: int, batch: EvalBatch) -> MemoryLimitError:
        rows = self._options.devices // self._options.process_count
        plan, (height, width) = self._program(program, (rows, *batch.images.shape[1:3])), source.size(index)
        return MemoryLimitError(
            f"{printable(source.name(index))}: {width}x{height} pixels need {plan.needed / 1e6:.0f} MB of memory, and "
            f"{plan.free / 1e6:.0f} MB are free"
        )

    def _program(self, program: Callable, shape: tuple[int, int, int]) -> Program:
        """Returns `program` (`self._score` or `self._predict`) compiled for this process's rows, height and width."""
        key = program is self._predict, shape
        if key not in self._programs:
            rows, height, width = shape[0] * self._options.process_count, *shape[1:]
            types = {"images": ((3,), np.uint8), "labels": ((), np.uint8)}
            batch = {
                name: jax.ShapeDtypeStruct((rows, height, width, *channels), dtype)
                for name, (channels, dtype) in types.items()
            }
            batch["sizes"] = jax.ShapeDtypeStruct((rows, 2), np.int32)
            self._programs[key] = self._compile(program, batch)
            plan = self._programs[key]
            logger.info(
                "evaluating %d images of %dx%d pixels at a time: %.0f MB of memory per device, %.0f MB free",
                rows, width, height, plan.needed / 1e6, plan.free / 1e6,
            )  # fmt: skip
        return self._programs[key]

    def _compile(self, program: Callable, batch: dict) -> Program:
        """Compiles a program and compares the memory that it needs with what there is."""
        compiled, needed = None, math.inf
        variables = self._learner.abstract_state().networks()["student"]
        with contextlib.suppress(MemoryLimitError), _memory_errors():
            compiled = program.lower(variables, batch).compile()
            memory = compiled.memory_analysis()
            needed = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else 0
        free = _free_memory(self._learner.mesh.local_devices)
        if jax.process_count() > 1:
            free = float(multihost_utils.process_allgather(np.float32(free)).min())
        return Program(compiled, needed, free)

    def _run(self, program: Callable, variables: dict, batch: dict[str, jax.Array]):
        rows, height, width = batch["labels"].shape
        shape = (rows // self._options.process_count, height, width)
        return self._program(program, shape).compiled(variables, batch)

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
        with _memory_errors():
            for batch in itertools.chain(batches, [None]):
                if batch is not None:
                    arrays = self._put(batch)
                    scored = {name: self._run(self._score, variables, arrays) for name, variables in networks.items()}
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
        with _memory_errors():
            return sharding.local_rows(self._run(self._score, variables, self._put(batch)).class_maps)

    def predict(self, variables: dict, batch: EvalBatch) -> tuple[np.ndarray, np.ndarray]:
        """Predicts a batch: class ids and their probabilities, 0 to 255, both uint8 [rows, H, W]."""
        with _memory_errors():
            return tuple(map(sharding.local_rows, self._run(self._predict, variables, self._put(batch))))

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


def _free_memory(devices: Sequence[jax.Device]) -> float:
    """Returns the free bytes for each of the `devices` of this process."""
    stats = devices[0].memory_stats()
    if stats is None:  # A CPU, whose devices share the memory of the machine.
        return auto_config.free_memory() / len(devices)
    return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else math.inf


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Raises a MemoryLimitError instead of the error of a device whose memory is full."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryLimitError(
            f"out of memory: {shorten(error)}; a smaller config.eval.batch, config.eval.mode=sliding_window or smaller "
            "images may help"
        ) from None


def log_progress(total: int, what: str = "evaluating", period: float = 10.0) -> Callable[[int], None]:
    """Returns a callback for `Evaluator` that logs the images done, at most once per `period` seconds."""
    started = last = time.monotonic()

    def progress(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= period:
            last = now
            left = (now - started) / done * (total - done)
            logger.info("%s: %d/%d images, %s left", what, done, total, duration(left))

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
    if not any(confusion.any() for confusion in confusions.values()):
        raise DataError(f"the masks of the {len(val)} validation images have no pixel of a class: all are ignored")
    scores = {name: metrics.scores_of(confusion, config.data.classes) for name, confusion in confusions.items()}
    logger.info("scores in percent\n%s", metrics.class_table(scores))
    path = epath.Path(workdir) / f"eval_{step}.json"
    records.write_json(path, {"name": config.name, "step": step, "mode": config.eval.mode, **scores})
    logger.info("wrote %s", path)
    return scores
