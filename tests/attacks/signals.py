"""Signals at random moments of a run, which is then continued: it must end as one that was left alone."""

import os
import random
import signal
import time

from tests.attacks import programs
from tests.attacks.attack import Attack, Outcome, judge_error
from tests.attacks.fixtures import Place

_STARTING = 8.0  # Seconds in which most of a run starts, compiles, trains and saves.


def generate(place: Place, rng: random.Random) -> Attack:
    """Sends a signal to a run after a random time, or in a random step, and continues the run."""
    number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGINT])
    step, seconds = rng.randrange(programs.STEPS), rng.uniform(0, 1)
    early = rng.random() < 0.3
    workers = rng.choice([0, 0, 2])
    argv = [*place.config(data__workers=workers), f"--workdir={place.out / 'run'}"]
    moment = f"{seconds * _STARTING:.1f} s after its start" if early else f"{seconds * 0.5:.2f} s after step {step}"

    def execute() -> Outcome:
        process = programs.start(place, argv)
        if early:
            time.sleep(seconds * _STARTING)
        else:
            programs.wait_for_step(place.out / "run", process, step) if step else time.sleep(_STARTING / 2)
            time.sleep(seconds * 0.5)
        if process.poll() is None:
            os.kill(process.pid, number)
        return _judge(place, argv, process, number)

    name = f"{number.name} {moment}{', 2 workers' if workers else ''}"
    return Attack(name, "train", argv, (), execute=execute)


def _judge(place: Place, argv: list[str], process, number: signal.Signals) -> Outcome:
    code, stdout, stderr = programs.finish(process)
    ended_by_signal = code == -number and not stderr.strip()  # Before the program listens, a signal ends it, silently.
    if code and not ended_by_signal:
        outcome = judge_error(code, stderr, (number.name, str(place.out / "run"), "interrupted"))
        if not outcome.good:
            return outcome
    left = programs.left_over(process.pid)
    if left:
        os.killpg(process.pid, 9)
        return Outcome(False, f"{len(left)} processes outlive the run")
    again, stdout, stderr = programs.finish(programs.start(place, argv))
    if again:
        return Outcome(False, f"does not continue: {stderr.strip()[-300:]}")
    wrong = place.check_run(place.out / "run")
    return Outcome(not wrong, f"exit {code}, continued: {wrong or 'equal bit for bit'}")
