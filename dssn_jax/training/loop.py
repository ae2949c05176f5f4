"""The training loop: steps, log lines, evaluations and checkpoints; `--mode=train`.

A run is initialized in this order, so that bad input is refused before anything is written:

1. Keys that the run in the work directory, if any, has chosen are inherited, and the configuration is validated.
2. The data are opened; keys that are still unset are chosen from the data and the devices (`plan`).
3. The learner (network, method, optimizer) and the evaluator are built.
4. For a new run, pretrained weights are read and fitted to the network, and every file of the labeled and validation
   images is decoded once.
5. The work directory is created; the log starts.
6. The latest checkpoint is restored, or refused if the run would not continue exactly. Without one, the state is
   initialized at random and given the pretrained weights.
7. config.json and run.json are written; threads and the signal handler start.
"""

import contextlib
import json
import math
import time

import jax
import numpy as np
from etils import epath

from configs import checks
from dssn_jax import distributed
from dssn_jax.evaluation import metrics
from dssn_jax.evaluation.evaluate import log_progress
from dssn_jax.training.class_shares import SHARES, ClassShares
from dssn_jax.training.image_summaries import ImageSummaries
from dssn_jax.training.prefetch import DevicePrefetcher
from dssn_jax.training.run import Run, batch_sizes, check_labels, describe, plan, run_info
from dssn_jax.training.timer import StepTimer
from dssn_jax.weights import pretrained
from dssn_jax.workdir import checkpoint, files, logs, recorder, records, restore
from dssn_jax.workdir.checkpoint import DivergedError
from dssn_jax.workdir.logs import duration, logger
from input_pipeline.batch import Batch
from input_pipeline.pipeline import train_dataset, train_iterator
from input_pipeline.sources.open import digest

# Prefixes of the names of metrics, in the order of the log line.
_LOG_ORDER = ("loss", "contrast", "mask_ratio", "lr", "grad_norm")

_RANDOM_WEIGHTS = (
    "random weights: published scores need weights pretrained on ImageNet; without them, and with few labels, expect "
    "far lower ones (config.model.pretrained; docs/weights.md)"
)


def train(config, workdir: epath.PathLike, deadline: float = math.inf) -> dict:
    """Trains `config` in `workdir`, continuing from its latest checkpoint if there is one.

    At `deadline` (of time.monotonic; only for runs of one process) it saves and stops as at SIGTERM and Ctrl-C:
    PreemptedError.

    Returns the summary, which is also written to `workdir/summary.json`. Raises ConfigError, DataError, CheckpointError
    and StateDictError before anything is written if the input is bad, and DivergedError if the loss is not finite.
    """
    workdir = epath.Path(workdir)
    run = plan(restore.inherit_choices(config, workdir))
    config, weights = run.learner.config, None
    if not checkpoint.exists(workdir):
        if config.model.pretrained:
            weights = pretrained.load(config, run.learner.abstract_state().student)
        run = run._replace(notes=[*run.notes, *check_labels(run.sources)])
    with contextlib.ExitStack() as stack:
        folder = files.Folder(workdir, continued=(logs.LOG, logs.DEBUG_LOG))
        stack.callback(folder.close)
        stack.callback(logs.log_to(folder.append_dir))
        stack.callback(logs.keep_library_warnings(folder.append_dir))
        trainer = Trainer(run, folder, stack, weights, deadline)
        del weights  # The state has its own copy; a second one would stay on the device for the whole run.
        return trainer.train()


