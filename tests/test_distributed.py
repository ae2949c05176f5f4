"""Several processes of one run: the same run as of one process, how they find each other and how they stop."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from configs.checks import ConfigError
from dssn_jax import distributed
from dssn_jax.workdir import files
from tests.conftest import ONE_DEVICE, free_port

ROOT = pathlib.Path(__file__).parent.parent
FOUR_DEVICES = f"{ONE_DEVICE} --xla_force_host_platform_device_count=4"


def start(workdir, xla_flags, *options):
    """Starts a run of 30 steps in float64 that evaluates every ten; its 14 images do not divide into batches of 8."""
    command = [
        sys.executable, "main.py", "--config=configs/shapes.py:method=supervised,encoder=resnet10w16,crop=17,steps=30",
        f"--workdir={workdir}", "--config.model.decoder_channels=16", "--config.model.aspp_dilations=(2,)",
        "--config.model.dtype=float64", "--config.model.param_dtype=float64", "--config.data.shapes.size=32",
        "--config.data.shapes.unlabeled=16", "--config.data.shapes.val=14", "--config.train.log_every=1",
        "--config.train.eval_every=10", "--config.train.checkpoint_every=10", "--config.train.pictures=0",
        "--config.eval.batch=8", "--config.data.labeled_batch=4", *options,
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": xla_flags, "JAX_ENABLE_X64": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(*processes, code=0):
    """Waits for all processes, checks their exit codes and returns what they printed."""
    printed = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == code, text[-2000:]
    return printed


def start_two(workdir):
    """Starts the run of `start` as two processes of four devices each."""
    join = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    return [start(workdir, FOUR_DEVICES, *join, f"--process={i}") for i in range(2)]


@pytest.mark.slow
def test_two_processes_of_four_devices_then_one_of_one_train_and_evaluate_as_one_of_one(tmp_path):
    """One of two processes gets SIGTERM; both save and stop, and a single process resumes."""
    finish(start(tmp_path / "one", ONE_DEVICE))
    two = start_two(tmp_path / "two")
    assert any("2 processes x 4 devices x 1 " in line for line in two[0].stdout)
    assert any("step 11/30" in line for line in two[0].stdout)
    two[1].send_signal(signal.SIGTERM)
    first, second = finish(*two, code=128 + signal.SIGTERM)
    step = re.search(r"stopped by SIGTERM after step (\d+) of 30, which is saved", first)[1]
    assert f"SIGTERM after step {step} of 30" in second and " | loss" not in second  # Only process 0 logs.
    (alone,) = finish(start(tmp_path / "two", ONE_DEVICE))
    assert f"continuing from step {step} " in alone and "1 processes x 1 devices" in alone
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert {line["step"] for line in two if "miou_student" in line} == {10, 20, 30}
    timing = {"seconds", "images_per_second", "waiting"}
    for expected, values in zip(one, two, strict=True):
        for name in expected.keys() - timing:
            assert values[name] == pytest.approx(expected[name], rel=1e-9), name


@pytest.mark.slow
def test_all_processes_of_a_run_end_if_another_run_holds_the_work_directory(tmp_path):
    with files.lock(tmp_path):
        first, second = finish(*start_two(tmp_path), code=1)
    assert f"error: {tmp_path}: process {os.getpid()} on {socket.gethostname()} trains in this work directory" in first
    assert f"error: {tmp_path}: not locked by the first process" in second
    assert "Traceback" not in first + second and [file.name for file in tmp_path.iterdir()] == [files.LOCK]


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, "SLURM"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # The shell that submitted a job.
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"SLURM_NTASKS": "", "SLURM_PROCID": ""}, None),
        ({"SLURM_NTASKS": "odd"}, None),
        ({}, None),
    ],
)
def test_clusters_are_detected(environment, cluster):
    assert distributed.detect_cluster({"JAX_PLATFORMS": "cpu", **environment}) == cluster


@pytest.mark.parametrize("value", ["odd", "-1", "1.5", "²", "9" * 20])
@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_variables_that_are_no_number_are_named(name, value):
    environment = {"JAX_PLATFORMS": "cpu", "SLURM_PROCID": "0", name: value}
    with pytest.raises(ConfigError, match=f"environment variable {name} is '{value[:9]}.*number of processes"):
        distributed.detect_cluster(environment)


def test_odd_variables_of_a_cluster_are_no_traceback(monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "x", "SLURM_JOB_ID": "y", "SLURM_LOCALID": "z"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="could not connect \\(SLURM\\)"):
        distributed.initialize()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("nowhere", 2, 0), "--coordinator=nowhere: expected HOST:PORT"),
        (("a:b:1", 2, 0), "expected HOST:PORT"),
        ((None, 2, 0), "need --coordinator"),
        (("localhost:1", None, None), "needs --processes and --process"),
        (("localhost:1", 2, 2), "--process is 2; expected 0 to 1"),
    ],
)
def test_incomplete_flags_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        distributed.initialize(*flags)


def test_sigterm_is_received_and_its_handler_restored():
    before = signal.getsignal(signal.SIGTERM)
    preemption = distributed.Preemption()
    assert not preemption.reached(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.reached(2)
    preemption.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_stops_as_sigterm_and_a_second_one_at_once(monkeypatch, capfd):
    """The second one ends the process while the main thread is busy outside Python."""
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored where the tests run in the background.
    before, ended, notices = signal.getsignal(signal.SIGINT), [], []
    monkeypatch.setattr(os, "_exit", ended.append)
    preemption = distributed.Preemption(notify=notices.append)
    assert not preemption.reached(1)
    for count in (1, 2):
        os.kill(os.getpid(), signal.SIGINT)
        end = time.monotonic() + 10
        while time.monotonic() < end and len(notices + ended) < count:
            time.sleep(0.01)
        assert preemption.reached(2) and preemption.cause() == "Ctrl-C" and preemption.error("").exit_code == 130
    preemption.close()
    assert len(notices) == 1 and "Ctrl-C again stops it at once" in notices[0]
    assert ended == [130] and capfd.readouterr().err.startswith("error: stopped at once by Ctrl-C")
    assert signal.getsignal(signal.SIGINT) == before and signal.set_wakeup_fd(-1) == -1
    signal.signal(signal.SIGINT, outside)


def test_ctrl_c_that_a_background_job_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    preemption = distributed.Preemption()
    os.kill(os.getpid(), signal.SIGINT)
    assert not preemption.reached(1)
    preemption.close()
    signal.signal(signal.SIGINT, before)


def test_a_deadline_stops_the_run_and_names_its_cause():
    early, late = distributed.Preemption(time.monotonic() + 60), distributed.Preemption(time.monotonic())
    assert not early.reached(1)
    assert late.reached(1) and late.cause() == "the time limit"
    os.kill(os.getpid(), signal.SIGTERM)  # The last listener receives it.
    assert late.cause() == "SIGTERM" and not early.reached(2)
    late.close()
    early.close()
