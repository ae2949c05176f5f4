"""Checkpoints of training: WORKDIR/checkpoints/STEP/{state,meta}, written in the background.

The latest and the best (by `eval.metric`, the larger of student and teacher) are kept. `meta` holds the configuration,
the length of the run, digests of the lists of images, the scores so far and sums of `training.class_shares`, and for
verification the step, a checksum of every array of the state and one of itself. The position in the data is the step:
batches are a pure function of it (`input_pipeline.pipeline`), so a run can continue on other hosts and with other
workers.
"""

import contextlib
import gc
import json
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from dssn_jax import sharding
from dssn_jax.methods import pseudo_labels
from dssn_jax.workdir import checksums, files
from input_pipeline.errors import UserError, first_names, printable
from input_pipeline.files import special_file

FOLDER = "checkpoints"
_RECORD = "_CHECKPOINT_METADATA"  # Orbax's own record of each checkpoint, all of which are read at once.
_LEAST_PART = 2**20  # Bytes of an array that are worth a device of their own while they are written.

# Keys that change the arrays of the state: the networks, which of them there are, and the optimizer's state.
_SHAPES_STATE = (
    "data.classes", "model.encoder", "model.decoder", "model.stem", "model.shortcut", "model.aspp_dilations",
    "model.decoder_channels", "model.param_dtype", "optimizer.name", "optimizer.freeze",
)  # fmt: skip


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model; the message names it and what is expected."""


class DamagedError(CheckpointError):
    """A checkpoint that is not, bit for bit, what was saved."""


class DivergedError(UserError):
    """A loss or weights that are not finite, or larger than `checksums.LARGEST`."""


class Checkpointer:
    """Saves and restores the training state in one work directory."""

    def __init__(self, workdir: epath.PathLike, read_only: bool = False):
        """Opens (and unless `read_only`, creates) the checkpoints of `workdir`; raises CheckpointError."""
        self._folder, self._kept = files.absolute(workdir) / FOLDER, _Kept()
        if read_only and not self._folder.is_dir():
            raise CheckpointError(f"{self._folder}: no such folder; expected the work directory of a training run")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
            enable_async_checkpointing=not read_only,
        )
        handlers = {"state": _state_handler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager, reason = _attempt(ocp.CheckpointManager, self._folder, options=options, item_handlers=handlers)
        if reason:
            records = sorted(path.relative_to(self._folder) for path in self._folder.glob(f"*/{_RECORD}"))
            damaged = f"; {_RECORD} may be damaged: {', '.join(map(os.fspath, records))}" if records else ""
            raise CheckpointError(f"{self._folder}: cannot be opened: {reason}{damaged}")

    def latest_step(self) -> int | None:
        """Returns the step of the latest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state, meta: dict) -> None:
        """Starts writing the checkpoint of `step`; `meta["scores"]["best_step"]` is kept beside it.

        Returns when the arrays may be overwritten, after waiting for an earlier save. Raises DivergedError for values
        that are not finite, and CheckpointError if the earlier save failed or this one cannot be started.
        """
        summaries = checksums.summarize(state)
        _check_finite(step, summaries)
        sums = {name: summary.checksum for name, summary in summaries.items()}
        meta = _sealed({**meta, "step": step, "checksums": sums})
        items = {"state": ocp.args.PyTreeSave(state), "meta": ocp.args.JsonSave(meta)}
        self._kept.best_step = meta["scores"]["best_step"]
        self._check_saved(*_attempt(self._manager.save, step, args=ocp.args.Composite(**items), force=True))

    def wait(self) -> None:
        """Waits for the last save; raises CheckpointError if it failed."""
        self._check_saved(*_attempt(self._manager.wait_until_finished))

    def _check_saved(self, _, reason: str) -> None:
        """Raises CheckpointError if there is a reason why a save failed: a full disk, a read-only folder."""
        if reason:
            steps = ocp.path.step.checkpoint_steps(self._folder) if self._folder.is_dir() else []
            good = f"the last good checkpoint is that of step {max(steps)}" if steps else "there is no checkpoint yet"
            raise CheckpointError(f"{self._folder}: cannot save ({reason}); {good}")

    def meta(self, step: int) -> dict:
        """Returns the `meta` that `save` was given, with "step" and "checksums"; raises CheckpointError."""
        with self._name_whole(step):
            return self._read_meta(step)

    def restore(self, step: int, like, config) -> tuple:
        """Returns (state, meta) of `step`; the state has the shapes, dtypes and shardings of `like`.

        Raises CheckpointError if the checkpoint is of another model than that of `config`, or not what was saved.
        """
        meta = self.meta(step)
        difference = _state_difference(meta["config"], json.loads(config.to_json()))
        if difference:
            raise CheckpointError(f"{self._folder / str(step)} is of another model: {difference}")
        with self._name_whole(step):
            return self._read_state(step, like, meta), meta

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
        if checkpoint in map(str, steps):
            return int(checkpoint)
        raise CheckpointError(
            f"{self._folder}: no checkpoint {checkpoint!r}; there are: latest, best, {', '.join(map(str, steps))}"
        )

    def close(self) -> None:
        """Ends the threads; call `wait` first to learn of a save that failed."""
        _attempt(self._manager.close)  # `wait` and `save` raise the error.

    def _read_meta(self, step: int) -> dict:
        folder, meta = self._folder / str(step), self._restore(step, meta=ocp.args.JsonRestore()).meta
        if not isinstance(meta, dict) or meta.get("checksum") != _sealed(meta)["checksum"]:
            raise DamagedError(f"{folder}: damaged: its meta does not have the checksum with which it was saved")
        if meta["step"] != step:
            raise DamagedError(f"{folder}: holds the checkpoint of step {meta['step']}; rename it to {meta['step']}")
        return meta

    def _read_state(self, step: int, like, meta: dict):
        arguments = ocp.checkpoint_utils.construct_restore_args(like)
        state = self._restore(step, state=ocp.args.PyTreeRestore(like, restore_args=arguments)).state
        sums = {name: summary.checksum for name, summary in checksums.summarize(state).items()}
        changed = sorted(name for name in sums | meta["checksums"] if sums.get(name) != meta["checksums"].get(name))
        if changed:
            raise DamagedError(
                f"{self._folder / str(step)}: damaged: arrays without the checksum with which they were saved: "
                f"{first_names(changed)}"
            )
        return state

    def _restore(self, step: int, **items):
        special = "" if files.is_remote(self._folder) else special_file(os.fspath(self._folder / str(step)))
        if special:
            raise DamagedError(f"{special}; expected a file")  # Orbax would wait for what is written to a pipe.
        restored, reason = _attempt(self._manager.restore, step, args=ocp.args.Composite(**items))
        if reason:
            raise DamagedError(f"{self._folder / str(step)}: cannot be read: {reason}")
        return restored

    @contextlib.contextmanager
    def _name_whole(self, step: int) -> Iterator[None]:
        """Adds to the message of DamagedError which other checkpoint is whole and how to take it."""
        try:
            yield
        except DamagedError as error:
            message = str(error)
        else:
            return
        others = sorted(set(self._manager.all_steps()) - {step}, reverse=True)
        whole = next((other for other in others if self._is_whole(other)), None)
        if whole is None:
            raise DamagedError(f"{message}; no other checkpoint is whole")
        advice = f"--checkpoint={whole} reads that of step {whole}, which is whole"
        if whole < step:
            advice += f"; to continue training from it, remove {self._folder / str(step)}"
        raise DamagedError(f"{message}; {advice}")

    def _is_whole(self, step: int) -> bool:
        """Returns whether a checkpoint, of whichever model, is what was saved."""
        try:
            meta, everywhere = self._read_meta(step), sharding.replicated(sharding.make_mesh())
            like = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
                dict(self._manager.item_metadata(step).state),
            )
            self._read_state(step, like, meta)
        except Exception:  # Orbax raises nothing narrower for damaged files.
            return False
        return True


