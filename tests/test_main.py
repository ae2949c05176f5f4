"""The command line: every mode does its work; a mistake ends with one line that names it and with nothing written."""

import importlib
import inspect
import json
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from configs import shapes
from dssn_jax import commands, sharding
from input_pipeline.sources.open import open_source
from tests.conftest import ONE_DEVICE

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "--config=configs/shapes.py:encoder=resnet10w16,crop=33,labeled=8,steps=2"
# The network and the images of `tiny_config`, so that programs are in the compile cache.
TINY = (
    "--config.model.decoder_channels=16", "--config.model.aspp_dilations=(2,)", "--config.ema.batch_stats_epochs=0",
    "--config.data.labeled_batch=4", "--config.data.unlabeled_batch=4", "--config.data.shapes.size=48",
    "--config.data.shapes.unlabeled=16", "--config.data.shapes.val=6", "--config.train.pictures=0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    """Config files are named relative to the current folder."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("mode", commands.MODES)
def test_flags_of_a_mode_are_arguments_of_its_function(mode):
    mode = commands.MODES[mode]
    module, _, function = mode.entry.partition(":")
    signature = inspect.signature(getattr(importlib.import_module(module), function))
    options = dict.fromkeys(mode.required + mode.optional)
    bound = signature.bind(*mode.inputs, **options)
    assert all(signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in options)
    for name in set(mode.inputs) - {"from"}:  # A keyword of Python; `workdirs` of the report are --workdir.
        argument = next(key for key, value in bound.arguments.items() if value == name)
        assert argument.removesuffix("s") == name.removesuffix("s")


def test_help_lists_modes_and_flags(capsys):
    assert commands.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for name, mode in commands.MODES.items():
        assert f"  {name:9s} {mode.help}\n" in text
        for flag in mode.flags:
            assert f"  --{flag}\n" in text or f"  --[no]{flag}\n" in text


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--mode=tran"], ["unknown --mode 'tran'", "'train'"]),
        (["--chekpoint=best"], ["chekpoint", "checkpoint"]),
        (["runs"], ["unexpected argument 'runs'"]),
        (["--config=configs/shapes.py:encoder=resnet5"], ["config.model.encoder 'resnet5'", "'resnet50'"]),
        (["--config=configs/shapes.py", "--config.data.croop=3"], ["'data.croop'", "'crop'"]),
        (["--config=configs/shapes.py", "-config.data.croop", "3"], ["'data.croop'", "'crop'"]),
        (["--config=configs/shapes.py", "--config.data.crop=big"], ["config.data.crop=big"]),
        (["--config=configs/shape.py"], ["'configs/shape.py' cannot be read", "'configs/shapes.py'"]),
        (["--config=configs/arguments.py"], ["configs/arguments.py", "get_config"]),
        (["--config=configs/pascal.py", "--config.data.root=/nowhere"], ["/nowhere"]),
        (["--config=configs/custom.py"], ["configs/custom.py:root=FOLDER"]),
        (["--config=configs/shapes.py", "--mode=eval"], ["run", "no such folder"]),
        (["--config=configs/shapes.py", "--process=0"], ["need --coordinator"]),
        (["--mode=eval"], ["--mode=eval needs --config"]),
        (["--mode=predict", "--from=images"], ["--mode=predict needs --to"]),
        (["--config=configs/shapes.py", "--mode=report"], ["--mode=report takes no --config", "train"]),
        (["--config=configs/shapes.py", "--images=3"], ["--mode=train takes no --images", "report"]),
        (["--mode=report"], ["run: no such folder"]),
        (["--config="], ["config file '' cannot be read"]),
        (["--config=configs"], ["config file 'configs' cannot be read"]),
        (["--config=configs/shapes.py:crop=²"], ["crop='²' is not of type int"]),
        (["--config=configs/shapes.py:crop=" + "9" * 5000], ["crop='999", "is not of type int"]),
        (["--config=configs/shapes.py:crop=99999"], ["config.data.crop is 99999", "2048"]),
        (["--config=configs/cityscapes.py:crop=" + "9" * 400], ["config.data.crop is 999", "2048"]),
        (["--config=configs/shapes.py:\x1b[31m=1"], ["\\x1b[31m"]),
        (["--config=configs/custom.py:root=/tmp,val=a\nb"], ["val='a\\nb'", "control characters"]),
        (["--config=configs/shapes.py", "--config.seed=-1"], ["config.seed is -1", "from 0"]),
        (["--config=configs/shapes.py", "--config.data.scale=inf"], ["config.data.scale is ('inf',)"]),
        (["--config=configs/shapes.py", "--config.data.mean=0.5"], ["config.data.mean is (0.5,)", "3 values"]),
        (["--config=configs/shapes.py", "--config.data.scale=" + "(" * 500], ["config.data.scale"]),
        (["--config=configs/shapes.py", "--config.data={'crop': 3}"], ["config.data", "is missing"]),
        (["--config=configs/shapes.py", "--config.model.remat=maybe"], ["config.model.remat=maybe"]),
        (
            ["--config=configs/shapes.py", "--config.optimizer.lr_mults=('decoder/', 10)"],
            ["lr_mults is ('decoder/', 10)"],
        ),
        (["--config=configs/shapes.py", "--config.data.crop=" + "9" * 5000], ["config.data.crop=999"]),
        (["--config.data.crop=3", "--config=configs/shapes.py"], ["config.data.crop"]),
        (["--mode=eval", "--config=configs/shapes.py", "--checkpoint=²"], ["--checkpoint=²", "latest or a step"]),
        (
            ["--mode=eval", "--config=configs/shapes.py", f"--checkpoint={'1' * 5000}"],
            ["--checkpoint=111", "or a step"],
        ),
    ],
)
def test_a_mistake_ends_with_one_line(options, messages, tmp_path, capsys):
    assert commands.run([*options, f"--workdir={tmp_path / 'run'}"]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("error: ") and not printed.out, printed
    for message in messages:
        assert message in printed.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "expected a path of this machine or gs://BUCKET/..."),
        (" ", "expected a path of this machine"),
        ("http://x", "--{flag}='http://x': expected a path of this machine"),
        ("a://b", "--{flag}='a://b': expected a path of this machine"),
        ("~nobody_of_this_name/x", "there is no such user"),
    ],
)
def test_paths_that_are_none_are_refused(path, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = f"--config={ROOT / 'configs/shapes.py'}"
    for flag, options in (
        ("workdir", [config]),
        ("to", [config, "--mode=records"]),
        ("from", ["--mode=convert", "--to=x.pth"]),
        ("workdir", ["--mode=report"]),
    ):
        assert commands.run([*options, f"--{flag}={path}"]) == 1
        assert capsys.readouterr().err.startswith(f"error: --{flag}={path!r}: ")
        assert commands.run([*options, f"--{flag}={path}"]) == 1
        printed = capsys.readouterr().err
        assert message.format(flag=flag) in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_home_is_expanded_in_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert commands.run(["--mode=report", "--workdir=~/a,~/b"]) == 1
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'a'}: no such folder; expected the work directory of a training run\n"
    )


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("def get_config(:", ["SyntaxError", "line 1"]),
        ("\0\1\2", ["null bytes"]),
        (b"\xff\xfe\xfd", ["SyntaxError"]),
        ("import nowhere", [", line 1: ModuleNotFoundError"]),
        ("x = 1\ny = x / 0\n", [", line 2: ZeroDivisionError: division by zero"]),
        ("def get_config():\n    raise ValueError('a\\nb')", [", line 2: ValueError: a b"]),
        ("def get_config():\n    raise SystemExit(0)", ["SystemExit"]),
        ("def get_config():\n    open('/nowhere')", [", line 2: FileNotFoundError", "/nowhere"]),
        ("def get_config():\n    return get_config()", ["RecursionError"]),
        ("def get_config():\n    pass", ["get_config returns None; expected a ConfigDict"]),
        ("def get_config(a):\n    pass", ["TypeError", "argument"]),
        ("get_config = 3", ["TypeError"]),
        (
            "from configs import shapes\ndef get_config():\n    config = shapes.get_config()\n    config.seed = 'a'",
            [", line 4: TypeError"],
        ),
        (
            "from configs import shapes\ndef get_config():\n    config = shapes.get_config()\n"
            "    del config.data.crop\n    return config",
            ["config.data.crop is missing"],
        ),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()",
            ["config.name is missing"],
        ),
        (
            "from configs import shapes\ndef get_config():\n    config = shapes.get_config()\n"
            "    with config.ignore_type():\n        config.data.workers = {}\n    return config",
            ["config.data.workers is {}; expected an integer"],
        ),
    ],
)
def test_a_config_file_that_fails_is_named_with_its_line(text, messages, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert commands.run([f"--config={file}", f"--workdir={tmp_path / 'run'}"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    for message in messages:
        assert message in printed
    assert str(file) in printed or "missing" in printed


def test_ctrl_c_is_no_traceback_and_a_full_disk_names_the_command(monkeypatch, capsys):
    for error, message, code in (
        (KeyboardInterrupt(), "error: interrupted\n", 130),
        (OSError(28, "No \x1b[2J space"), "No \\x1b[2J space (--mode=report --workdir=/x)\n", 1),
    ):
        monkeypatch.setattr("dssn_jax.report.page.report", mock.Mock(side_effect=error))
        assert commands.run(["--mode=report", "--workdir=/x"]) == code
        assert message in capsys.readouterr().err


def run_main(*options, **variables):
    command = [sys.executable, "-X", "importtime", "main.py", *options]
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--help"], 0, "modes:"),
        (["--config=configs/shapes.py", "--config.data.croop=3"], 1, "error: unknown config key 'data.croop'"),
    ],
)
def test_help_and_typos_are_answered_without_jax(options, code, message):
    done = run_main(*options)
    assert done.returncode == code and message in done.stdout + done.stderr
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "ml_collections" in imported and not imported & {"jax", "grain", "orbax", "flax", "tensorflow", "PIL"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JAX_PLATFORMS", "gpus", "JAX found no devices (JAX_PLATFORMS=gpus): Unable to initialize backend 'gpus'"),
        ("JAX_PLATFORMS", "cuda", "JAX found no devices (JAX_PLATFORMS=cuda): "),
        ("JAX_ENABLE_X64", "maybe", "'maybe' for environment 'JAX_ENABLE_X64'"),
    ],
)
def test_devices_that_are_not_there_are_no_traceback(name, value, message, tmp_path):
    done = run_main(CONFIG, f"--workdir={tmp_path / 'run'}", **{name: value})
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and message in last
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Returns the work directory of a run of two steps over four devices."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert commands.run([CONFIG, *TINY, f"--workdir={folder}"]) == 0
    return folder


