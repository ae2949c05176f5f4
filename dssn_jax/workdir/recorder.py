"""Records a run: numbers and pictures by step, in the work directory and TensorBoard."""

import functools
import json
import time

import numpy as np

from dssn_jax import distributed
from dssn_jax.workdir import files, records
from dssn_jax.workdir.board import Board
from input_pipeline.errors import printable


class Recorder:
    """Writes numbers by step to `metrics.jsonl` and TensorBoard, pictures to TensorBoard; the first process does."""

    def __init__(self, workdir: files.Folder, step: int):
        """Continues after `step`: what an interrupted run recorded later is dropped."""
        self._workdir, self._after = workdir, step
        self._path, self._confusion = workdir.append_dir / records.METRICS, workdir.path / records.CONFUSION
        kept = [line for line in records.read_metrics(workdir.path) if line["step"] <= step]
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
        records.write_json(
            self._confusion, {"step": step, **{name: counts.tolist() for name, counts in confusions.items()}}
        )

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
    def _board(self) -> Board:
        """The TensorBoard file, which begins with the first record."""
        return Board(self._workdir.append_dir / "tensorboard", self._after)

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