class Trainer:
    """A run in progress; what it opens is closed by the stack that it is given."""

    def __init__(
        self,
        run: Run,
        workdir: files.Folder,
        stack: contextlib.ExitStack,
        weights: pretrained.LoadedWeights | None = None,
        deadline: float = math.inf,
    ):
        """Continues the run in `workdir`, or starts it from `weights` (None: random ones)."""
        self._run, self._learner, self._config = run, run.learner, run.learner.config
        self._workdir, mesh = workdir.path, run.learner.mesh
        self._evaluator = run.evaluator
        self._scores = checkpoint.new_scores(metrics.ranking(self._config))
        self._shares = ClassShares(self._config, run.learner.method, run.length.steps_per_epoch)
        self._records = {name: digest(getattr(run.sources, name)) for name in ("labeled", "unlabeled")}
        self._checkpointer = checkpoint.Checkpointer(workdir.path)
        stack.callback(self._checkpointer.close)
        self.state = self._start(weights)
        self._step = int(self.state.step)
        dataset = train_dataset(run.sources, self._config, jax.process_index(), jax.process_count())
        batches = train_iterator(dataset, self._config)
        stack.callback(batches.close)
        batches.set_state({"step": self._step})
        self._recorder = recorder.Recorder(workdir, self._step)
        stack.callback(self._recorder.close)
        self._prefetcher = DevicePrefetcher(batches, mesh)
        stack.callback(self._prefetcher.close)
        self._preemption = distributed.Preemption(deadline, logger.warning)
        stack.callback(self._preemption.close)
        self._take_step = self._learner.make_train_step()
        self._images = ImageSummaries(self._learner, self._config.train.pictures)
        self._pending: list[dict] = []  # Metrics of the steps since the last log line, on the device.
        self._timer = StepTimer()

    def _start(self, weights: pretrained.LoadedWeights | None):
        """Returns the state of the latest checkpoint, or a new one with `weights`."""
        learner, step = self._learner, self._checkpointer.latest_step()
        config, info = json.loads(self._config.to_json()), run_info(self._run)
        for note in self._run.notes:
            logger.info(note)
        logger.info(describe(config, info))
        if step is None:
            records.check_unfinished(self._workdir)
            state = learner.init_state(weights and weights.variables)
            logger.info("starting from %s", weights.report if weights else _RANDOM_WEIGHTS)
        else:
            state, meta = self._checkpointer.restore(step, learner.abstract_state(), self._config)
            if step and (self._is_finished(step) or self._config.train.resume == "exact"):
                _check_continues(self._workdir, step, meta, self._meta())
            self._scores = metrics.continue_scores(meta["scores"], self._scores["metric"])
            self._shares.restore(meta)
            logger.info("continuing from step %d of %s", step, self._workdir)
            for change in checks.differences(meta["config"], config):
                logger.info("changed since that checkpoint: %s", change)
        if step is None or not self._is_finished(step):
            records.write_json(self._workdir / records.CONFIG, config)
            records.write_json(self._workdir / records.RUN, info)
        return state

    def _is_finished(self, step: int) -> bool:
        """Returns whether the run ended at `step`, which is not that of weights to start from."""
        return step > 0 and step >= self._run.length.steps

    def train(self) -> dict:
        """Trains to the last step; returns the summary."""
        steps = self._run.length.steps
        if self._is_finished(self._step) and (summary := records.summary_of(self._workdir, self._step)):
            logger.info("finished before, after %d steps; nothing is changed in %s", self._step, self._workdir)
            return summary
        while self._step < steps:
            batch, waited = self._prefetcher.take(running=self._pending[-2:])
            self.state, step_metrics = self._take_step(self.state, batch)
            self._pending.append(step_metrics)
            self._step += 1
            if self._step < steps:
                self._prefetcher.start()
            self._timer.count_step(waited)
            self._after_step(batch)
            if self._preemption.reached(self._step) and self._step < steps:
                self._stop()
        self._checkpointer.wait()
        return self._summarize()

    def _stop(self) -> None:
        """Saves the state, unless it just was, and ends the run."""
        if self._checkpointer.latest_step() != self._step:
            self._log()
            self._save()
        self._checkpointer.wait()
        raise self._preemption.error(
            f"after step {self._step} of {self._run.length.steps}, which is saved in {self._workdir}; the same command "
            "continues"
        )

    def _save(self) -> None:
        self._recorder.sync()  # Before the checkpoint from which a killed run continues.
        try:
            self._checkpointer.save(self._step, self.state, self._meta())
        except DivergedError as error:
            raise DivergedError(f"{error}; {self._last_finite()}") from None

    def _last_finite(self) -> str:
        """Names the latest checkpoint; only states that are finite are saved."""
        self._checkpointer.wait()
        step = self._checkpointer.latest_step()
        if step is None:
            return "no checkpoint was saved"
        return f"the last checkpoint, which is finite, is that of step {step} in {self._workdir}"

    def _meta(self) -> dict:
        """Returns what a checkpoint holds beside the state."""
        return {
            "config": json.loads(self._config.to_json()),
            "steps": self._run.length.steps,
            "records": self._records,
            "scores": self._scores,
            **self._shares.meta(),
        }

    def _is_due(self, key: str) -> bool:
        """Returns whether the event with the period `config.train[key]` (0: an epoch) follows this step."""
        period = self._config.train[key] or self._run.length.steps_per_epoch
        return self._step % period == 0 or self._step == self._run.length.steps

    def _after_step(self, batch: Batch) -> None:
        evaluate = self._is_due("eval_every")
        save = evaluate or self._is_due("checkpoint_every")
        if self._step % self._config.train.log_every == 0 or save or self._timer.steps == 1:
            self._log()
        if evaluate:
            self._evaluate_or_save(batch)
        if save:
            self._save()
            self._timer.count_other_work()

    def _evaluate_or_save(self, batch: Batch) -> None:
        """Evaluates; if that fails, such as for a file that was removed, saves what was trained until now.

        A run that continues does not repeat an evaluation, so the last one must succeed before its step is saved.
        """
        try:
            self._evaluate(batch)
        except Exception:
            if self._step < self._run.length.steps and jax.process_count() == 1:  # Saving needs every process.
                self._save()
                self._checkpointer.wait()
            raise

    def _log(self) -> None:
        """Fetches, checks and logs the metrics of the steps since the last line, if any."""
        if not self._pending:
            return
        fetched, self._pending = jax.device_get(self._pending), []
        for step, values in enumerate(fetched, self._step - len(fetched) + 1):
            for key, name in (("loss", "the loss"), ("grad_norm", "the norm of the gradients")):
                if not np.isfinite(values[key]):
                    advice = f"A lower config.optimizer.lr may help; {self._last_finite()}"
                    raise DivergedError(f"{name} is not finite at step {step} ({_terms(values)}). {advice}")
        means = {name: np.mean([values[name] for values in fetched], 0).tolist() for name in fetched[0]}
        means["lr"] = float(fetched[-1]["lr"])
        timing = self._timer.read(self._run.length.steps - self._step)
        images_per_second = sum(batch_sizes(self._config).values()) / timing.seconds_per_step
        pace = f"first step, with its compilation: {duration(timing.seconds_per_step)}"
        if timing.seconds_left is not None:
            speed = f"{images_per_second:.1f} images/s, waiting {timing.waiting:.0%}"
            pace = f"{speed} | {duration(timing.seconds_left)} left"
        logger.info(
            "step %d/%d epoch %.1f | %s | %s | %s",
            self._step, self._run.length.steps, self._step / self._run.length.steps_per_epoch, _terms(means),
            self._score_text(metrics.last_scores(self._scores)), pace,
        )  # fmt: skip
        values = {**means, "images_per_second": images_per_second, "waiting": timing.waiting}
        if SHARES in means:
            values[SHARES] = self._shares.percent(means[SHARES])
            for step, each in enumerate(fetched, self._step - len(fetched) + 1):
                for line in self._shares.count(step, each[SHARES]):
                    logger.info(line)
        self._recorder.scalars(self._step, values)

    def _score_text(self, scores: dict[str, dict]) -> str:
        """Formats the ranking metric of each network: "Mean IoU student 41.20 teacher 43.05"."""
        name = self._scores["metric"]
        values = " ".join(f"{network} {values[name]:.2f}" for network, values in scores.items())
        return f"{metrics.METRICS[name].title} {values or '-'}"

    def _evaluate(self, batch: Batch) -> None:
        """Evaluates the networks and draws pictures."""
        networks, val, started = self.state.networks(), self._run.sources.val, time.monotonic()
        confusions = self._evaluator(networks, self._evaluator.batches(val), log_progress(len(val)))
        classes = self._config.data.classes
        scores = {name: metrics.scores_of(confusion, classes) for name, confusion in confusions.items()}
        metrics.update_scores(self._scores, self._step, scores)
        self._recorder.evaluation(self._step, scores, confusions)
        if self._config.train.pictures:
            pictures = self._images.panels(self.state, batch)
            pictures |= self._images.validation_panel(self.state, self._evaluator, val)
            for name, picture in pictures.items():
                self._recorder.picture(self._step, name, picture)
        logger.info(
            "step %d: %s on %d images in %s; best %.2f at step %d",
            self._step, self._score_text(scores), len(val), duration(time.monotonic() - started),
            self._scores["best_score"], self._scores["best_step"],
        )  # fmt: skip

    def _summarize(self) -> dict:
        seconds = self._recorder.seconds
        summary = {"name": self._config.name, "steps": self._step, "seconds": seconds, **self._scores}
        records.write_json(self._workdir / records.SUMMARY, summary)
        last = metrics.last_scores(self._scores)
        if last:
            logger.info("scores after step %d, in percent\n%s", self._step, metrics.class_table(last))
        logger.info("finished %d steps; %s", self._step, self._workdir / records.SUMMARY)
        return summary


