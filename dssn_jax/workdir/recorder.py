"""Records of a run: log lines, TensorBoard, and JSON files in the work directory.

`metrics.jsonl` has one line per log line and per evaluation: {"step", "seconds" (of training so far), ...}; those of
evaluations hold, per network, each metric of the evaluation ("miou_student", ...) and the IoU of each class
("iou_student", a list in the order of the classes), in percent. `confusion.json` has the confusion matrices of the last
evaluation, rows true classes: {"step", NETWORK: [K][K]}.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import tensorboardX
from etils import epath

from dssn_jax import distributed
from dssn_jax.workdir import files

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
    "jax": logging.ERROR,
    "gcsfs": logging.ERROR,
    "py.warnings": logging.CRITICAL,
}


def quiet_libraries() -> None:
    """Keeps warnings of libraries, and Python's own, off the screen; see `keep_library_warnings`."""
    logging.captureWarnings(True)
    for name, level in _LIBRARIES.items():
        screen = logging.StreamHandler()
        screen.setLevel(level)
        library = logging.getLogger(name)
        library.handlers, library.propagate = [screen], False


def keep_library_warnings(folder: os.PathLike) -> Callable[[], None]:
    """Appends warnings of libraries to `folder/debug.txt`, in the first process; returns a function that stops it."""
    if not distributed.is_first():
        return lambda: None
    handler = logging.FileHandler(os.path.join(folder, DEBUG_LOG), delay=True)  # No warnings, no file.
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
    handlers = [logging.StreamHandler(sys.stdout)]
    if not distributed.is_first():
        handlers[0].setLevel(logging.WARNING)
    elif folder is not None:
        handlers.append(logging.FileHandler(os.path.join(folder, LOG)))
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
        self._workdir, self._path, self._confusion = workdir, workdir.append_dir / METRICS, workdir.path / CONFUSION
        kept = [line for line in read_metrics(workdir.path) if line["step"] <= step]
        self._board = None
        if distributed.is_first():
            with files.atomic_write(self._path) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self._board = tensorboardX.SummaryWriter(str(workdir.append_dir / "tensorboard"), purge_step=step + 1)
        self._started = time.monotonic() - (kept[-1].get("seconds", 0.0) if kept else 0.0)

    @property
    def seconds(self) -> float:
        """Training time so far, including the time before the run was continued but not that of lost steps."""
        return time.monotonic() - self._started

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records numbers by name."""
        self._write(step, values)
        self._show(step, values)

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
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")

    def sync(self) -> None:
        """Copies everything recorded so far to the work directory, if that is in an object store."""
        if self._board is not None:
            self._workdir.sync()

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if self._board is not None:
            self._board.close()

    def _write(self, step: int, values: dict) -> None:
        if self._board is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "seconds": round(self.seconds, 1), **values}) + "\n")

    def _show(self, step: int, values: dict[str, float]) -> None:
        if self._board is None:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()


def read_metrics(workdir: epath.PathLike) -> list[dict]:
    """Returns the complete lines of `metrics.jsonl`; the file may be missing, or its last line cut short."""
    path = epath.Path(workdir) / METRICS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def duration(seconds: float) -> str:
    """Formats seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
