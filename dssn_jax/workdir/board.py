"""The TensorBoard file of a run. Import this module before threads start: it hides other packages while it imports."""

import pathlib
import sys
import time
import uuid

import numpy as np

from dssn_jax.workdir import files

# tensorboardX imports these packages where they are installed, for graphs and for storage that is not written to here:
# PyTorch alone takes longer than the rest of the start.
_NOT_NEEDED = [name for name in ("torch", "boto3", "google.cloud.storage") if name not in sys.modules]
# An import of what is None raises an ImportError, which tensorboardX expects.
sys.modules.update(dict.fromkeys(_NOT_NEEDED))
try:
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog
finally:
    for _name in _NOT_NEEDED:
        del sys.modules[_name]


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
