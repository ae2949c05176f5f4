"""Kills a run at random moments and compares it with one left alone: `python -m tests.faults`.

A small run on generated images that saves after every step is started, killed with SIGKILL at a random moment (while it
starts, trains, evaluates or saves) and started again, `--kills` times; then it may finish. Exits with 1 unless its
whole state and its logged losses equal, bit for bit, those of a run that was never stopped.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from dssn_jax.learner import learner as learners
from dssn_jax.workdir import logs, records
from dssn_jax.workdir.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parent.parent


def start(workdir: pathlib.Path, steps: int, cache: pathlib.Path) -> subprocess.Popen:
    """Starts or resumes the run in `workdir`."""
    command = [
        sys.executable, "main.py", f"--config=configs/shapes.py:encoder=resnet10w16,crop=33,steps={steps}",
        f"--workdir={workdir}", "--config.model.decoder_channels=16", "--config.model.aspp_dilations=(2,)",
        "--config.data.labeled_batch=4", "--config.data.unlabeled_batch=4", "--config.data.shapes.size=48",
        "--config.data.shapes.unlabeled=32", "--config.data.shapes.val=6", "--config.train.log_every=1",
        "--config.train.eval_every=5", "--config.train.checkpoint_every=1", "--config.train.pictures=0",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"a run ended with {process.returncode}: {errors.decode()[-2000:]}")


def final_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of the latest checkpoint by their path in the state."""
    config = records.read_config(workdir)
    checkpoints = Checkpointer(workdir, read_only=True)
    state, _ = checkpoints.restore(checkpoints.resolve("latest"), learners.build(config).abstract_state(), config)
    checkpoints.close()
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """Returns the logged loss of each step."""
    return {line["step"]: line["loss"] for line in records.read_metrics(workdir) if "loss" in line}


def last_step(workdir: pathlib.Path) -> int:
    """Returns the last step whose loss is logged, or 0."""
    return max(losses(workdir), default=0)


def wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    """Returns when the run has logged `step`, or has ended."""
    while process.poll() is None and last_step(workdir) < step:
        time.sleep(0.05)


def kill_at_random(workdir: pathlib.Path, steps: int, kills: int, start_run, seed: int) -> None:
    """Starts the run in `workdir` `kills` times, and kills it while it starts or up to a second after a random step."""
    moments = random.Random(seed)
    for kill in range(kills):
        done = last_step(workdir)
        step = min(done + moments.randint(1, max(1, (steps - done) // (kills - kill))), steps - 1)
        process = start_run(workdir)
        if moments.random() < 0.2:
            time.sleep(moments.uniform(3, 15))
        else:
            wait_for_step(process, workdir, step)
            time.sleep(moments.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        unfinished = len(list((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")))
        step = last_step(workdir)
        print(f"kill {kill + 1}: at step {step}, {unfinished} unfinished checkpoints", flush=True)


def compare(kills: int, steps: int, seed: int) -> bool:
    """Returns whether a run of `steps` that is killed `kills` times ends as one that is left alone."""
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed, cache = (pathlib.Path(folder) / name for name in ("a", "b", "cache"))

        def start_run(workdir: pathlib.Path) -> subprocess.Popen:
            return start(workdir, steps, cache)

        finish(start_run(undisturbed))  # Also fills the cache of compiled programs.
        kill_at_random(killed, steps, kills, start_run, seed)
        finish(start_run(killed))
        expected, state = final_state(undisturbed), final_state(killed)
        differing = [name for name, value in expected.items() if not np.array_equal(value, state[name])]
        same_losses = losses(undisturbed) == losses(killed)
    print(f"{kills} kills; {len(expected)} arrays, {len(differing)} differ; losses equal: {same_losses}")
    return not differing and same_losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    arguments = parser.parse_args()
    logs.quiet_libraries()
    return 0 if compare(arguments.kills, arguments.steps, arguments.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
