"""The training loop: files of a run, resuming, evaluation of its checkpoints, divergence."""

import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs.checks import ConfigError
from dssn_jax.evaluation import evaluate
from dssn_jax.learner import learner as experiment
from dssn_jax.training import loop as train
from dssn_jax.workdir import checkpoint, files, recorder
from tests.conftest import ONE_DEVICE

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "XLA_FLAGS": ONE_DEVICE}


def parameters(config, workdir):
    """The state of the latest checkpoint."""
    saved = checkpoint.Checkpointer(workdir, read_only=True)
    state, _ = saved.restore(saved.resolve("latest"), experiment.build(config).abstract_state(), config)
    saved.close()
    return jax.device_get(state)


def losses(workdir):
    return {line["step"]: line["loss"] for line in recorder.read_metrics(workdir) if "loss" in line}


def test_a_run_leaves_its_scores_logs_and_checkpoints(tiny_config, tmp_path):
    config = tiny_config()
    summary = train.train(config, tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    for network in ("student", "teacher"):
        best, last = summary[network]["best"], summary[network]["last"]
        assert last["step"] == 6 and best["step"] in (3, 6) and best["miou"] >= last["miou"]
        assert list(last["iou"]) == list(config.data.classes)
        assert last["miou"] == pytest.approx(np.mean(list(last["iou"].values())))
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
    evaluated = [line for line in recorder.read_metrics(tmp_path) if "iou_teacher" in line]
    confusion = json.loads((tmp_path / "confusion.json").read_text())
    assert [line["step"] for line in evaluated] == [3, 6] and confusion["step"] == 6
    for network in ("student", "teacher"):
        assert evaluated[-1][f"iou_{network}"] == list(summary[network]["last"]["iou"].values())
        assert np.sum(confusion[network]) == 6 * 48 * 48  # No pixel of the shapes is ignored.
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["steps"], run["steps_per_epoch"], run["images"]["val"]) == (6, 4, 6) and "4 x" in run["devices"]
    log = (tmp_path / "log.txt").read_text()
    for part in ("step 6/6", "loss_fp2", "contrast_image", "mask_ratio", "lr ", "images/s", "waiting", "left", "mIoU"):
        assert part in log, part
    board = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    for tag in (b"miou_teacher", b"weak-strong1-strong2-pseudo_label-selected-prediction", b"student-teacher-truth"):
        assert tag in board, tag
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert steps[-1] == "6" and len(steps) <= 2  # The latest and the best.

    found = evaluate.evaluate(config, tmp_path, "latest")
    for network in ("student", "teacher"):
        assert found[network]["miou"] == pytest.approx(summary[network]["last"]["miou"])
    assert json.loads((tmp_path / "eval_6.json").read_text())["teacher"] == found["teacher"]


