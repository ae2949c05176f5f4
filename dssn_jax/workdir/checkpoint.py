"""Checkpoints of training: WORKDIR/checkpoints/STEP/{state,meta}, written in the background.

The latest and the best (by `eval.metric`, the larger of student and teacher) are kept. `meta` holds the configuration,
the length of the run, digests of the lists of images and the scores so far. The position in the data is the step:
batches are a pure function of it (`input_pipeline.pipeline`), so a run can continue on other hosts and with other
workers.
"""

import contextlib
import gc
import json
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dssn_jax.workdir import files
from input_pipeline.errors import UserError

FOLDER = "checkpoints"

# Keys that change the arrays of the state: the networks, which of them there are, and the optimizer's state.
_SHAPES_STATE = (
    "data.classes", "model.encoder", "model.decoder", "model.stem", "model.shortcut", "model.aspp_dilations",
    "model.decoder_channels", "model.param_dtype", "optimizer.name", "optimizer.freeze",
)  # fmt: skip


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model; the message names it and what is expected."""


class Checkpointer:
    """Saves and restores the training state in one work directory."""

    def __init__(self, workdir: epath.PathLike, metric: str = "miou", read_only: bool = False):
        """Opens (and unless `read_only`, creates) the checkpoints of `workdir`; `metric` names what ranks them."""
        self._folder, self._metric = files.absolute(workdir) / FOLDER, metric
        if read_only and not self._folder.is_dir():
            raise CheckpointError(f"{self._folder}: no such folder; expected the work directory of a training run")
        best = preservation_policy.BestN(
            # Checkpoints that were ranked by another metric come last.
            n=1, get_metric_fn=lambda scores: scores.get(metric, -1.0), keep_checkpoints_without_metrics=False
        )  # fmt: skip
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(1), best]),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
            enable_async_checkpointing=not read_only,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def latest_step(self) -> int | None:
        """Returns the step of the latest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state, meta: dict, score: float | None = None) -> None:
        """Starts writing the checkpoint of `step`; `score` (None: not evaluated) ranks it.

        Returns when the arrays may be overwritten, after waiting for an earlier save. Raises CheckpointError if that
        one failed or this one cannot be started.
        """
        items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
        scores = None if score is None else {self._metric: score}
        with self._name_last_good():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=scores, force=True)

    def wait(self) -> None:
        """Waits for the last save; raises CheckpointError if it failed."""
        with self._name_last_good():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _name_last_good(self) -> Iterator[None]:
        """Turns a failure to save (a full disk, a folder that became read-only) into a CheckpointError."""
        try:
            yield
        except Exception as error:  # Orbax raises nothing narrower; a background thread may have raised anything.
            steps = ocp.path.step.checkpoint_steps(self._folder)
            good = f"the last good checkpoint is that of step {max(steps)}" if steps else "there is no checkpoint yet"
            reason = str(error).strip() or type(error).__name__
            raise CheckpointError(f"{self._folder}: cannot save ({reason}); {good}") from None

    def meta(self, step: int) -> dict:
        """Returns the `meta` that `save` was given."""
        return self._restore(step, meta=ocp.args.JsonRestore()).meta

    def restore(self, step: int, like, config) -> tuple:
        """Returns (state, meta) of `step`; the state has the shapes, dtypes and shardings of `like`.

        Raises CheckpointError if the checkpoint is of another model than that of `config`, or cannot be read.
        """
        meta = self.meta(step)
        difference = _state_difference(meta["config"], json.loads(config.to_json()))
        if difference:
            raise CheckpointError(f"{self._folder / str(step)} is of another model: {difference}")
        return self._restore(step, state=ocp.args.StandardRestore(like)).state, meta

    def resolve(self, checkpoint: str | None) -> int:
        """Returns the step of a checkpoint: "latest", "best", a number, or None (best, or latest without a best)."""
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise CheckpointError(f"{self._folder}: no checkpoint in it")
        if checkpoint in ("best", None):
            best = self.meta(steps[-1])["scores"]["best_step"]
            if best in steps:
                return best
            if checkpoint is None:
                return steps[-1]
            raise CheckpointError(
                f"{self._folder}: there is no best checkpoint, as nothing was evaluated yet; use latest"
            )
        if checkpoint == "latest":
            return steps[-1]
        if checkpoint.isdigit() and int(checkpoint) in steps:
            return int(checkpoint)
        raise CheckpointError(
            f"{self._folder}: no checkpoint {checkpoint!r}; there are: latest, best, {', '.join(map(str, steps))}"
        )

    def close(self) -> None:
        """Ends the threads; call `wait` first to learn of a save that failed."""
        with contextlib.suppress(Exception):  # `wait` and `save` raise it.
            self._manager.close()

    def _restore(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises nothing narrower for damaged files.
            message = str(error)
        gc.collect()  # Orbax leaves unfinished coroutines behind, which otherwise warn when Python ends.
        raise CheckpointError(f"{self._folder / str(step)}: cannot be read: {message}")


def exists(workdir: epath.PathLike) -> bool:
    """Returns whether there is a checkpoint in `workdir`."""
    folder = files.absolute(workdir) / FOLDER
    return folder.is_dir() and bool(ocp.path.step.checkpoint_steps(folder))


def _state_difference(saved: dict, current: dict) -> str:
    """Names the keys in which two configurations (as dicts) have different training states; "" if none."""
    differences = []
    for key in _SHAPES_STATE:
        section, name = key.split(".")
        if saved[section].get(name) != current[section][name]:
            differences.append(f"{key} is {saved[section].get(name)!r} there, {current[section][name]!r} in the config")
    teachers = [config["method"]["teacher"] for config in (saved, current)]
    if (teachers[0] == "ema") != (teachers[1] == "ema"):  # Other sources of pseudo-labels are not in the state.
        differences.append(f"method.teacher is {teachers[0]!r} there, {teachers[1]!r} in the config")
    return "; ".join(differences)
