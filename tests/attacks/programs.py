"""Programs of their own: training as the user starts it, for attacks by signals, other processes and full disks."""

import os
import pathlib
import subprocess
import sys
import time

from tests.attacks.fixtures import ROOT, Place

STEPS = 4  # Steps of the runs in the fixtures; results are compared with theirs.
_CODE = "from dssn_jax.commands import cli; cli()"
PATIENCE = 120  # Seconds that a program may take on a busy machine.


def start(place: Place, argv: list[str], **options) -> subprocess.Popen:
    """Starts a command in a session of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(place.scratch / "home")}
    return subprocess.Popen(
        [sys.executable, "-c", _CODE, *argv], cwd=place.scratch / "cwd", env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True, **options,
    )  # fmt: skip


def finish(process: subprocess.Popen, seconds: float = PATIENCE) -> tuple[int, str, str]:
    """Returns exit code, standard output and error; kills what takes longer and raises TimeoutExpired."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        raise
    return process.returncode, stdout, stderr


def left_over(session: int, seconds: float = 10) -> list[str]:
    """Returns the processes of a session that are still there after some seconds."""
    until = time.monotonic() + seconds
    while (found := _members(session)) and time.monotonic() < until:
        time.sleep(0.2)
    return found


def _members(session: int) -> list[str]:
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(folder.name)
        except (OSError, IndexError):
            continue
    return found


def wait_for_step(workdir: pathlib.Path, process: subprocess.Popen, step: int, seconds: float = PATIENCE) -> None:
    """Waits until a run has logged a step, or ended."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        path = workdir / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.02)


def session_memory(session: int) -> int:
    """Returns the resident bytes of the processes of a session."""
    total = 0
    for pid in _members(session):
        try:
            total += int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            continue
    return total
