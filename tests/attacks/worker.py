"""A process that runs attacks one after another: `python -m tests.attacks.worker FIXTURES [--build]`.

It reads lines `SEED INDEX KINDS SCRATCH` and answers each with two lines of JSON: {"kind", "name", "mode"} before the
attack, {"good", "text"} after it. The process that started it ends it when an attack takes too long or too much memory.
"""

import contextlib
import json
import os
import pathlib
import pickle
import signal
import sys
import tempfile
import traceback

from tests.conftest import ONE_DEVICE  # Sets the environment of JAX.

os.environ["XLA_FLAGS"] = ONE_DEVICE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

from dssn_jax import commands
from tests.attacks import attack as attacks
from tests.attacks import fixtures, generators, memo


@contextlib.contextmanager
def captured():
    """Yields a list that receives standard output and error, of libraries in C++ too."""
    texts, kept = [], (os.dup(1), os.dup(2))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            yield texts
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))


@contextlib.contextmanager
def surroundings(place: fixtures.Place, attack: attacks.Attack):
    """Sets the current folder, the home and the environment of an attack."""
    here, before = os.getcwd(), dict(os.environ)
    os.environ.update({"HOME": str(place.scratch / "home"), **attack.environment})
    os.chdir(place.scratch / "cwd")
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)


def run(place: fixtures.Place, attack: attacks.Attack) -> attacks.Outcome:
    """Runs an attack in its place and judges it."""
    if attack.execute:
        return attack.execute()
    before = attacks.snapshot(place.scratch, attack.outputs)
    code, raised = None, ""
    with surroundings(place, attack), captured() as texts:
        try:
            code = commands.run(attack.argv)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException as error:  # The user would see a traceback.
            frame = (traceback.extract_tb(error.__traceback__) or [None])[-1]
            where = f" ({pathlib.Path(frame.filename).name}:{frame.lineno})" if frame else ""
            raised = f"{type(error).__name__}: {str(error)[:300]}{where}".replace("\n", " ")
    changed = attacks.changes(before, attacks.snapshot(place.scratch, attack.outputs))
    return attacks.judge(attack, attacks.Result(code, *texts, raised, changed))


def answer(folder: pathlib.Path, oracle: dict, line: str, say) -> None:
    """Makes and runs the attack of a line; `say` sends what it is, and then what came of it."""
    seed, index, kinds, scratch = line.split()
    place = fixtures.Place(folder, pathlib.Path(scratch), oracle)
    kind, attack = generators.make(place, int(seed), int(index), kinds.split(","))
    say({"kind": kind, "name": attack.name, "mode": attack.mode})
    try:
        outcome = run(place, attack)
    except Exception as error:  # The check of a result failed: the result is of another form.
        outcome = attacks.Outcome(False, f"unexpected result: {type(error).__name__}: {error}")
        if os.environ.get("ATTACKS_DEBUG"):
            traceback.print_exc()
    say({"good": outcome.good, "text": outcome.text})


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # Only training reacts to it.
    folder = pathlib.Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever threads print later is no answer.

    def say(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    if "--build" in sys.argv:
        try:
            with captured() as texts:
                fixtures.build(folder)
        except Exception:
            print(*texts, file=sys.stderr)
            raise
    memo.install()
    oracle = pickle.loads((folder / "oracle.pickle").read_bytes())
    say({"ready": True})
    for line in sys.stdin:
        answer(folder, oracle, line, say)


if __name__ == "__main__":
    main()
