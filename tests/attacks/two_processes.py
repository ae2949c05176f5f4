"""Two processes on one work directory."""

import random
import time

from tests.attacks import programs
from tests.attacks.attack import Attack, Outcome, judge_error
from tests.attacks.fixtures import Place
from tests.attacks.modes import READING, command


def generate(place: Place, rng: random.Random) -> Attack:
    """Starts a second command on the work directory of a run in progress."""
    workdir = place.copy("part", "run")
    mode = rng.choice(["train", "train", *READING])
    delay = rng.uniform(0, 1)
    first = [*place.config(), f"--workdir={workdir}"]
    second = first if mode == "train" else command(place, mode, workdir).argv

    def execute() -> Outcome:
        processes = [programs.start(place, first)]
        time.sleep(delay)
        processes.append(programs.start(place, second))
        ends = [programs.finish(process) for process in processes]
        for (code, _, stderr), culprits in zip(ends, ((str(workdir),),) * 2, strict=True):
            outcome = judge_error(code, stderr, culprits) if code else Outcome(True, "")
            if not outcome.good:
                return outcome
        codes = [code for code, _, _ in ends]
        if all(codes) or (mode != "train" and codes[0]):
            return Outcome(False, f"neither run ended: {ends[0][2].strip()}")
        wrong = place.check_run(workdir)
        return Outcome(not wrong, f"exits {codes}: {wrong or 'the run is as it would be alone'}")

    return Attack(f"{mode} {delay:.1f} s after train", mode, second, (), execute=execute)
