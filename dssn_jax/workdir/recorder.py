"""What a run records while it goes: log lines, TensorBoard, and JSON files in the work directory.

`metrics.jsonl` has a line for each log line and each evaluation: {"step", "seconds" (of training so far), ...}; those
of evaluations hold "miou_NETWORK" and "iou_NETWORK" (a list in the order of the classes), per cent. `confusion.json`
has the confusion matrices of the last evaluation, rows true classes: {"step", NETWORK: [K][K]}.
"""

import json
import logging
import os
import sys
import time

import absl.logging
import numpy as np
import tensorboardX
from etils import epath

from dssn_jax import distributed
from dssn_jax.workdir import files

LOG = "log.txt"
METRICS = "metrics.jsonl"
CONFUSION = "confusion.json"
RUN = "run.json"  # What was built from the configuration, and where it runs; see `train.facts`.

logger = logging.getLogger("dssn")


def quiet_libraries() -> None:
    """Leaves out what libraries log and users cannot use."""
    absl.logging.set_verbosity(absl.logging.FATAL)  # What is worth telling, they raise too.
    for name in ("jax", "gcsfs"):
        logging.getLogger(name).setLevel(logging.ERROR)


def log_to(folder: os.PathLike | None) -> None:
    """Sends the log lines to standard output and, if `folder` is given, to `folder/log.txt`.

    Of several processes the first does; the others tell what goes wrong.
    """
    handlers = [logging.StreamHandler(sys.stdout)]
    if not distributed.is_first():
        handlers[0].setLevel(logging.WARNING)
    elif folder is not None:
        handlers.append(logging.FileHandler(os.path.join(folder, LOG)))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for old in logger.handlers:
        old.close()
    logger.handlers = handlers
    logger.propagate = False
    logger.setLevel(logging.INFO)


def write_json(path: epath.Path, content: dict) -> None:
    """Writes `content` whole or not at all; the first process does."""
    if not distributed.is_first():
        return
    with files.whole(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


class Recorder:
    """Numbers by step in `metrics.jsonl` and TensorBoard, pictures in TensorBoard; the first process writes them."""

    def __init__(self, workdir: files.Folder, step: int):
        """Continues after `step`: what an interrupted run recorded later is dropped."""
        self._workdir, self._path, self._confusion = workdir, workdir.growing / METRICS, workdir.path / CONFUSION
        kept = [line for line in read_metrics(workdir.path) if line["step"] <= step]
        self._board = None
        if distributed.is_first():
            with files.whole(self._path) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            self._board = tensorboardX.SummaryWriter(str(workdir.growing / "tensorboard"), purge_step=step + 1)
        self._started = time.monotonic() - (kept[-1].get("seconds", 0.0) if kept else 0.0)

    @property
    def seconds(self) -> float:
        """How long the run trained until now, with the time before it was continued but without lost steps."""
        return time.monotonic() - self._started

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._write(step, values)
        self._show(step, values)

    def evaluation(self, step: int, scores: dict[str, dict], confusions: dict[str, np.ndarray]) -> None:
        """Records of each network (by name) its scores, as `scores.of_confusion` gives them, and confusion matrix."""
        numbers, lists = {}, {}
        for name, found in scores.items():
            numbers |= {f"{key}_{name}": value for key, value in found.items() if not isinstance(value, dict)}
            lists |= {f"{key}_{name}": list(value.values()) for key, value in found.items() if isinstance(value, dict)}
        self._write(step, numbers | lists)
        self._show(step, numbers)
        write_json(self._confusion, {"step": step, **{name: found.tolist() for name, found in confusions.items()}})

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a uint8 [H, W, 3] picture."""
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")

    def publish(self) -> None:
        """Brings everything recorded until now to the work directory, where that is on a bucket."""
        if self._board is not None:
            self._workdir.publish()

    def close(self) -> None:
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
    """The whole lines of `metrics.jsonl`, which may be missing or cut in its last line."""
    path = epath.Path(workdir) / METRICS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def duration(seconds: float) -> str:
    """Writes seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def class_table(scores: dict[str, dict]) -> str:
    """Tables the IoU of each class, their means and the pixel accuracy, a column for each network; per cent."""
    names = list(scores)
    rows = [(label, [scores[name]["iou"][label] for name in names]) for label in scores[names[0]]["iou"]]
    for label, key in (("mean", "miou"), ("weighted mean", "frequency_weighted_iou"), ("pixels", "pixel_accuracy")):
        if all(key in scores[name] for name in names):  # Runs of older versions have the mean alone.
            rows.append((label, [scores[name][key] for name in names]))
    width = max(len(label) for label, _ in rows)
    lines = [" ".join([" " * width, *(f"{name:>9s}" for name in names)])]
    lines += [" ".join([f"{label:{width}s}", *(f"{value:9.2f}" for value in values)]) for label, values in rows]
    return "\n".join(lines)
