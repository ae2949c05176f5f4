"""Kills a run at random moments and compares it with one left alone: `python -m tests.faults`.

A small run on generated images that saves after every step is started, killed with SIGKILL after a random time (while
it starts, trains, evaluates or saves), and started again, `--kills` times; then it may finish. Exits with 1 unless
parameters, optimizer, teacher and logged losses equal, bit for bit, those of a run that was never stopped.
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

from dssn_jax import sharding
from dssn_jax.learner.learner import abstract_state
from dssn_jax.workdir import checkpoint, recorder
from dssn_jax.workdir import restore as saved_run

ROOT = pathlib.Path(__file__).parent.parent


def start(workdir: pathlib.Path, steps: int, cache: pathlib.Path) -> subprocess.Popen:
    command = [
        sys.executable, "main.py", f"--config=configs/shapes.py:encoder=resnet10w16,crop=33,steps={steps}",
        f"--workdir={workdir}", "--config.model.decoder_channels=16", "--config.data.labeled_batch=4",
        "--config.data.unlabeled_batch=4", "--config.data.shapes.size=48", "--config.data.shapes.unlabeled=32",
        "--config.data.shapes.val=6", "--config.train.log_every=1", "--config.train.eval_every=5",
        "--config.train.checkpoint_every=1", "--config.train.pictures=0",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"a run ended with {process.returncode}: {errors.decode()[-2000:]}")


def final_state(workdir: pathlib.Path) -> dict:
    """Everything that the latest checkpoint holds, as arrays by path."""
    config = saved_run.read_config(workdir)
    saved = checkpoint.Checkpointer(workdir, read_only=True)
    state, _ = saved.restore(saved.resolve("latest"), abstract_state(config, sharding.make_mesh()), config)
    saved.close()
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def losses(workdir: pathlib.Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in recorder.read_metrics(workdir) if "loss" in line}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, cache = (pathlib.Path(folder) / name for name in ("whole", "killed", "cache"))
        finish(start(whole, arguments.steps, cache))  # Also fills the cache of compiled programs.
        began = time.monotonic()
        timed = pathlib.Path(folder) / "timed"
        process = start(timed, arguments.steps, cache)
        while process.poll() is None and not losses(timed):
            time.sleep(0.05)
        starting = time.monotonic() - began  # Until the first step is done.
        finish(process)
        training = time.monotonic() - began - starting
        reached = []
        for kill in range(arguments.kills):
            process = start(killed, arguments.steps, cache)
            time.sleep(moments.uniform(0.8 * starting, starting + 1.5 * training / arguments.kills))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            parts = len(list((killed / "checkpoints").glob("*orbax-checkpoint-tmp*")))
            reached.append(max(losses(killed), default=0))
            print(f"kill {kill + 1}: at step {reached[-1]}, {parts} unfinished checkpoints", flush=True)
        finish(start(killed, arguments.steps, cache))
        expected, found = final_state(whole), final_state(killed)
        differing = [name for name, value in expected.items() if not np.array_equal(value, found[name])]
        same_losses = losses(whole) == losses(killed)
    print(f"{arguments.kills} kills; {len(expected)} arrays, {len(differing)} differ; losses equal: {same_losses}")
    return 0 if not differing and same_losses else 1


if __name__ == "__main__":
    sys.exit(main())