def scores(workdir):
    return json.loads((workdir / "eval_2.json").read_text())


def evaluate(workdir, *options):
    """Evaluates from the command line; returns what it wrote."""
    command = ["--mode=eval", CONFIG, *TINY, f"--workdir={workdir}", "--checkpoint=latest", *options]
    assert commands.run(command) == 0
    return scores(workdir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with the validation images of the shapes and a list of them, and no list of other images."""
    root = tmp_path_factory.mktemp("shapes")
    config = shapes.get_config()
    config.data.shapes.update({"size": 48, "unlabeled": 16, "val": 6})
    val = open_source(config, "val")
    for name in ("image", "label", "splits"):
        (root / name).mkdir()
    for index in range(len(val)):
        for name, array in val[index].items():
            Image.fromarray(array).save(root / f"{name}/{index}.png")
    (root / "splits/val.txt").write_text("".join(f"image/{i}.png label/{i}.png\n" for i in range(len(val))))
    return root


def test_train_and_eval(workdir, capsys):
    evaluated = evaluate(workdir)
    assert "error" not in capsys.readouterr().err
    summary = json.loads((workdir / "summary.json").read_text())
    for network in ("student", "teacher"):
        assert evaluated[network]["miou"] == pytest.approx(summary[network]["last"]["miou"])


@pytest.mark.slow
def test_eval_needs_only_the_list_of_validation_images(workdir, folder):
    expected = evaluate(workdir)
    source = ("--config.data.source=folder", f"--config.data.root={folder}")
    assert evaluate(workdir, *source)["teacher"] == expected["teacher"]


@pytest.mark.slow
def test_eval_and_predict_on_a_number_of_devices_that_divides_no_batch(workdir, folder, tmp_path, monkeypatch):
    """A run of batch 4 on 4 devices, used on 3."""
    expected, make_mesh = evaluate(workdir), sharding.make_mesh
    predictions = []
    for devices in (4, 3):
        monkeypatch.setattr(
            sharding, "make_mesh", lambda of=None, count=devices: make_mesh(of or jax.devices()[:count])
        )
        assert evaluate(workdir) == expected
        to = tmp_path / str(devices)
        assert commands.run(["--mode=predict", f"--workdir={workdir}", f"--from={folder / 'image'}", f"--to={to}"]) == 0
        predictions.append({path.name: np.asarray(Image.open(path)) for path in (to / "class_ids").glob("*.png")})
    np.testing.assert_equal(*predictions)
    assert len(predictions[0]) == 6


def test_predict(workdir, folder, tmp_path, capsys):
    options = ["--mode=predict", f"--workdir={workdir}", f"--from={folder / 'image/0.png'}", f"--to={tmp_path}"]
    assert commands.run([*options, "--checkpoint=latest", "--network=student", "--confidence"]) == 0
    assert "student of step 2" in capsys.readouterr().out
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert written == {"class_ids/0.png", "overlays/0.jpg", "confidence/0.png", "predictions.json"}


def test_report(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "copy")
    options = [f"--workdir={workdir},{tmp_path / 'copy'}", f"--to={tmp_path / 'page.html'}", "--images=0"]
    assert commands.run(["--mode=report", *options]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!")


def test_export(workdir, tmp_path):
    to = tmp_path / "network.stablehlo"
    assert commands.run(["--mode=export", f"--workdir={workdir}", f"--to={to}", "--size=32x48"]) == 0
    images = np.zeros((1, 32, 48, 3), np.uint8)
    class_ids, _ = jax.export.deserialize(bytearray(to.read_bytes())).call(images)
    assert class_ids.shape == (1, 32, 48)


@pytest.mark.slow
def test_convert_to_a_file_and_back(workdir, tmp_path):
    for network in ("student", "teacher"):
        options = [f"--from={workdir}", f"--to={tmp_path / network}.safetensors", f"--network={network}"]
        assert commands.run(["--mode=convert", "--checkpoint=latest", *options]) == 0
    options = [f"--from={tmp_path / 'student.safetensors'}", f"--teacher={tmp_path / 'teacher.safetensors'}"]
    assert commands.run(["--mode=convert", CONFIG, *TINY, *options, f"--to={tmp_path / 'run'}"]) == 0
    command = ["--mode=eval", CONFIG, *TINY, f"--workdir={tmp_path / 'run'}", "--checkpoint=latest"]
    assert commands.run(command) == 0
    (written,) = (tmp_path / "run").glob("eval_*.json")
    expected = evaluate(workdir)
    assert {name: json.loads(written.read_text())[name] for name in ("student", "teacher")} == {
        name: expected[name] for name in ("student", "teacher")
    }


@pytest.fixture
def own_images(tmp_path):
    """Returns a folder of eight images with masks of two classes."""
    root = tmp_path / "mine"
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("ground\nwater\n")
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(root / f"images/{i}.png")
        Image.fromarray(rng.integers(0, 2, (40, 48), np.uint8)).save(root / f"masks/{i}.png")
    return root


def test_check(own_images, tmp_path, capsys):
    options = ["--mode=check", f"--config=configs/custom.py:root={own_images}", f"--to={tmp_path / 'check.json'}"]
    assert commands.run(options) == 0
    assert json.loads((tmp_path / "check.json").read_text())["to_fix"] == 0
    Image.fromarray(np.full((40, 48), 7, np.uint8)).save(own_images / "masks/3.png")
    assert commands.run(options) == 1
    printed = capsys.readouterr()
    assert "masks/3.png" in printed.out and "1 to fix" in printed.err


def test_split_and_records(own_images, tmp_path):
    config = f"--config=configs/custom.py:root={own_images}"
    assert commands.run(["--mode=split", config, "--subsets=2,4", "--nostratify"]) == 0
    lists = {size: (own_images / f"splits/{size}/labeled.txt").read_text().splitlines() for size in (2, 4)}
    assert [len(lines) for lines in lists.values()] == [2, 4] and set(lists[2]) < set(lists[4])
    assert commands.run(["--mode=records", f"{config},split=2", f"--to={tmp_path / 'packed'}"]) == 0
    assert (tmp_path / "packed/index.json").is_file()
    command = ["--mode=check", f"{config},split=2", "--config.data.source=array_record"]
    assert commands.run([*command, f"--config.data.root={tmp_path / 'packed'}"]) == 0


def test_lists_of_a_published_data_set(own_images, tmp_path, capsys):
    """The config argument and the key that the log names choose lists of one's own."""
    lines = [f"images/{i}.png masks/{i}.png\n" for i in range(8)]
    for name, chosen in (("1_8/labeled", lines[:4]), ("1_8/unlabeled", lines[4:6]), ("val", lines[6:])):
        path = own_images / f"splits/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(chosen))
    options = [f"--config.data.root={own_images}", f"--to={tmp_path / 'lists'}"]
    assert commands.run(["--mode=split", "--config=configs/camvid.py", "--subsets=2", *options]) == 0
    *_, argument, _, key = capsys.readouterr().out.split()
    assert (argument, key) == ("split=2", f"--config.data.splits={tmp_path / 'lists'}")
    assert commands.run(["--mode=check", f"--config=configs/camvid.py:{argument}", key, options[0]]) == 0
