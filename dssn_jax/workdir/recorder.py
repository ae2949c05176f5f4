"""Records of a run: log lines, TensorBoard, and JSON files in the work directory.

`metrics.jsonl` has one line per log line and per evaluation: {"step", "seconds" (of training so far), ...}; those of
evaluations hold, per network, each metric of the evaluation ("miou_student", ...) and the IoU of each class
("iou_student", a list in the order of the classes), in percent. Log lines hold the share of pixels that are
pseudo-labeled as each class ("pseudo_labels"), likewise. `confusion.json` has the confusion matrices of the last
evaluation, rows true classes: {"step", NETWORK: [K][K]}.
"""

import contextlib
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable

import numpy as np
from etils import epath

from dssn_jax import distributed
from dssn_jax.workdir import files
from input_pipeline.errors import printable

LOG = "log.txt"
DEBUG_LOG = "debug.txt"  # Warnings of libraries.
METRICS = "metrics.jsonl"
CONFUSION = "confusion.json"
RUN = "run.json"  # `dssn_jax.training.run.run_info`.

logger = logging.getLogger("dssn")
# Logger -> least level that is shown on the screen. Orbax and grain log to absl's logger and raise what matters; the
# last logger is that of the module `warnings`.
_LIBRARIES = {
    "absl": logging.CRITICAL,
    "asyncio": logging.CRITICAL,
    "jax": logging.ERROR,
    "gcsfs": logging.ERROR,
    "py.warnings": logging.CRITICAL,
}


class _Screen(logging.StreamHandler):
    """Shows lines; a screen that is gone (a closed pipe) ends no run."""

    def handleError(self, record) -> None:  # noqa: N802
        pass


class _DebugFile(logging.FileHandler):
    """Writes lines of libraries from any thread; where that fails, the run goes on."""

    def handleError(self, record) -> None:  # noqa: N802
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):  # Closing writes buffered lines, and fails again on a full disk.
            super().close()


class _LogFile(_DebugFile):
    """Writes the lines of the run; raises an OSError with the path where that fails."""

    def handleError(self, record) -> None:  # noqa: N802
        with files.name_in_errors(self.baseFilename):
            raise


def quiet_libraries() -> None:
    """Keeps warnings of libraries, and Python's own, off the screen; see `keep_library_warnings`."""
    logging.captureWarnings(True)
    if sys.unraisablehook is sys.__unraisablehook__:  # A test's own stays.
        sys.unraisablehook = _log_unraisable
    for name, level in _LIBRARIES.items():
        screen = _Screen()
        screen.setLevel(level)
        library = logging.getLogger(name)
        library.handlers, library.propagate = [screen], False


def _log_unraisable(event) -> None:
    """Logs an exception in a destructor, such as those of coroutines that orbax abandons, as a warning."""
    logging.getLogger("py.warnings").warning("%r was ignored in %r", event.exc_value, event.object)


def keep_library_warnings(folder: os.PathLike) -> Callable[[], None]:
    """Appends warnings of libraries to `folder/debug.txt`, in the first process; returns a function that stops it."""
    if not distributed.is_first():
        return lambda: None
    handler = _DebugFile(os.path.join(folder, DEBUG_LOG), delay=True)  # No warnings, no file.
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in _LIBRARIES:
        logging.getLogger(name).addHandler(handler)

    def stop() -> None:
        for name in _LIBRARIES:
            logging.getLogger(name).removeHandler(handler)
        handler.close()

    return stop


def log_to(folder: os.PathLike | None = None) -> Callable[[], None]:
    """Sends log lines to standard output and, if given, to `folder/log.txt`; returns a function that undoes it.

    Only the first process logs; the others print warnings and errors.
    """
    handlers = [_Screen(sys.stdout)]
    if not distributed.is_first():
        handlers[0].setLevel(logging.WARNING)
    elif folder is not None:
        handlers.append(_LogFile(os.path.join(folder, LOG)))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = handlers, False
    logger.setLevel(logging.INFO)

    def undo() -> None:
        for handler in handlers:
            handler.close()
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])

    return undo


def write_json(path: epath.Path, content: dict) -> None:
    """Writes `content` atomically; the first process does."""
    if not distributed.is_first():
        return
    with files.atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


