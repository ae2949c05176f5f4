"""The training loop: steps, log lines, evaluations, checkpoints."""

import json
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from etils import epath

from configs import checks
from dssn_jax import distributed, sharding
from dssn_jax.evaluation import evaluate, scores
from dssn_jax.learner import learner as experiment
from dssn_jax.training import image_summaries as panels
from dssn_jax.weights import pretrained
from dssn_jax.workdir import checkpoint, files, recorder
from dssn_jax.workdir import restore as saved_run
from dssn_jax.workdir.recorder import duration, logger
from input_pipeline.errors import UserError
from input_pipeline.pipeline import train_dataset, train_iterator
from input_pipeline.sources.open import digest

# Beginnings of the names of metrics, in the order of the log line.
_LOGGED = ("loss", "contrast", "mask_ratio", "lr", "grad_norm")

_RANDOM_WEIGHTS = (
    "random weights: published scores start from weights of ImageNet; without them, and with few labels, expect far "
    "lower ones (config.model.pretrained; README, Pretrained weights)"
)


class DivergedError(UserError):
    """The loss became infinite or not a number."""


def train(config, workdir: epath.PathLike, deadline: float = math.inf) -> dict:
    """Trains what `config` describes in `workdir`, continuing from its latest checkpoint if there is one.

    At `deadline` (of time.monotonic; for runs of one process) it saves and stops, as at SIGTERM: PreemptedError.

    Returns the summary, which is also written to `workdir/summary.json`. Raises ConfigError, DataError, CheckpointError
    and StateDictError before anything is written when the input is bad, and DivergedError when the loss is not finite.
    """
    workdir = epath.Path(workdir)
    # Before the work directory is made: bad input leaves nothing behind.
    parts = experiment.build(saved_run.continued(config, workdir))
    config, weights = parts.config, None
    if config.model.pretrained and not checkpoint.exists(workdir):
        weights = pretrained.load(config, parts.abstract_state().student)
    folder = files.Folder(workdir, continued=(recorder.LOG,))
    recorder.log_to(folder.growing)
    trainer = Trainer(parts, folder, weights, deadline)
    del weights  # The state has its own copy; a second one would stay on the device for the whole run.
    try:
        return trainer.run()
    finally:
        trainer.close()
        folder.close()


