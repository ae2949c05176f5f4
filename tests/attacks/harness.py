"""Runs attacks in worker processes, which are ended when an attack hangs or takes too much memory."""

import collections
import contextlib
import json
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tests.attacks.programs import session_memory

ROOT = pathlib.Path(__file__).parent.parent.parent
TIME = 60.0  # Seconds in which an attack must be answered ...
SLOW_TIME = 400.0  # ... and those that start several programs.
STOP = 25.0  # Seconds after which training that was accepted is asked to stop, by SIGTERM.
MEMORY = 3 << 30  # Bytes that a worker and its processes may take.
_TIRED = 1400 << 20  # Bytes at which a worker is replaced between attacks: programs that it compiled add up.
_STARTING = 300.0
# Kinds that start programs of their own.
_PROGRAMS = ("signals", "processes", "disks")


class Row(NamedTuple):
    """An attack and what came of it."""

    index: int
    kind: str
    name: str
    mode: str
    good: bool
    text: str
    seconds: float


class Worker:
    """A worker process; see `tests.attacks.worker`."""

    def __init__(self, fixtures: pathlib.Path, *options: str):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  Closed with the worker.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.worker", str(fixtures), *options], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        self._answers: queue.Queue = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        if self._answers.get(timeout=_STARTING) is None:
            self._errors.seek(0)
            raise RuntimeError(f"a worker could not start: {self._errors.read().decode(errors='replace')[-3000:]}")

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def attack(self, index: int, line: str) -> Row:
        """Runs an attack; the worker must be replaced if `alive` is false afterwards."""
        started, what = time.monotonic(), {"kind": "?", "name": "?", "mode": "?"}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        asked = False
        while True:
            with contextlib.suppress(queue.Empty):
                answer = self._answers.get(timeout=0.25)
                if answer is not None and "kind" in answer:
                    what = answer
                    continue
                if answer is None:
                    return self._ended(index, what, started, f"crash: exit {self._process.wait()}")
                return Row(index, **what, **answer, seconds=time.monotonic() - started)
            seconds = time.monotonic() - started
            if not asked and seconds > STOP and what["kind"] not in _PROGRAMS:
                asked = True
                os.kill(self._process.pid, signal.SIGTERM)
            if seconds > (SLOW_TIME if what["kind"] in _PROGRAMS else TIME):
                return self._ended(index, what, started, f"hang: no answer in {seconds:.0f} s")
            if what["kind"] not in _PROGRAMS and session_memory(self._process.pid) > MEMORY:
                return self._ended(index, what, started, f"memory: more than {MEMORY >> 30} GiB")

    def _ended(self, index: int, what: dict, started: float, text: str) -> Row:
        self.close()
        return Row(index, **what, good=False, text=text, seconds=time.monotonic() - started)

    @property
    def tired(self) -> bool:
        """Whether it has ended, or takes much memory."""
        return self._process.poll() is not None or session_memory(self._process.pid) > _TIRED

    def close(self) -> None:
        """Ends the worker and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._errors.close()


def run(
    seed: int, indices: Iterable[int], kinds: Sequence[str], workers: int = 1, keep: pathlib.Path | None = None
) -> Iterator[Row]:
    """Yields what came of the attacks `indices` of a seed, as they end; folders of bad ones stay below `keep`."""
    with tempfile.TemporaryDirectory(prefix="attacks_") as temporary:
        folder = keep or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        fixtures = pathlib.Path(temporary) / "fixtures"
        fixtures.mkdir()
        first = Worker(fixtures, "--build")
        waiting, rows = collections.deque(indices), queue.Queue()

        def work(worker: Worker | None) -> None:
            try:
                while waiting:
                    index = waiting.popleft()
                    if worker is None or worker.tired:
                        if worker:
                            worker.close()
                        worker = Worker(fixtures)
                    scratch = folder / f"{seed}_{index}"
                    shutil.rmtree(scratch, ignore_errors=True)
                    row = worker.attack(index, f"{seed} {index} {','.join(kinds)} {scratch}")
                    if row.good or not keep:
                        shutil.rmtree(scratch, ignore_errors=True)
                    rows.put(row)
            except IndexError:  # The other thread took the last one.
                pass
            finally:
                if worker:
                    worker.close()
                rows.put(None)

        threads = [threading.Thread(target=work, args=(first if not n else None,), daemon=True) for n in range(workers)]
        for thread in threads:
            thread.start()
        ended = 0
        while ended < workers:
            row = rows.get()
            ended += row is None
            if row is not None:
                yield row
