"""Disks without room, and disks that cannot be written."""

import os
import pathlib
import random
import resource
import subprocess

from tests.attacks import programs
from tests.attacks.attack import Attack, Outcome, judge_error
from tests.attacks.fixtures import Place
from tests.attacks.modes import command


def generate(place: Place, rng: random.Random) -> Attack:
    """Runs a command whose output is on a disk of too few bytes, or a read-only one."""
    mode = rng.choice(["train", "eval", "predict", "export", "report", "convert"])
    if mode == "train" and rng.random() < 0.5 and _can_mount(place):
        return _full_disk(place, rng)
    if rng.random() < 0.4 and _can_mount(place):
        return _read_only(place, mode)
    return _limited(place, rng, mode)


def _can_mount(place: Place) -> bool:
    """Returns whether this process may mount file systems."""
    folder = place.scratch / "probe"
    folder.mkdir(exist_ok=True)
    done = not subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode
    if done:
        subprocess.run(["umount", folder], check=True)
    folder.rmdir()
    return done


def _limited(place: Place, rng: random.Random, mode: str) -> Attack:
    """No file may be longer than a limit, as if the disk were full there."""
    workdir = place.copy("part" if mode == "train" else "run")
    normal, size = command(place, mode, workdir), rng.choice([1, 10, 100, 1000, 10_000, 100_000])
    culprits = tuple(str(path) for path in normal.outputs) + (str(workdir), str(place.out))

    def limits():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)

    attack = Attack(f"files of at most {size} bytes", mode, normal.argv, culprits, normal.outputs, normal.verify)
    attack.execute = lambda: _alone(place, attack, limits)
    return attack


def _alone(place: Place, attack: Attack, limits) -> Outcome:
    """Runs a command in a process of its own, whose limits do not reach the worker's files."""
    process = programs.start(place, attack.argv, preexec_fn=limits)
    code, stdout, stderr = programs.finish(process)
    if code:
        return judge_error(code, stderr, attack.culprits)
    verdict = attack.verify(stdout)
    return Outcome(not verdict, f"exit 0: {verdict or 'the result as without a limit'}")


def _read_only(place: Place, mode: str) -> Attack:
    """Everything that the command reads and writes is on a disk that cannot be written."""
    workdir = place.copy("part" if mode == "train" else "run")
    normal = command(place, mode, workdir)

    def execute() -> Outcome:
        for folder in (workdir, place.out):
            subprocess.run(["mount", "--bind", folder, folder], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        try:
            code, _, stderr = programs.finish(programs.start(place, normal.argv))
        finally:
            for folder in (workdir, place.out):
                subprocess.run(["umount", folder], check=True)
        if not code:
            return Outcome(False, "exit 0, though nothing can be written")
        return judge_error(code, stderr, (str(workdir), str(place.out)))

    return Attack("a read-only disk", mode, normal.argv, (), execute=execute)


def _full_disk(place: Place, rng: random.Random) -> Attack:
    """The disk of a run is full at a random moment; with room again, the run continues."""
    size = rng.choice([64, 500, 1500, 3000, 4500, 6000])  # Kilobytes.
    disk = place.out / "disk"
    argv = [*place.config(), f"--workdir={disk / 'run'}"]

    def execute() -> Outcome:
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
        try:
            return _fill_and_continue(place, argv, disk)
        finally:
            subprocess.run(["umount", disk], check=True)

    return Attack(f"a disk of {size} kB", "train", argv, (), execute=execute)


def _fill_and_continue(place: Place, argv: list[str], disk: pathlib.Path) -> Outcome:
    code, _, stderr = programs.finish(programs.start(place, argv))
    outcome = judge_error(code, stderr, (os.fspath(disk),)) if code else Outcome(True, "")
    if not outcome.good:
        return outcome
    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
    again, _, stderr = programs.finish(programs.start(place, argv))
    if again:
        return Outcome(False, f"does not continue with room: {stderr.strip()[-300:]}")
    wrong = place.check_run(disk / "run")
    return Outcome(not wrong, f"exit {code}, continued with room: {wrong or 'equal bit for bit'}")