class Recorder:
    """Writes numbers by step to `metrics.jsonl` and TensorBoard, pictures to TensorBoard; the first process does."""

    def __init__(self, workdir: files.Folder, step: int):
        """Continues after `step`: what an interrupted run recorded later is dropped."""
        from dssn_jax.workdir.board import Board  # Imports tensorboardX, which only runs need.

        self._open_board = lambda: Board(workdir.append_dir / "tensorboard", step)
        self._workdir, self._path, self._confusion = workdir, workdir.append_dir / METRICS, workdir.path / CONFUSION
        kept = [line for line in read_metrics(workdir.path) if line["step"] <= step]
        if distributed.is_first():
            with files.atomic_write(self._path) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)

    @property
    def seconds(self) -> float:
        """Training time so far, including the time before the run was continued but not that of lost steps."""
        return time.monotonic() - self._started

    def scalars(self, step: int, values: dict[str, float | dict[str, float]]) -> None:
        """Records numbers by name, and lists of numbers by class: {CLASS: number}, "NAME/CLASS" in TensorBoard."""
        lists = {name: each for name, each in values.items() if isinstance(each, dict)}
        numbers = {name: each for name, each in values.items() if name not in lists}
        self._write(step, numbers | {name: list(each.values()) for name, each in lists.items()})
        by_class = {f"{name}/{printable(key)}": n for name, each in lists.items() for key, n in each.items()}
        self._show(step, numbers | by_class)

    def evaluation(self, step: int, scores: dict[str, dict], confusions: dict[str, np.ndarray]) -> None:
        """Records the scores (`metrics.scores_of`) and the confusion matrix of each network, by its name."""
        numbers, lists = {}, {}
        for network, values in scores.items():
            for name, value in values.items():
                if isinstance(value, dict):
                    lists[f"{name}_{network}"] = list(value.values())
                else:
                    numbers[f"{name}_{network}"] = value
        self._write(step, numbers | lists)
        self._show(step, numbers)
        write_json(self._confusion, {"step": step, **{name: counts.tolist() for name, counts in confusions.items()}})

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a uint8 [H, W, 3] picture."""
        if distributed.is_first():
            self._board.picture(step, name, image)

    def sync(self) -> None:
        """Copies everything recorded so far to the work directory, if that is in an object store."""
        if distributed.is_first():
            self._workdir.sync()

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if "_board" in vars(self):
            self._board.close()

    @functools.cached_property
    def _board(self):
        """The TensorBoard file (a `Board`), which begins with the first record."""
        return self._open_board()

    def _write(self, step: int, values: dict) -> None:
        if distributed.is_first():
            line = json.dumps({"step": step, "seconds": round(self.seconds, 1), **values})
            with files.name_in_errors(self._path), self._path.open("a") as file:
                file.write(line + "\n")

    def _show(self, step: int, values: dict[str, float]) -> None:
        if distributed.is_first():
            for name, value in values.items():
                self._board.scalar(step, name, value)
            self._board.flush()


def read_metrics(workdir: epath.PathLike) -> list[dict]:
    """Returns the lines of `metrics.jsonl`, which may be missing, or its last line cut short by a kill.

    Other lines that are damaged are left out; a warning counts them.
    """
    path = epath.Path(workdir) / METRICS
    if not path.exists():
        return []
    *lines, last = files.read_bytes(path).split(b"\n")
    if not b"{".startswith(last[:1]):  # Not the beginning of a line.
        lines.append(last)
    parsed = [values for line in lines if (values := _parse(line)) is not None]
    if len(parsed) < len(lines):
        logger.warning("left out: %s: %d damaged of %d lines", path, len(lines) - len(parsed), len(lines))
    return parsed


def _parse(line: bytes) -> dict | None:
    """Returns a line of `metrics.jsonl`, or None if it is none that `Recorder` writes."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):  # Not UTF-8, not JSON.
        return None
    is_record = isinstance(values, dict) and type(values.get("step")) is int and _is_number(values.get("seconds"))
    return values if is_record and all(map(_is_record_value, values.values())) else None


def _is_record_value(value) -> bool:
    return _is_number(value) or (isinstance(value, list) and all(map(_is_number, value)))


def _is_number(value) -> bool:
    return type(value) in (int, float)


def duration(seconds: float) -> str:
    """Formats seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
