"""Log lines: on the screen, in `log.txt` and, those of libraries, in `debug.txt` of a work directory."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable

from dssn_jax import distributed
from dssn_jax.workdir import files

LOG = "log.txt"
DEBUG_LOG = "debug.txt"  # Warnings of libraries.

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


def duration(seconds: float) -> str:
    """Formats seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
