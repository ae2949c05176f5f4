"""Several processes of one run: how they join, which one writes, and how they stop together.

JAX's runtime does the work. Every host runs the same command in one process (SLURM and Open MPI jobs may have one
process per GPU); each reads its share of the records, and process 0 writes logs and summaries.
"""

import importlib.util
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping

import jax
from jax.experimental import multihost_utils

from configs.checks import ConfigError, shorten
from input_pipeline.errors import UserError


class PreemptedError(UserError):
    """The run was stopped by a signal or a time limit after saving its state; the same command resumes it."""

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.exit_code = 128 + number  # The shell's convention for a process that a signal ended.


def detect_cluster(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the cluster type (SLURM, Open MPI, Cloud TPU) if this is a multi-process job, else None.

    A SLURM or Open MPI job of one task is not a multi-process job. A host with libtpu always counts as one: its runtime
    knows the number of hosts, and joining a single host is harmless. Raises ConfigError for a variable that is no
    number.
    """
    if "SLURM_PROCID" in environment and _count(environment, "SLURM_NTASKS") > 1:
        return "SLURM"
    if _count(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    if "tpu" in platforms.split(",") and importlib.util.find_spec("libtpu") is not None:
        return "Cloud TPU"
    return None


def _count(environment: Mapping[str, str], name: str) -> int:
    """Returns the number in an environment variable; 1 if it is not set or empty."""
    text = environment.get(name, "").strip() or "1"
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(f"the environment variable {name} is {text!r}; expected the number of processes")
    return int(text)


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes of the run; call it before JAX initializes its devices.

    Args:
      coordinator: HOST:PORT of process 0; None: from the cluster's environment, if there is one.
      processes: number of processes; None: from the cluster's environment.
      process: index of this process, from 0; None: from the cluster's environment.

    Raises:
      ConfigError: arguments are missing or out of range, or the processes could not connect.
    """
    cluster = detect_cluster()
    if coordinator is None and (processes is not None or process is not None):
        raise ConfigError("--processes and --process need --coordinator=HOST:PORT, the address of process 0")
    if coordinator is not None and cluster is None and (processes is None or process is None):
        raise ConfigError("--coordinator needs --processes and --process, which no cluster provides here")
    if coordinator is not None and not re.fullmatch(r"(\[[^\s\]]+\]|[^\s:]+):[0-9]{1,5}", coordinator):
        raise ConfigError(f"--coordinator={coordinator}: expected HOST:PORT, the address of process 0")
    if process is not None and not 0 <= process < (processes or 0):
        raise ConfigError(f"--process is {process}; expected 0 to {(processes or 0) - 1}, one less than --processes")
    if coordinator is None and cluster is None:
        return
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except Exception as error:  # JAX raises what it meets in the variables of a cluster, such as a KeyError.
        reason = shorten(f"{type(error).__name__}: {error}")
        raise ConfigError(f"the processes of this run could not connect ({coordinator or cluster}): {reason}") from None


def start_devices() -> None:
    """Initializes the devices of this process; call it after `initialize`.

    Raises ConfigError if JAX cannot: no such platform, a TPU that another process holds, a driver that does not fit.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # The latter, without a message, for a platform without its plugin.
        reason = shorten(error) or "no plugin of this platform is installed"
        wanted = os.environ.get("JAX_PLATFORMS")
        setting = f" (JAX_PLATFORMS={wanted})" if wanted else ""
        raise ConfigError(f"JAX found no devices{setting}: {reason}") from None


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once: logs, summaries, images."""
    return jax.process_index() == 0


class Preemption:
    """Listens for SIGTERM, which clusters send before they take a machine away, and Ctrl-C, and watches a deadline.

    With several processes JAX's runtime listens for SIGTERM, and all of them agree on the step to stop after; Ctrl-C in
    one of them counts as SIGTERM. The deadline applies to runs of one process.
    """

    def __init__(self, deadline: float = math.inf, notify: Callable[[str], None] = lambda text: None):
        """Starts listening, until `deadline` (on the clock of `time.monotonic`).

        The first Ctrl-C calls `notify` in a thread; a second one ends the process at once, even while the main thread
        compiles or waits for the devices. Signals that are ignored stay ignored, as in a background job. Outside the
        main thread, where Python allows no signal handlers, only the deadline counts.
        """
        self._received, self._deadline, self._notify = [], deadline, notify
        self._previous = {}
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = [signal.SIGINT, signal.SIGTERM] if jax.process_count() == 1 else [signal.SIGINT]
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, lambda number, frame: self._received.append(number))
        # Python calls handlers between two instructions of the main thread; this descriptor is written to at once.
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True)
        self._thread.start()

    def _watch(self, reader: socket.socket) -> None:
        """Answers Ctrl-C as it arrives, until `close`."""
        interrupts = 0
        with reader:
            while number := reader.recv(1):
                interrupts += number[0] == signal.SIGINT
                if number[0] == signal.SIGINT and interrupts == 1:
                    self._notify("Ctrl-C: the run saves and stops after this step; Ctrl-C again stops it at once")
                    if jax.process_count() > 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                elif number[0] == signal.SIGINT:
                    os.write(2, b"error: stopped at once by Ctrl-C; the same command continues from the last save\n")
                    os._exit(128 + signal.SIGINT)

    def reached(self, step: int) -> bool:
        """Whether the run must stop after `step`; every process must call this after every step."""
        if jax.process_count() == 1:
            return bool(self._received) or time.monotonic() >= self._deadline
        return multihost_utils.reached_preemption_sync_point(step)

    def cause(self) -> str:
        """Returns why `reached` was true: "Ctrl-C", "SIGTERM" or "the time limit"."""
        if self._received:
            return "Ctrl-C" if self._received[0] == signal.SIGINT else "SIGTERM"
        return "SIGTERM" if jax.process_count() > 1 else "the time limit"

    def error(self, text: str) -> PreemptedError:
        """Returns the error "stopped by CAUSE" and `text`, with the exit code of the cause."""
        return PreemptedError(f"stopped by {self.cause()} {text}", *self._received[:1])

    def close(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(self._previous_descriptor)
            self._writer.close()  # Ends the thread.
            self._thread.join()
        self._previous = {}
