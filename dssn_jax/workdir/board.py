"""The TensorBoard file of a run. Import this module before threads start: it hides PyTorch while it imports."""

import pathlib
import sys
import time
import uuid

import numpy as np

from dssn_jax.workdir import files

# tensorboardX imports PyTorch where it is installed, for its graphs, which takes longer than the rest of the start.
_WITHOUT_TORCH = "torch" not in sys.modules
if _WITHOUT_TORCH:
    sys.modules["torch"] = None  # An import raises ModuleNotFoundError, which tensorboardX expects.
try:
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog
finally:
    if _WITHOUT_TORCH:
        del sys.modules["torch"]


class Board:
    """A file of TensorBoard, written by the calling thread: tensorboardX's own waits forever when a disk is full."""

    def __init__(self, folder: pathlib.Path, after: int):
        """Opens a file whose records replace those of earlier files after the step `after`."""
        self._folder = folder
        with files.name_in_errors(folder):
            folder.mkdir(exist_ok=True)
            self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".{uuid.uuid4().hex}")
        self._write(Event(step=after + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, step: int, name: str, value: float) -> None:
        self._write(Event(step=step, summary=summary.scalar(name, value)))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a uint8 [H, W, 3] picture."""
        self._write(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))

    def flush(self) -> None:
        with files.name_in_errors(self._folder):
            self._writer.flush()

    def close(self) -> None:
        with files.name_in_errors(self._folder):
            self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with files.name_in_errors(self._folder):
            self._writer.write_event(event)