class _Kept:
    """The checkpoints that are not deleted: the latest and that of `best_step` (a preservation policy of orbax)."""

    best_step: int | None = None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        return [each.step in (checkpoints[-1].step, self.best_step) for each in checkpoints]


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns orbax's handler of arrays, but that a small array is written by one of the devices that hold it.

    Orbax lets each device write a part of every array. The parts are cut by a program per shape, and training waits for
    them: a state has hundreds of arrays, most of them of a few kilobytes. Nor is the placement of each array written,
    which is that of the run that restores it.
    """
    arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=_LEAST_PART, enable_write_sharding_file=False
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def new_scores(metric: str = "miou") -> dict:
    """Returns the scores of a run that was not evaluated yet; they are part of checkpoints and of the summary.

    `evaluation.metrics.update_scores` adds, per network, {"best": scores, "last": scores}, each with its "step".
    """
    return {"metric": metric, "best_step": None, "best_score": None}


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
    methods, classes = [config["method"] for config in (saved, current)], len(saved["data"]["classes"])
    if _selection_state(methods[0], classes) != _selection_state(methods[1], classes):
        names = [method["selection"] for method in methods]
        differences.append(f"method.selection is {names[0]!r} there, {names[1]!r} in the config")
    teachers = [method["teacher"] for method in methods]
    if (teachers[0] == "ema") != (teachers[1] == "ema"):  # Other sources of pseudo-labels are not in the state.
        differences.append(f"method.teacher is {teachers[0]!r} there, {teachers[1]!r} in the config")
    return "; ".join(differences)


def _selection_state(method: dict, classes: int):
    """Returns the shapes and dtypes of the state of the selection (most have none), or its name if it is unknown."""
    name = method["selection"]
    if name not in pseudo_labels.SELECTIONS:
        return name
    selection = pseudo_labels.SELECTIONS[name](ConfigDict(method))
    return jax.eval_shape(lambda: selection.init(classes))


def _sealed(meta: dict) -> dict:
    """Returns `meta` with a checksum of everything else in it."""
    content = {key: value for key, value in meta.items() if key != "checksum"}
    return content | {"checksum": f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"}


def _check_finite(step: int, summaries: dict[str, checksums.Summary]) -> None:
    """Raises DivergedError, with the first array and its value, for values that are not within `checksums.LARGEST`."""
    for name, summary in summaries.items():
        if summary.bad is not None:
            raise DivergedError(
                f"the state after step {step} is not saved: {name} holds {summary.bad:g}; expected magnitudes up to "
                f"{checksums.LARGEST:g}. A lower config.optimizer.lr may help"
            )


def _attempt(function: Callable, *arguments, **options) -> tuple[Any, str]:
    """Calls a function of orbax; returns its result and "", or None and why it failed, in one line.

    Orbax raises nothing narrower than Exception, and leaves unfinished coroutines behind, which are deleted here so
    that Python prints nothing about them later.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        try:
            return function(*arguments, **options), ""
        except Exception as error:
            reason = _reason(error)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
        return None, reason
    finally:
        sys.unraisablehook = hook


def _reason(error: BaseException) -> str:
    """Returns the message of the innermost exception that has one, in one line."""
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    texts = [" ".join(str(each).split()) or type(each).__name__ for each in reversed(chain)]
    return printable(texts[0].partition(" [tensorstore_spec")[0], 600)