def command(workdir, *options):
    arguments = [
        "--config=configs/shapes.py:encoder=resnet10w16,crop=33,labeled=8,steps=12", f"--workdir={workdir}",
        "--config.model.decoder_channels=16", "--config.data.labeled_batch=4", "--config.data.unlabeled_batch=4",
        "--config.data.shapes.size=48", "--config.data.shapes.unlabeled=16", "--config.data.shapes.val=6",
        "--config.train.log_every=1", "--config.train.eval_every=7", "--config.train.checkpoint_every=3",
        "--config.train.pictures=0", *options,
    ]  # fmt: skip
    return [sys.executable, "main.py", *arguments]


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the run ended before {text!r}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work directory of a run that was left alone."""
    workdir = tmp_path_factory.mktemp("trained")
    subprocess.run(command(workdir), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return workdir


def test_stopped_and_continued_runs_end_with_the_same_parameters(tiny_config, trained, tmp_path):
    """SIGKILL in the middle of the second epoch, SIGTERM later, then other workers; all equals a run left alone."""
    for step, notice, code in ((6, signal.SIGKILL, -signal.SIGKILL), (8, signal.SIGTERM, 128 + signal.SIGTERM)):
        with subprocess.Popen(
            command(tmp_path), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
        ) as process:
            wait_for(process, f"step {step}/12")
            process.send_signal(notice)
            process.stdout.read()
        assert process.returncode == code
    saved = checkpoint.Checkpointer(tmp_path, read_only=True)
    step = saved.latest_step()
    saved.close()
    assert 8 <= step < 12  # SIGTERM saved what came after the checkpoints of steps 6 and 7.
    last = command(tmp_path, "--config.data.workers=2", "--config.data.buffer=1")
    last = subprocess.run(last, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert saved_steps(last.stdout) == [step]
    whole, stopped = (parameters(tiny_config(), workdir) for workdir in (trained, tmp_path))
    assert int(whole.step) == int(stopped.step) == 12
    jax.tree.map(np.testing.assert_array_equal, whole, stopped)
    assert losses(trained) == losses(tmp_path)
    scores = [json.loads((workdir / "summary.json").read_text()) for workdir in (trained, tmp_path)]
    assert scores[0]["student"] == scores[1]["student"] and scores[0]["teacher"] == scores[1]["teacher"]


def saved_steps(log):
    return [int(line.split("continuing from step ")[1].split()[0]) for line in log.splitlines() if "continuing" in line]


def test_a_run_is_not_continued_with_what_would_change_it(tiny_config, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=r"step 12: .*lr: 0.02, now 0.01.*length.*: 12 steps, now 14.*resume"):
        train.train(tiny_config(train__steps=14, optimizer__lr=0.01), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["lr"] == 0.02
    parts = experiment.build(tiny_config(train__steps=14, optimizer__lr=0.01, train__resume="changed"))
    trainer = train.Trainer(parts, files.Folder(tmp_path))
    trainer.close()
    assert int(trainer.state.step) == 12


def disk_full(process, workdir):
    """No file may become larger than 20 kB, as if the disk were full."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))


def read_only(process, workdir):
    (workdir / "checkpoints").chmod(0o555)


# The superuser may write to every folder; without this capability not.
AS_USER = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override"]


@pytest.mark.parametrize("trouble", [disk_full, read_only])
def test_a_disk_that_takes_no_more_leaves_the_last_good_checkpoint(tiny_config, tmp_path, trouble):
    with subprocess.Popen(
        [*AS_USER, *command(tmp_path, "--config.train.checkpoint_every=1")], cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        wait_for(process, "step 4/12")
        trouble(process, tmp_path)
        _, errors = process.communicate()
    assert process.returncode == 1
    (tmp_path / "checkpoints").chmod(0o755)
    step = int(re.search(r"checkpoints: cannot save .*last good checkpoint is that of step (\d+)", errors)[1])
    assert step >= 2 and int(parameters(tiny_config(), tmp_path).step) == step


def test_finished_runs_are_not_trained_again(tiny_config, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    again, first = (
        train.train(tiny_config(train__steps=12), tmp_path),
        json.loads((trained / "summary.json").read_text()),
    )
    assert again["steps"] == first["steps"] == 12
    assert again["student"] == first["student"] and again["teacher"] == first["teacher"]
    assert losses(tmp_path) == losses(trained)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path):
    config = tiny_config("supervised", optimizer__lr=1e30)
    with pytest.raises(train.DivergedError, match=r"not finite at step \d+ .*loss_x"):
        train.train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__decoder_channels": 24}, "decoder_channels is 16 there, 24 in the config"),
        ({"data__classes": ("a", "b", "c", "d", "e", "f")}, "config.data.classes|classes is"),
        ({"method__teacher": "student"}, "teacher is True there, False in the config"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tiny_config, trained, options, message):
    with pytest.raises((checkpoint.CheckpointError, ValueError), match=message):
        evaluate.evaluate(tiny_config(**options), trained, "latest")
    with pytest.raises((checkpoint.CheckpointError, ValueError), match=message):
        train.train(tiny_config(**options), trained)


def test_missing_checkpoints_are_named(tiny_config, trained, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no such folder"):
        evaluate.evaluate(tiny_config(), tmp_path / "nowhere", "best")
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint '5'; there are: latest, best, .*12"):
        evaluate.evaluate(tiny_config(), trained, "5")


def test_a_damaged_checkpoint_is_named(tiny_config, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    files = (tmp_path / "checkpoints" / "12" / "state").rglob("*")
    data = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(checkpoint.CheckpointError, match="checkpoints/12"):
        evaluate.evaluate(tiny_config(), tmp_path, "12")