class Trainer:
    """A run in progress."""

    def __init__(
        self,
        parts: experiment.Experiment,
        workdir: files.Folder,
        weights: pretrained.Fitted | None = None,
        deadline: float = math.inf,
    ):
        """Continues the run in `workdir`, or begins with `weights` (None: random ones)."""
        self._parts, self._workdir, config = parts, workdir.path, parts.config
        self._saved = checkpoint.Checkpointer(workdir.path)
        dataset = train_dataset(parts.sources, config, jax.process_index(), jax.process_count())
        self._iterator = train_iterator(dataset, config)
        self._scores = scores.new()
        trained_on = {"labeled": parts.sources.labeled, "unlabeled": parts.sources.unlabeled}
        self._records = {name: digest(source) for name, source in trained_on.items()}
        self.state = self._start(weights)
        self._step = int(self.state.step)
        self._take_step = parts.compile_step()
        self._evaluator = evaluate.Evaluator(parts.model, config, parts.mesh)
        self._panels = panels.Panels(parts, config.train.pictures)
        self._recorder = recorder.Recorder(workdir, self._step)
        self._feeder = Feeder(self._iterator, parts.mesh)
        self._preemption = distributed.Preemption(deadline)
        self._pending: list[dict] = []  # Metrics of the steps since the last log line, on the device.
        self._clock = Clock()

    def _start(self, weights: pretrained.Fitted | None):
        """Restores the latest checkpoint, or begins with `weights`."""
        parts, step = self._parts, self._saved.latest_step()
        config = json.loads(parts.config.to_json())
        found = facts(parts)
        for reason in parts.chosen:
            logger.info("chosen: %s", reason)
        logger.info(_description(config, found))
        if step is None:
            state = parts.initial_state(weights and weights.variables)
            logger.info("starting from %s", weights.report if weights else _RANDOM_WEIGHTS)
        else:
            state, meta = self._saved.restore(step, parts.abstract_state(), parts.config)
            self._iterator.set_state({"step": step})
            self._scores = meta["scores"]
            if 0 < step < parts.steps and parts.config.train.resume == "exact":
                _check_continues(self._workdir, step, meta, self._meta())
            logger.info("continuing from step %d of %s", step, self._workdir)
            for change in checks.differences(meta["config"], config):
                logger.info("changed since that checkpoint: %s", change)
        recorder.write_json(self._workdir / "config.json", config)
        recorder.write_json(self._workdir / recorder.RUN, found)
        return state

    def run(self) -> dict:
        """Trains to the last step; returns the summary."""
        while self._step < self._parts.steps:
            batch, waited = self._feeder.take(running=self._pending[-2:])
            self.state, metrics = self._take_step(self.state, batch)
            self._pending.append(metrics)
            self._step += 1
            if self._step < self._parts.steps:
                self._feeder.start()
            self._clock.stepped(waited)
            self._after_step(batch)
            if self._preemption.reached(self._step) and self._step < self._parts.steps:
                self._stop()
        self._saved.wait()
        return self._summarize()

    def _stop(self) -> None:
        """Saves the state now, unless it just was, and ends the run."""
        if self._saved.latest_step() != self._step:
            self._log()
            self._recorder.publish()
            self._saved.save(self._step, self.state, self._meta())
        self._saved.wait()
        raise distributed.PreemptedError(
            f"stopped by {self._preemption.cause()} after step {self._step} of {self._parts.steps}, which is saved in "
            f"{self._workdir}; the same command continues"
        )

    def _meta(self) -> dict:
        """What a checkpoint holds beside the state."""
        return {
            "config": json.loads(self._parts.config.to_json()),
            "steps": self._parts.steps,
            "records": self._records,
            "scores": self._scores,
        }

    def _due(self, key: str) -> bool:
        """Whether the event of `config.train[key]` comes after this step; 0 means every epoch."""
        every = self._parts.config.train[key] or self._parts.steps_per_epoch
        return self._step % every == 0 or self._step == self._parts.steps

    def _after_step(self, batch: dict) -> None:
        evaluation = self._due("eval_every")
        save = evaluation or self._due("checkpoint_every")
        if self._step % self._parts.config.train.log_every == 0 or save or self._clock.steps == 1:
            self._log()
        if evaluation:
            self._evaluate(batch)
        if save:
            miou = scores.last_miou(self._scores) if evaluation else None
            self._recorder.publish()  # Before the checkpoint, after which a run that is killed goes on.
            self._saved.save(self._step, self.state, self._meta(), miou)
            self._clock.other_work_done()

    def _log(self) -> None:
        """Fetches the metrics of the steps since the last line, if any, checks and reports them."""
        if not self._pending:
            return
        fetched, self._pending = jax.device_get(self._pending), []
        for step, metrics in enumerate(fetched, self._step - len(fetched) + 1):
            if not np.isfinite(metrics["loss"]):
                raise DivergedError(
                    f"the loss is not finite at step {step} ({_terms(metrics)}); a lower config.optimizer.lr may help. "
                    f"Checkpoints of earlier steps are in {self._workdir}"
                )
        means = {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0]}
        means["lr"] = float(fetched[-1]["lr"])
        per_step, waiting, left = self._clock.read(self._parts.steps - self._step)
        rows = self._parts.config.data.labeled_batch
        rows += self._parts.config.data.unlabeled_batch if self._parts.method.uses_unlabeled else 0
        mious = [f"{name} {entry['miou']:.2f}" for name, entry in scores.last(self._scores).items()]
        logger.info(
            "step %d/%d epoch %.1f | %s | mIoU %s | %.1f images/s, waiting %.0f%% | %s left",
            self._step, self._parts.steps, self._step / self._parts.steps_per_epoch, _terms(means),
            " ".join(mious) or "-", rows / per_step, 100 * waiting, duration(left),
        )  # fmt: skip
        self._recorder.scalars(self._step, {**means, "images_per_second": rows / per_step, "waiting": waiting})

    def _evaluate(self, batch: dict) -> None:
        config, networks, started = self._parts.config, self.state.networks(), time.monotonic()
        val = self._parts.sources.val
        confusions = self._evaluator(networks, self._evaluator.groups(val), evaluate.log_progress(len(val)))
        found = {name: scores.of_confusion(counts, config.data.classes) for name, counts in confusions.items()}
        scores.update(self._scores, self._step, found)
        self._recorder.evaluation(self._step, found, confusions)
        if config.train.pictures:
            for name, picture in self._panels(self.state, batch, self._evaluator).items():
                self._recorder.picture(self._step, name, picture)
        logger.info(
            "step %d: mIoU %s on %d images in %s; best %.2f at step %d",
            self._step, ", ".join(f"{name} {entry['miou']:.2f}" for name, entry in found.items()), len(val),
            duration(time.monotonic() - started), self._scores["best_miou"], self._scores["best_step"],
        )  # fmt: skip

    def _summarize(self) -> dict:
        parts = self._parts
        summary = {"name": parts.config.name, "steps": self._step, "seconds": self._recorder.seconds, **self._scores}
        recorder.write_json(self._workdir / "summary.json", summary)
        last = scores.last(self._scores)
        if last:
            logger.info("IoU per class after step %d, per cent\n%s", self._step, recorder.class_table(last))
        logger.info("finished %d steps; %s", self._step, self._workdir / "summary.json")
        return summary

    def close(self) -> None:
        """Ends threads and workers."""
        self._preemption.close()
        self._feeder.close()
        self._iterator.close()
        self._recorder.close()
        self._saved.close()


