"""Several processes of one run: how they join, which one writes, and how they stop together.

JAX's runtime does the work. Every host runs the same command in one process (SLURM and Open MPI jobs may have one
process per GPU); each reads its share of the records, and process 0 writes logs and summaries.
"""

import importlib.util
import math
import os
import signal
import threading
import time
from collections.abc import Mapping

import jax
from jax.experimental import multihost_utils

from configs.checks import ConfigError
from input_pipeline.errors import UserError


class PreemptedError(UserError):
    """The run was stopped by SIGTERM or a time limit after saving its state; the same command resumes it."""

    exit_code = 128 + signal.SIGTERM  # The shell's convention for a process that SIGTERM ended.


def detect_cluster(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the cluster type (SLURM, Open MPI, Cloud TPU) if this is a multi-process job, else None.

    A SLURM or Open MPI job of one task is not a multi-process job. A host with libtpu always counts as one: its runtime
    knows the number of hosts, and joining a single host is harmless.
    """
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    if "tpu" in platforms.split(",") and importlib.util.find_spec("libtpu") is not None:
        return "Cloud TPU"
    return None


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
    if process is not None and not 0 <= process < (processes or 0):
        raise ConfigError(f"--process is {process}; expected 0 to {(processes or 0) - 1}, one less than --processes")
    if coordinator is None and cluster is None:
        return
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes of this run could not connect ({coordinator or cluster}): {error}") from None


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once: logs, summaries, images."""
    return jax.process_index() == 0


class Preemption:
    """Listens for SIGTERM, which clusters send before they take a machine away, and watches a deadline.

    With several processes JAX's runtime listens, and all of them agree on the step to stop after; the deadline applies
    to runs of one process.
    """

    def __init__(self, deadline: float = math.inf):
        """Starts listening, until `deadline` (on the clock of `time.monotonic`).

        Outside the main thread, where Python allows no signal handlers, only the deadline counts.
        """
        self._received, self._deadline = False, deadline
        self._previous = None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_) -> None:
        self._received = True

    def reached(self, step: int) -> bool:
        """Whether the run must stop after `step`; every process must call this after every step."""
        if jax.process_count() == 1:
            return self._received or time.monotonic() >= self._deadline
        return multihost_utils.reached_preemption_sync_point(step)

    def cause(self) -> str:
        """Returns why `reached` was true: "SIGTERM" or "the time limit"."""
        return "SIGTERM" if self._received or jax.process_count() > 1 else "the time limit"

    def close(self) -> None:
        """Restores the previous SIGTERM handler."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
