"""The training loop: files of a run, resuming, evaluation of its checkpoints, divergence."""

import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from PIL import Image

from configs import shapes
from configs.checks import ConfigError
from dssn_jax.evaluation import evaluate
from dssn_jax.learner import learner as learners
from dssn_jax.training import loop
from dssn_jax.training.run import plan
from dssn_jax.weights import convert
from dssn_jax.workdir import checkpoint, files, logs, records, restore
from input_pipeline.errors import DataError, UserError
from tests.conftest import ONE_DEVICE

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "XLA_FLAGS": ONE_DEVICE}


def latest_state(workdir):
    """Returns the state of the latest checkpoint."""
    config = records.read_config(workdir)
    with contextlib.closing(checkpoint.Checkpointer(workdir, read_only=True)) as saved:
        state, _ = saved.restore(saved.resolve("latest"), learners.build(config).abstract_state(), config)
    return jax.device_get(state)


def losses(workdir):
    return {line["step"]: line["loss"] for line in records.read_metrics(workdir) if "loss" in line}


def check_class_shares(workdir, config):
    """The checkpoint has the sums of what each step recorded, but for the warm-up of one step."""
    lines = [line for line in records.read_metrics(workdir) if "pseudo_labels" in line]
    assert [line["step"] for line in lines] == list(losses(workdir))
    percent = np.array([line["pseudo_labels"] for line in lines])
    assert percent.shape == (6, 6) and (percent >= 0).all() and percent.sum(1).max() <= 100.001
    np.testing.assert_allclose(percent[1:].sum(0), 100 * np.array(class_shares(workdir)["sums"]), rtol=1e-5)
    assert class_shares(workdir)["steps"] == 5
    board = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    assert all(f"pseudo_labels/{name}".encode() in board for name in config.data.classes)
    assert "pseudo_labels" not in (workdir / "log.txt").read_text()


def class_shares(workdir):
    """Returns what the latest checkpoint holds about the shares of the classes."""
    with contextlib.closing(checkpoint.Checkpointer(workdir, read_only=True)) as saved:
        return saved.meta(saved.latest_step())["pseudo_labels"]


def test_a_run_leaves_its_scores_logs_and_checkpoints(tiny_config, tmp_path):
    config = tiny_config()
    summary = loop.train(config, tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    for network in ("student", "teacher"):
        best, last = summary[network]["best"], summary[network]["last"]
        assert last["step"] == 6 and best["step"] in (3, 6) and best["miou"] >= last["miou"]
        assert list(last["iou"]) == list(config.data.classes)
        assert last["miou"] == pytest.approx(np.mean(list(last["iou"].values())))
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
    check_class_shares(tmp_path, config)
    evaluated = [line for line in records.read_metrics(tmp_path) if "iou_teacher" in line]
    confusion = json.loads((tmp_path / "confusion.json").read_text())
    assert [line["step"] for line in evaluated] == [3, 6] and confusion["step"] == 6
    for network in ("student", "teacher"):
        assert evaluated[-1][f"iou_{network}"] == list(summary[network]["last"]["iou"].values())
        assert np.sum(confusion[network]) == 6 * 48 * 48  # No pixel of the shapes is ignored.
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["steps"], run["steps_per_epoch"], run["images"]["val"]) == (6, 4, 6) and "4 x" in run["devices"]
    assert run["batch"] == {"labeled": 4, "unlabeled": 4}
    log = (tmp_path / "log.txt").read_text()
    assert "6 steps (4 per epoch) of 4 labeled + 4 unlabeled images (1 processes x 4 devices x 1 + 1 images" in log
    for part in (
        "first step, with its compilation: ",
        "step 6/6",
        "loss_fp2",
        "contrast_image",
        "mask_ratio",
        "lr ",
        "images/s",
        "waiting",
        "left",
        "Mean IoU",
    ):
        assert part in log, part
    board = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    for tag in (b"miou_teacher", b"weak-strong1-strong2-pseudo_label-selected-prediction", b"student-teacher-truth"):
        assert tag in board, tag
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert steps[-1] == "6" and len(steps) <= 2  # The latest and the best.

    scores = evaluate.evaluate(tmp_path, config=config, checkpoint="latest")
    for network in ("student", "teacher"):
        assert scores[network]["miou"] == pytest.approx(summary[network]["last"]["miou"])
    assert json.loads((tmp_path / "eval_6.json").read_text())["teacher"] == scores["teacher"]


def test_the_log_says_why_a_method_was_chosen(tiny_config):
    assert plan(tiny_config()).notes == []
    assert plan(tiny_config(method__reason="few labels")).notes == ["chosen: method=dssn: few labels"]


