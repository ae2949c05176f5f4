"""Worker processes of a run: they end with it, however it ends, and leave nothing behind."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

from tests.soak import children, is_running, segments_left, shared_memory
from tests.training.test_loop import ENVIRONMENT, ROOT, command, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="reads /proc of Linux"),
]


def wait_until(condition, what, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def workers_of(process):
    """Returns the workers among the child processes of a run."""
    arguments = {child: pathlib.Path(f"/proc/{child}/cmdline").read_bytes() for child in children(process)}
    return [child for child, words in arguments.items() if b"spawn_main" in words]


def run_until(step, notify, config, workdir):
    """Starts a run in a process group of its own, calls `notify` after `step`.

    Returns (exit code, standard error, segments of shared memory that are left).
    """
    before = shared_memory()
    with subprocess.Popen(
        command(config, workdir), cwd=ROOT, env=ENVIRONMENT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        wait_for(process, f"step {step}/")
        started = children(process.pid)
        assert len(workers_of(process.pid)) == 2
        notify(process)
        _, errors = process.communicate(timeout=120)
    wait_until(lambda: not any(map(is_running, started)), "child processes outlive the run")
    return process.returncode, errors, segments_left(before)


@pytest.fixture(autouse=True)
def interrupts():
    """Lets runs receive Ctrl-C, which shells keep from what they start in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def config(tiny_config):
    return tiny_config("supervised", data__workers=2, train__steps=500, train__pictures=0, train__eval_every=500)


def test_workers_end_with_a_killed_run(config, tmp_path):
    code, errors, left = run_until(2, lambda run: run.kill(), config, tmp_path)
    assert (code, errors, left) == (-signal.SIGKILL, "", set())


def test_a_killed_worker_is_named_in_one_line(config, tmp_path):
    code, errors, left = run_until(2, lambda run: os.kill(workers_of(run.pid)[1], signal.SIGKILL), config, tmp_path)
    assert (code, left) == (1, set())
    assert errors.startswith("error: a worker process that makes batches ended with exit code -9")
    assert errors.count("\n") == 1 and "config.data.workers is 2" in errors


@pytest.mark.parametrize(("notice", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_to_all_processes_saves_and_stops(config, tmp_path, notice, name):
    """Terminals send Ctrl-C, and some clusters SIGTERM, to workers too."""
    code, errors, left = run_until(2, lambda run: os.killpg(run.pid, notice), config, tmp_path)
    assert (code, left) == (128 + notice, set())
    assert errors.startswith(f"error: stopped by {name} after step ") and errors.count("\n") == 1


def test_a_second_interrupt_stops_at_once(config, tmp_path):
    def notify(run):
        run.send_signal(signal.SIGSTOP)  # The run receives both before it has finished a step.
        run.send_signal(signal.SIGINT)
        run.send_signal(signal.SIGCONT)
        wait_for(run, "Ctrl-C")
        run.send_signal(signal.SIGINT)

    code, errors, left = run_until(2, notify, config, tmp_path)
    assert (code, left) == (128 + signal.SIGINT, set())
    assert errors.startswith("error: stopped at once by Ctrl-C") and errors.count("\n") == 1