def _check_continues(workdir: epath.Path, step: int, saved: dict, current: dict) -> None:
    """Raises ConfigError if a run would not continue exactly from the checkpoint with the meta data `saved`.

    A finished run must be the same in everything that its scores may depend on.
    """
    before = json.loads(records.with_defaults(saved["config"]).to_json())
    finished = step >= current["steps"]
    changes = (checks.score_changes if finished else checks.inexact_changes)(before, current["config"])
    if saved["steps"] != current["steps"]:
        lengths = f"{saved['steps']} steps, now {current['steps']}"
        changes.append(f"the length of the run, which sets its learning rates: {lengths}")
    for name, digests in current["records"].items():
        if saved["records"][name] != digests:
            changes.append(f"the list of {name} images")
    if changes and finished:
        raise checks.ConfigError(
            f"{workdir} holds another run, finished at step {step}, which would be replaced: {'; '.join(changes)}. Use "
            "another --workdir"
        )
    if changes:
        raise checks.ConfigError(
            f"{workdir} cannot be continued exactly from step {step}; changed since then: {'; '.join(changes)}. Undo "
            "the changes, use another --workdir, or continue with them by --config.train.resume=changed"
        )


def _terms(values: dict[str, float]) -> str:
    """Formats the scalar metrics of a step, the total loss first: "loss 1.234 loss_fp1 0.12 ..."."""
    scalars = [name for name, value in values.items() if not np.ndim(value)]
    names = sorted(scalars, key=lambda name: ([not name.startswith(prefix) for prefix in _LOG_ORDER], name))
    return " ".join(f"{name} {float(values[name]):.4g}" for name in names)
