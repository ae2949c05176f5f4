"""What a run tells of itself: log lines, TensorBoard, `metrics.jsonl` and `summary.json` in the work directory."""

import json
import logging
import os
import pathlib
import sys

import numpy as np
import tensorboardX

logger = logging.getLogger("dssn")


def log_to(workdir: pathlib.Path | None) -> None:
    """Sends the log lines to standard output and, if `workdir` is given, to `workdir/log.txt`."""
    handlers = [logging.StreamHandler(sys.stdout)]
    if workdir is not None:
        handlers.append(logging.FileHandler(workdir / "log.txt"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for old in logger.handlers:
        old.close()
    logger.handlers = handlers
    logger.propagate = False
    logger.setLevel(logging.INFO)


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes `content` whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


class Recorder:
    """Scalars by step in `metrics.jsonl` and TensorBoard, pictures in TensorBoard."""

    def __init__(self, workdir: pathlib.Path, step: int):
        """Continues after `step`: what an interrupted run recorded later is dropped."""
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in _lines(self._path) if json.loads(line)["step"] <= step]
        part = self._path.with_name(self._path.name + ".part")
        part.write_text("".join(line + "\n" for line in kept))
        os.replace(part, self._path)
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a uint8 [H, W, 3] picture."""
        self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


def _lines(path: pathlib.Path) -> list[str]:
    """The whole lines of a file that may be missing or cut in its last line."""
    if not path.exists():
        return []
    return [line[:-1] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def duration(seconds: float) -> str:
    """Writes seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def class_table(scores: dict[str, dict]) -> str:
    """Tables the IoU of each class and their mean, a column for each network; per cent."""
    names = list(scores)
    rows = [(label, [scores[name]["iou"][label] for name in names]) for label in scores[names[0]]["iou"]]
    rows.append(("mean", [scores[name]["miou"] for name in names]))
    width = max(len(label) for label, _ in rows)
    lines = [" ".join([" " * width, *(f"{name:>9s}" for name in names)])]
    lines += [" ".join([f"{label:{width}s}", *(f"{value:9.2f}" for value in values)]) for label, values in rows]
    return "\n".join(lines)
