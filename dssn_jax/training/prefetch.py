"""Moves batches to the devices in the background."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from dssn_jax import sharding
from input_pipeline.batch import Batch


class DevicePrefetcher:
    """Brings the next batch to the devices in a thread, while a step computes on the current one."""

    def __init__(self, batches: Iterator[Batch], mesh: jax.sharding.Mesh):
        """Takes batches with this process's rows; nothing is read before `start` or `take`."""
        self._batches, self._mesh = batches, mesh
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=_block_signals)
        self._next: Future | None = None

    def start(self) -> None:
        """Starts to fetch the next batch, unless that was started already."""
        if self._next is None:
            self._next = self._thread.submit(lambda: sharding.put_batch(next(self._batches), self._mesh))

    def take(self, running: list) -> tuple[Batch, float]:
        """Returns the next batch and the seconds for which the devices were idle because it was not there yet.

        `running` has the results of the last two steps, at most. One step may still run when the next is enqueued, so
        that the devices have no gap between them; the host waits for the one before, so that it does not run ahead.

        Raises what reading the batch raised, such as DataError.
        """
        self.start()
        jax.block_until_ready(running[:-1])
        idle = 0.0
        if not self._next.done():
            jax.block_until_ready(running)
            start = time.monotonic()
            self._next.exception()  # Waits.
            idle = time.monotonic() - start
        fetched, self._next = self._next, None
        return fetched.result(), idle

    def close(self) -> None:
        """Waits for the batch that is being fetched and ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _block_signals() -> None:
    """Leaves the signals that stop a run to the main thread.

    Worker processes that this thread starts inherit the mask: Ctrl-C reaches every process of a terminal, SIGTERM of a
    cluster every process of a job, and workers must live until the run has saved its state.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
