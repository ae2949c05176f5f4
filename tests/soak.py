"""Measures whether a run grows: `python -m tests.soak --steps 1000`.

A small run on generated images evaluates, draws pictures and saves again and again while its memory, file descriptors,
threads and child processes are counted from outside. Exits with 1 if one of them grows by more than its bound per 1000
steps, or if anything is left after the end.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
EVERY = 10  # Steps from one evaluation to the next.
WARM_UP = 0.3  # Share of the steps left out: programs are compiled and memory pools fill.


class Usage(NamedTuple):
    """Memory, descriptors, threads, processes and shared memory that a run uses at one time."""

    memory: float  # MB that the run and its child processes share with no other process.
    descriptors: int
    threads: int
    processes: int  # Child processes.
    segments: int  # Shared memory that it has mapped.


# Least slope per 1000 steps that counts as growth.
BOUNDS = Usage(memory=40.0, descriptors=3, threads=3, processes=1, segments=10)


def children(process: int) -> list[int]:
    """Returns the child processes of a process."""
    found = []
    for task in pathlib.Path(f"/proc/{process}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return sorted(found)


def is_running(process: int) -> bool:
    """Returns whether a process exists and is no zombie, which some containers never collect."""
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def shared_memory() -> set[str]:
    """Returns the names of the segments of shared memory that Python's `multiprocessing` made on this machine."""
    return {path.name for path in pathlib.Path("/dev/shm").glob("psm_*")}


def mapped_segments(process: int) -> list[str]:
    """Returns the names of segments of shared memory that a process has mapped."""
    return re.findall("/dev/shm/(psm_[0-9a-f]+)", pathlib.Path(f"/proc/{process}/maps").read_text())


def segments_left(before: set[str], seconds: float = 30.0) -> set[str]:
    """Returns the segments that are there now, were not `before`, and stay; other runs free theirs within `seconds`."""
    left, end = shared_memory() - before, time.monotonic() + seconds
    while left and time.monotonic() < end:
        time.sleep(0.1)
        left &= shared_memory()
    return left


def usage(process: int) -> Usage:
    """Counts what a process and its children hold; raises OSError once it ends."""
    started = children(process)
    status = (pathlib.Path(f"/proc/{process}/status")).read_text()
    threads = int(status.split("Threads:")[1].split()[0])
    descriptors = len(os.listdir(f"/proc/{process}/fd"))
    memory = sum(private_memory(each) for each in (process, *started))
    segments = {name for each in (process, *started) for name in mapped_segments(each)}
    return Usage(memory, descriptors, threads, len(started), len(segments))


def private_memory(process: int) -> float:
    """Returns the MB of memory that a process shares with no other."""
    lines = pathlib.Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def command(workdir: pathlib.Path, steps: int, workers: int) -> list[str]:
    """Returns the command line of a run that evaluates, draws and saves every ten steps."""
    return [
        sys.executable, "main.py", f"--config=configs/shapes.py:encoder=resnet10w16,crop=33,steps={steps}",
        f"--workdir={workdir}", "--config.model.decoder_channels=16", "--config.model.aspp_dilations=(2,)",
        "--config.data.labeled_batch=4", "--config.data.unlabeled_batch=4", "--config.data.shapes.size=48",
        "--config.data.shapes.unlabeled=32", "--config.data.shapes.val=6", f"--config.data.workers={workers}",
        "--config.train.log_every=1", f"--config.train.eval_every={EVERY}", "--config.train.checkpoint_every=5",
        "--config.train.pictures=2",
    ]  # fmt: skip


def last_step(workdir: pathlib.Path) -> int:
    """Returns the last step that a run has recorded, or 0."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def watch(workdir: pathlib.Path, steps: int, workers: int) -> tuple[list[tuple[int, Usage]], list[int]]:
    """Runs to the end; returns the usage by step, after the warm-up, and the child processes that are left."""
    # With a heap per thread, glibc's default, fragmentation moves the memory by 100 MB up and down and hides a leak.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    process = subprocess.Popen(command(workdir, steps, workers), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    measured, started, step = [], set(), 0
    while process.poll() is None:
        time.sleep(0.1)
        if (new := last_step(workdir)) == step:
            continue
        step = new
        try:
            started |= {*children(process.pid)}
            if step >= WARM_UP * steps:
                measured.append((step, usage(process.pid)))
        except OSError:  # A process ended.
            continue
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}")
    end = time.monotonic() + 30
    while (left := [child for child in started if is_running(child)]) and time.monotonic() < end:
        time.sleep(0.1)
    return measured, left


def slopes(measured: list[tuple[int, Usage]]) -> Usage:
    """Returns the growth of each number per 1000 steps: least squares over its least values between two evaluations.

    Saving and evaluating take threads and memory for a moment; what is never given back raises the least values too.
    """
    least = {}
    for step, values in measured:
        interval = (step - 1) // EVERY
        least[interval] = Usage(*map(min, values, least.get(interval, values)))
    columns = zip(*least.values(), strict=True)
    return Usage(*(1000 / EVERY * statistics.linear_regression([*least], column).slope for column in columns))


def soak(steps: int, workers: int = 2) -> bool:
    """Returns whether a run of `steps` stays within the bounds and leaves nothing; prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        before = shared_memory()
        measured, left = watch(pathlib.Path(folder), steps, workers)
        segments = segments_left(before)
    growth, flat = slopes(measured), True
    print(f"{'':12s} {'first':>9s} {'last':>9s} {'per 1000 steps':>15s} {'bound':>9s}")
    for name, slope, bound in zip(Usage._fields, growth, BOUNDS, strict=True):
        first, last = (getattr(values, name) for _, values in (measured[0], measured[-1]))
        # A short run has too few steps to extrapolate from: growth within them counts.
        within = slope * (steps / 1000 if steps < 1000 else 1) <= bound
        flat &= within
        print(f"{name:12s} {first:9.1f} {last:9.1f} {slope:15.2f} {bound:9.1f}{'' if within else '  GROWS'}")
    print(f"left after the end: {len(left)} processes, {len(segments)} segments of shared memory")
    return flat and not left and not segments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    return 0 if soak(arguments.steps, arguments.workers) else 1


if __name__ == "__main__":
    sys.exit(main())