def _check_continues(workdir: epath.Path, step: int, saved: dict, current: dict) -> None:
    """Raises ConfigError if a run that goes on from a checkpoint of `saved` meta would not go on as it would have."""
    before = json.loads(saved_run.complete(saved["config"]).to_json())
    changes = checks.inexact_changes(before, current["config"])
    if saved.get("steps", current["steps"]) != current["steps"]:
        changes.append(
            f"the run's length, which its learning rate follows: {saved['steps']} steps, now {current['steps']}"
        )
    for name, digest in current["records"].items():
        if saved.get("records", current["records"])[name] != digest:
            changes.append(f"the list of {name} images")
    if changes:
        raise checks.ConfigError(
            f"{workdir} cannot be continued exactly from step {step}: changed since are {'; '.join(changes)}. Undo "
            "that, take another --workdir, or go on all the same with --config.train.resume=changed"
        )


class Feeder:
    """Brings batches to the devices in the background: while a step computes on one, the next arrives."""

    def __init__(self, iterator, mesh: jax.sharding.Mesh):
        self._iterator, self._mesh = iterator, mesh
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feeder")
        self._next: Future | None = None

    def start(self) -> None:
        """Begins to fetch the next batch."""
        if self._next is None:
            self._next = self._thread.submit(lambda: sharding.put_batch(next(self._iterator), self._mesh))

    def take(self, running: list) -> tuple[dict[str, jax.Array], float]:
        """Returns the next batch, and for how many seconds the devices had nothing to do but to wait for it.

        `running` are results of the last two steps, at most. One step may still run when the next is enqueued, so that
        the devices go from one to the other at once; two may not, or the host would run away from them.
        """
        self.start()
        jax.block_until_ready(running[:-1])
        waited = 0.0
        if not self._next.done():
            jax.block_until_ready(running)
            idle = time.monotonic()
            self._next.result()
            waited = time.monotonic() - idle
        batch, self._next = self._next.result(), None
        return batch, waited

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class Clock:
    """Measures the steps: speed, share of it spent waiting for data, and the time left.

    The first step (which compiles), evaluations and checkpoints are no part of the speed; what evaluations and
    checkpoints took so far is part of the time left.
    """

    def __init__(self):
        self.steps = 0  # Taken by this process.
        self._mark = time.monotonic()
        self._waited, self._counted = 0.0, 0  # Since the last reading.
        self._busy_seconds, self._busy_steps = 0.0, 0  # At the last readings.
        self._other_seconds = 0.0

    def stepped(self, waited: float) -> None:
        """Counts a step for whose batch the devices waited so many seconds."""
        self.steps += 1
        self._counted += 1
        self._waited += waited

    def read(self, steps_left: int) -> tuple[float, float, float]:
        """Returns (seconds a step, share waiting, seconds left) of the steps since the last reading."""
        seconds, counted, waited = time.monotonic() - self._mark, self._counted, self._waited
        self._mark, self._counted, self._waited = time.monotonic(), 0, 0.0
        if self.steps > counted:  # Not the first step, which compiles.
            self._busy_seconds += seconds
            self._busy_steps += counted
        per_step = seconds / max(counted, 1)
        busy = self._busy_seconds / self._busy_steps if self._busy_steps else per_step
        return per_step, waited / max(seconds, 1e-9), steps_left * (busy + self._other_seconds / max(self.steps, 1))

    def other_work_done(self) -> None:
        """Tells that the time since the last reading went into something else than steps."""
        now = time.monotonic()
        self._other_seconds += now - self._mark
        self._mark = now


def _terms(metrics: dict[str, float]) -> str:
    """Writes "loss 1.234 loss_fp1 0.12 ..."; all of them, the total first."""
    names = sorted(metrics, key=lambda name: ([not name.startswith(start) for start in _LOGGED], name))
    return " ".join(f"{name} {float(metrics[name]):.4g}" for name in names)


def facts(parts: experiment.Experiment) -> dict:
    """What was built from the configuration, and where it runs: what `run.json` holds."""
    weights, sources = parts.abstract_state().params, parts.sources
    return {
        "name": parts.config.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights)),
        "images": {name: len(source) for name, source in sources._asdict().items()},
        "steps": parts.steps,
        "steps_per_epoch": parts.steps_per_epoch,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "devices_a_process": jax.local_device_count(),
        "jax": jax.__version__,
    }


def _description(config: dict, found: dict) -> str:
    """One line for the log, of a configuration as a dict and its `facts`."""
    data, method, images = config["data"], config["method"], found["images"]
    sizes, names = [data["labeled_batch"]], ["labeled"]
    if method["strong_views"] + method["feature_views"]:
        sizes, names = [*sizes, data["unlabeled_batch"]], [*names, "unlabeled"]
    batch = " + ".join(f"{size} {name}" for size, name in zip(sizes, names, strict=True))
    processes, devices, parts = found["processes"], found["devices_a_process"], config["train"]["accumulation"]
    each = " + ".join(str(size // (processes * devices * parts)) for size in sizes)
    batch += f" ({processes} processes x {devices} devices x {each} a device x {parts} accumulated)"
    return (
        f"{found['name'] or 'run'}: {config['model']['backbone']} with {found['parameters'] / 1e6:.1f} M parameters, "
        f"{len(data['classes'])} classes; {images['labeled']} labeled, {images['unlabeled']} unlabeled, "
        f"{images['val']} validation images; {found['steps']} steps of {batch} at crop {data['crop']} "
        f"({found['steps_per_epoch']} an epoch); {found['devices']}"
    )
