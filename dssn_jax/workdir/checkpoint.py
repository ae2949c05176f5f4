"""Checkpoints of training: WORKDIR/checkpoints/STEP/{state,meta}, written in the background.

The latest and the best (by the larger mean IoU of student and teacher) are kept. `meta` is the configuration, digests
of the lists of images and the scores so far. The position in the data is the number of steps: batches are a pure
function of it (`input_pipeline.pipeline`), so that a run may continue on other hosts and with other workers.
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
# Keys of config.model that older checkpoints do not name, and what they hold.
_OLDER_MODEL = {"stem": "deep", "shortcut": "strided", "pretrained": ""}


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model: the message names it and what is expected."""


class Checkpointer:
    """Saves and restores the training of one work directory."""

    def __init__(self, workdir: epath.PathLike, read_only: bool = False):
        """Opens (and unless `read_only`, creates) the checkpoints of `workdir`."""
        self._folder = files.absolute(workdir) / FOLDER
        if read_only and not self._folder.is_dir():
            raise CheckpointError(f"{self._folder}: no such folder; expected the work directory of a training run")
        policies = [
            preservation_policy.LatestN(1),
            preservation_policy.BestN(
                n=1, get_metric_fn=lambda metrics: metrics["miou"], keep_checkpoints_without_metrics=False
            ),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
            enable_async_checkpointing=not read_only,
        )
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state, meta: dict, miou: float | None = None) -> None:
        """Starts writing the checkpoint of `step`; `miou` (per cent, None where not evaluated) ranks it.

        Returns when the arrays may be overwritten. Waits for an earlier save. Raises CheckpointError if that failed, or
        this one cannot be begun.
        """
        items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
        metrics = None if miou is None else {"miou": miou}
        with self._naming_the_last_good():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def wait(self) -> None:
        """Waits for the last save; raises CheckpointError if it failed."""
        with self._naming_the_last_good():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _naming_the_last_good(self) -> Iterator[None]:
        """Turns what goes wrong in saving (a full disk, a folder that became read-only) into a CheckpointError."""
        try:
            yield
        except Exception as error:  # Orbax raises no narrower one; what a background thread raised may be anything.
            steps = ocp.path.step.checkpoint_steps(self._folder)
            good = f"the last good checkpoint is that of step {max(steps)}" if steps else "there is no checkpoint yet"
            reason = str(error).strip() or type(error).__name__
            raise CheckpointError(f"{self._folder}: cannot save ({reason}); {good}") from None

    def meta(self, step: int) -> dict:
        """Returns what `save` was given as `meta`."""
        meta = self._restore(step, meta=ocp.args.JsonRestore()).meta
        meta["config"]["model"] = {**_OLDER_MODEL, **meta["config"]["model"]}
        return meta

    def restore(self, step: int, like, config) -> tuple:
        """Returns (state, meta) of `step`; the state has the shapes, dtypes and shardings of `like`.

        Raises CheckpointError when the checkpoint is of another model than that of `config`, or cannot be read.
        """
        meta = self.meta(step)
        difference = _model_difference(meta["config"], json.loads(config.to_json()))
        if difference:
            raise CheckpointError(f"{self._folder / str(step)} is of another model: {difference}")
        return self._restore(step, state=ocp.args.StandardRestore(like)).state, meta

    def resolve(self, which: str) -> int:
        """Turns "latest", "best" or a number into the step of an existing checkpoint."""
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise CheckpointError(f"{self._folder}: no checkpoint in it")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self.meta(steps[-1])["scores"].get("best_step")
            if best in steps:
                return best
            raise CheckpointError(
                f"{self._folder}: nothing was evaluated yet, so there is no best checkpoint; take latest"
            )
        if which.isdigit() and int(which) in steps:
            return int(which)
        raise CheckpointError(
            f"{self._folder}: no checkpoint {which!r}; there are: latest, best, {', '.join(map(str, steps))}"
        )

    def close(self) -> None:
        """Ends the threads; `wait` first to be told of a save that failed."""
        with contextlib.suppress(Exception):  # `wait` and `save` tell it.
            self._manager.close()

    def _restore(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises no narrower one for damaged files.
            message = str(error)
        gc.collect()  # Orbax leaves unfinished coroutines behind, which otherwise complain when Python ends.
        raise CheckpointError(f"{self._folder / str(step)}: cannot be read: {message}")


def exists(workdir: epath.PathLike) -> bool:
    """Whether there is a checkpoint in `workdir`."""
    folder = files.absolute(workdir) / FOLDER
    return folder.is_dir() and bool(ocp.path.step.checkpoint_steps(folder))


def _model_difference(saved: dict, current: dict) -> str:
    """Names the keys in which two configurations build different networks, or returns ""."""
    saved = {**saved["model"], "classes": saved["data"]["classes"], "labeler": saved["method"]["labeler"]}
    current = {**current["model"], "classes": current["data"]["classes"], "labeler": current["method"]["labeler"]}
    free = {"dtype", "remat", "feature_dropout", "output_stride", "pretrained"}  # These change no array of the state.
    for part in (saved, current):  # Only whether there is a teacher matters.
        part["teacher"] = part.pop("labeler") == "teacher"
    return "; ".join(
        f"{key} is {saved.get(key)!r} there, {current[key]!r} in the config"
        for key in current
        if key not in free and saved.get(key) != current[key]
    )
