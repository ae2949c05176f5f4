"""Processes of one run: how they find each other, and how they agree to stop.

JAX's own runtime does the work. A process a host (a SLURM or Open MPI job may have one a GPU) runs the same command;
each reads its share of the records, and the first writes logs and summaries.
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
    """The run was told to end (SIGTERM, a time limit) and saved its state: the same command continues it."""

    exit_code = 128 + signal.SIGTERM  # As a shell has it of a process that SIGTERM ended.


def found_cluster(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns what kind of job with several processes `environment` is of, or None.

    A SLURM or Open MPI job of one task is none. A Cloud TPU host is told by its runtime library, libtpu; there is no
    harm in asking for the other hosts of a single one.
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
    """Joins the other processes of the run; must come before anything asks JAX for its devices.

    Args:
      coordinator: HOST:PORT of process 0; None: found from the environment, if that is of a cluster.
      processes: how many there are; None: found from the environment, as JAX does.
      process: the number of this one, from 0; None: likewise.

    Raises:
      ConfigError: some are given that need others, or the processes did not find each other.
    """
    if coordinator is None and (processes is not None or process is not None):
        raise ConfigError("--processes and --process need --coordinator=HOST:PORT, the address of process 0")
    if coordinator is not None and found_cluster() is None and (processes is None or process is None):
        raise ConfigError("--coordinator needs --processes and --process: the environment does not tell them")
    if process is not None and not 0 <= process < (processes or 0):
        raise ConfigError(f"--process is {process}; expected 0 to {(processes or 0) - 1}, one less than --processes")
    if coordinator is None and found_cluster() is None:
        return
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        where = coordinator or found_cluster()
        raise ConfigError(f"the processes of this run did not find each other ({where}): {error}") from None


def is_first() -> bool:
    """Whether this process writes what is written once: logs, summaries, pictures."""
    return jax.process_index() == 0


class Preemption:
    """Notices SIGTERM, the notice that clusters give before they take a machine away.

    With several processes JAX's runtime listens, and all agree on the step after which they stop; alone, this does.
    A deadline is such a notice too, where there is one process.
    """

    def __init__(self, deadline: float = math.inf):
        """Begins to listen, until `deadline` (of time.monotonic).

        Python runs handlers of signals in the main thread alone; elsewhere none is set.
        """
        self._noticed, self._deadline = False, deadline
        self._previous = None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, *_) -> None:
        self._noticed = True

    def reached(self, step: int) -> bool:
        """Whether the run is to stop after `step`, which every process must ask after each step."""
        if jax.process_count() == 1:
            return self._noticed or time.monotonic() >= self._deadline
        return multihost_utils.reached_preemption_sync_point(step)

    def cause(self) -> str:
        """Why the run is to stop, once `reached` told so."""
        return "SIGTERM" if self._noticed or jax.process_count() > 1 else "the time limit"

    def close(self) -> None:
        """Gives the signal back to who had it."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