@pytest.mark.slow
def test_the_log_shows_the_labeled_images_per_step(tiny_config, tmp_path):
    """Supervised training gives the place of the unlabeled images to labeled ones."""
    loop.train(tiny_config("supervised", train__steps=1, train__pictures=0), tmp_path)
    assert "1 steps (4 per epoch) of 8 labeled (data.labeled_batch 4 x 2) images" in (tmp_path / "log.txt").read_text()


LONG = {
    "method": "fixmatch", "method__teacher": "ema",  # Its step compiles faster than DSSN's.
    "train__steps": 12, "train__eval_every": 7, "train__checkpoint_every": 3, "train__pictures": 0,
    "method__selection": "adaptive",  # Whose statistics are part of the state.
}  # fmt: skip


def command(config, workdir, *options):
    """Returns the command line that trains `config`."""
    values, defaults = (flatten_dict(each.to_dict(), sep=".") for each in (config, shapes.get_config("")))
    changed = [f"--config.{key}={value}" for key, value in values.items() if value != defaults[key]]
    return [sys.executable, "main.py", "--config=configs/shapes.py", f"--workdir={workdir}", *changed, *options]


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the run ended before {text!r}")


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """Returns the work directory of a run that was not interrupted."""
    workdir = tmp_path_factory.mktemp("trained")
    subprocess.run(command(tiny_config(**LONG), workdir), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return workdir


@pytest.mark.slow
def test_stopped_and_continued_runs_end_with_the_same_parameters(tiny_config, trained, tmp_path):
    """SIGKILL in the middle of the second epoch, SIGTERM later, then other workers; all equals an uninterrupted run."""
    for step, notice, code in ((6, signal.SIGKILL, -signal.SIGKILL), (8, signal.SIGTERM, 128 + signal.SIGTERM)):
        command_line = command(tiny_config(**LONG), tmp_path)
        with subprocess.Popen(command_line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
            wait_for(process, f"step {step}/12")
            process.send_signal(notice)
            process.stdout.read()
        assert process.returncode == code
    with contextlib.closing(checkpoint.Checkpointer(tmp_path, read_only=True)) as saved:
        step = saved.latest_step()
    assert 8 <= step < 12  # SIGTERM saved what came after the checkpoints of steps 6 and 7.
    last = command(tiny_config(**LONG, data__workers=2, data__buffer=1), tmp_path)
    last = subprocess.run(last, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert saved_steps(last.stdout) == [step]
    uninterrupted, stopped = map(latest_state, (trained, tmp_path))
    assert int(uninterrupted.step) == int(stopped.step) == 12
    jax.tree.map(np.testing.assert_array_equal, uninterrupted, stopped)
    assert losses(trained) == losses(tmp_path)
    assert class_shares(trained) == class_shares(tmp_path) and class_shares(trained)["steps"] == 11
    scores = [json.loads((workdir / "summary.json").read_text()) for workdir in (trained, tmp_path)]
    assert scores[0]["student"] == scores[1]["student"] and scores[0]["teacher"] == scores[1]["teacher"]


def saved_steps(log):
    return [int(line.split("continuing from step ")[1].split()[0]) for line in log.splitlines() if "continuing" in line]


@pytest.mark.slow
def test_a_run_is_not_continued_with_what_would_change_it(tiny_config, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    changes = {**LONG, "train__steps": 14, "optimizer__lr": 0.01}
    with pytest.raises(ConfigError, match=r"step 12; .*lr: 0.05, now 0.01; the length.*: 12 steps, now 14.*resume"):
        loop.train(tiny_config(**changes), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["lr"] == 0.05
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(contextlib.closing(files.Folder(tmp_path)))
        trainer = loop.Trainer(plan(tiny_config(**changes, train__resume="changed")), folder, stack)
    assert int(trainer.state.step) == 12


@pytest.mark.slow
def test_a_run_that_cannot_start_leaves_nothing_open(tiny_config, trained, tmp_path, monkeypatch):
    """Refused at the checkpoint, and failing when everything else is open."""

    def fail(*arguments):
        raise RuntimeError("the last thing")

    def opened():
        names = {thread.name for thread in threading.enumerate()}
        return (
            {name for name in names if "prefetch" in name},
            logs.logger.handlers,
            signal.getsignal(signal.SIGTERM),
        )

    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = opened()
    with pytest.raises(ConfigError, match="cannot be continued"):
        loop.train(tiny_config(**LONG | {"train__steps": 14}), tmp_path)
    assert opened() == before
    monkeypatch.setattr(loop, "ImageSummaries", fail)
    with pytest.raises(RuntimeError, match="the last thing"):
        loop.train(tiny_config(**LONG), tmp_path)
    assert opened() == before


def disk_full(process, workdir):
    """Lets no file become larger than 20 kB, as if the disk were full."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))


def read_only(process, workdir):
    (workdir / "checkpoints").chmod(0o555)


# The superuser may write to every folder; without this capability not.
AS_USER = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override"]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [disk_full, read_only])
def test_a_disk_that_takes_no_more_leaves_the_last_good_checkpoint(tiny_config, tmp_path, trouble):
    with subprocess.Popen(
        [*AS_USER, *command(tiny_config(**LONG | {"train__checkpoint_every": 1}), tmp_path)], cwd=ROOT, text=True,
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        wait_for(process, "step 4/12")
        trouble(process, tmp_path)
        _, errors = process.communicate()
    assert process.returncode == 1
    (tmp_path / "checkpoints").chmod(0o755)
    step = int(re.search(r"checkpoints: cannot save .*last good checkpoint is that of step (\d+)", errors)[1])
    assert step >= 2 and int(latest_state(tmp_path).step) == step


@pytest.mark.slow
def test_finished_runs_are_not_trained_again(tiny_config, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    again = loop.train(tiny_config(**LONG), tmp_path)
    first = json.loads((trained / "summary.json").read_text())
    assert again["steps"] == first["steps"] == 12
    assert again["student"] == first["student"] and again["teacher"] == first["teacher"]
    assert losses(tmp_path) == losses(trained)


@pytest.mark.slow
def test_a_finished_run_is_not_replaced_by_another(tiny_config, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    records = [tmp_path / name for name in ("config.json", "run.json", "summary.json", "confusion.json")]
    before = [path.read_bytes() for path in records]
    for options in ({"seed": 1}, {"data__std": (0.2, 0.2, 0.2)}, {"eval__mode": "center_crop"}, {"train__steps": 10}):
        with pytest.raises(ConfigError, match="holds another run, finished at step 12, .*another --workdir"):
            loop.train(tiny_config(**LONG | {"train__resume": "changed"} | options), tmp_path)
    loop.train(tiny_config(**LONG | {"name": "other", "train__log_every": 5}), tmp_path)
    assert [path.read_bytes() for path in records] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "rate", "message"),
    [
        (100, 1e30, r"the (loss|norm of the gradients) is not finite at step 2 .*loss_x.*no checkpoint was saved"),
        (1, 1e30, r"the state after step 1 is not saved: .* holds .*; no checkpoint was saved"),
        (1, 1e10, r"step [23] .*; the last checkpoint, which is finite, is that of step (1|2) in"),
    ],
)
def test_a_run_that_diverges_keeps_the_last_finite_checkpoint(tiny_config, tmp_path, every, rate, message):
    config = tiny_config("supervised", optimizer__lr=rate, train__checkpoint_every=every, train__eval_every=100)
    with pytest.raises(loop.DivergedError, match=message) as raised:
        loop.train(config, tmp_path)
    assert "lower config.optimizer.lr" in str(raised.value) and not (tmp_path / "summary.json").exists()
    if "no checkpoint" not in message:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(latest_state(tmp_path).student))


@pytest.mark.slow
def test_pretrained_weights_that_are_not_finite_are_named(tiny_config, trained, tmp_path):
    weights = tmp_path / "weights.safetensors"
    convert.convert(str(trained), str(weights))
    tensors = safetensors.numpy.load_file(weights)
    tensors["classifier.bias"] = np.full_like(tensors["classifier.bias"], np.nan)
    safetensors.numpy.save_file(tensors, weights)
    with pytest.raises(UserError, match="weights.safetensors.*classifier.bias"):
        loop.train(tiny_config(model__pretrained=str(weights)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def write_images(root):
    """Writes a data set of eight 40x50 images with masks of 3 classes; two validate."""
    random = np.random.default_rng(0)
    for name in ("images", "masks", "splits/few"):
        (root / name).mkdir(parents=True)
    lines = []
    for number in range(8):
        Image.fromarray(random.integers(0, 255, (40, 50, 3), np.uint8)).save(root / f"images/{number}.png")
        Image.fromarray(random.integers(0, 3, (40, 50), np.uint8)).save(root / f"masks/{number}.png")
        lines.append(f"images/{number}.png masks/{number}.png\n")
    (root / "splits/few/labeled.txt").write_text("".join(lines[:4]))
    (root / "splits/few/unlabeled.txt").write_text("".join(lines[:6]))
    (root / "splits/val.txt").write_text("".join(lines[6:]))


def of_images(tiny_config, root, **options):
    """Returns the configuration of a supervised run on the images of `write_images`."""
    data = {"data__source": "folder", "data__root": str(root), "data__split": "few", "data__classes": ("a", "b", "c")}
    return tiny_config("supervised", **data, train__pictures=0, **options)


def test_a_bad_validation_mask_is_named_before_the_first_step(tiny_config, tmp_path):
    write_images(tmp_path / "data")
    Image.fromarray(np.full((40, 50), 200, np.uint8)).save(tmp_path / "data/masks/7.png")
    with pytest.raises(DataError, match=r"masks/7.png: mask values 200"):
        loop.train(of_images(tiny_config, tmp_path / "data"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_masks_without_a_class_are_in_the_log(tiny_config, tmp_path):
    write_images(tmp_path / "data")
    Image.fromarray(np.full((40, 50), 255, np.uint8)).save(tmp_path / "data/masks/2.png")
    loop.train(of_images(tiny_config, tmp_path / "data", train__steps=1), tmp_path / "run")
    assert "WARNING: " in (log := (tmp_path / "run/log.txt").read_text()) and "images/2.png" in log


@pytest.mark.slow
def test_an_evaluation_that_fails_loses_no_step(tiny_config, tmp_path, monkeypatch):
    """A file that is removed while training."""
    write_images(tmp_path / "data")
    config = of_images(tiny_config, tmp_path / "data", train__eval_every=3, train__checkpoint_every=100)
    evaluate_as_before = loop.Trainer._evaluate

    def remove_then_evaluate(self, batch):
        (tmp_path / "data/images/7.png").unlink()
        evaluate_as_before(self, batch)

    monkeypatch.setattr(loop.Trainer, "_evaluate", remove_then_evaluate)
    with pytest.raises((DataError, OSError), match="images/7.png"):
        loop.train(config, tmp_path / "run")
    assert int(latest_state(tmp_path / "run").step) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__decoder_channels": 24}, "decoder_channels is 16 there, 24 in the config"),
        ({"data__classes": ("a", "b", "c", "d", "e", "f")}, "config.data.classes is"),
        ({"method__teacher": "student"}, "method.teacher is 'ema' there, 'student' in the config"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tiny_config, trained, options, message):
    with pytest.raises((checkpoint.CheckpointError, DataError), match=message):
        evaluate.evaluate(trained, config=tiny_config(**options), checkpoint="latest")
    with pytest.raises((checkpoint.CheckpointError, DataError), match=message):
        loop.train(tiny_config(**options), trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "before", "after"), [("optimizer.name", "sgd", "adamw"), ("method.selection", "adaptive", "soft")]
)
def test_another_state_cannot_continue_but_evaluate(tiny_config, trained, key, before, after):
    config = tiny_config(**LONG | {key.replace(".", "__"): after}, train__resume="changed")
    with pytest.raises(checkpoint.CheckpointError, match=f"{key} is '{before}' there, '{after}' in the config"):
        loop.train(config, trained)
    scores = evaluate.evaluate(trained, config=config, checkpoint="latest")
    summary = json.loads((trained / "summary.json").read_text())
    assert scores["teacher"]["miou"] == pytest.approx(summary["teacher"]["last"]["miou"])


@pytest.mark.slow
def test_checkpoints_are_ranked_by_the_configured_metric(tiny_config, tmp_path):
    summary = loop.train(tiny_config("supervised", eval__metric="pixel_accuracy", train__pictures=0), tmp_path)
    assert summary["metric"] == "pixel_accuracy"
    assert summary["best_score"] == summary["student"]["best"]["pixel_accuracy"]
    assert restore.restore(tmp_path).step == summary["best_step"]
    with pytest.raises(ConfigError, match="unknown config.eval.metric 'iou'; did you mean 'miou'"):
        loop.train(tiny_config("supervised", eval__metric="iou"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_missing_checkpoints_are_named(tiny_config, trained, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no such folder"):
        evaluate.evaluate(tmp_path / "nowhere", config=tiny_config())
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint '5'; there are: latest, best, .*12"):
        evaluate.evaluate(trained, config=tiny_config(), checkpoint="5")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(tiny_config, trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    arrays = (tmp_path / "checkpoints" / "12" / "state").rglob("*")
    data = max((path for path in arrays if path.is_file()), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(checkpoint.CheckpointError, match="checkpoints/12"):
        evaluate.evaluate(tmp_path, config=tiny_config(), checkpoint="12")
