"""`--mode=convert`: whole checkpoints in, trained work directories out; what cannot be converted leaves nothing."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from configs.checks import ConfigError

from configs import cityscapes
from dssn_jax import sharding
from dssn_jax.evaluation import evaluate, scores
from dssn_jax.learner import learner as experiment
from dssn_jax.training import loop as train
from dssn_jax.weights import convert, pretrained
from dssn_jax.weights import files as state_dict_files
from dssn_jax.weights import names as state_dicts
from dssn_jax.weights.files import StateDictError
from dssn_jax.workdir import checkpoint
from tests import golden
from tests.conftest import ONE_DEVICE
from tests.test_pretrained import backbone_tensors, network_tensors

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = pathlib.Path(__file__).parent / "data" / "golden"
RUNS_CODE = b"cposix\nsystem\n(S'exit'\ntR."  # A pickle that calls os.system("exit").


def restored(workdir, config, which="best"):
    """The state in a work directory, as `--mode=eval` restores it."""
    saved = checkpoint.Checkpointer(workdir, read_only=True)
    state, _ = saved.restore(saved.resolve(which), experiment.abstract_state(config, sharding.make_mesh()), config)
    saved.close()
    return jax.device_get(state)


def run_main(*options, **environment):
    return subprocess.run(
        [sys.executable, "main.py", "--mode=convert", *options], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "XLA_FLAGS": ONE_DEVICE, **environment},
    )  # fmt: skip


@pytest.fixture
def golden_case():
    """The golden evaluation."""
    manifest = json.loads((FOLDER / "golden.json").read_text())
    return golden.Case(FOLDER, manifest, next(case for case in manifest["cases"] if case["kind"] == "evaluate"))


def test_a_checkpoint_of_the_original_evaluates_to_its_iou_and_goes_back(golden_case, tmp_path):
    """The command converts a checkpoint in the original's form; its work directory has the golden IoU and tensors."""
    torch = pytest.importorskip("torch")
    from tests.reference import torch_twin

    backbone, classes = golden_case.entry["backbone"], golden_case.entry["num_classes"]
    with torch.device("meta"):
        twin = torch_twin.DeepLabV3Plus(backbone, classes)
    tensors = {
        name: torch.from_numpy(golden.weight(golden_case.seed, name, tuple(value.shape)))
        for name, value in twin.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    tensors |= {name: torch.tensor(7) for name in twin.state_dict() if name not in tensors}
    content = {"model": {f"module.{name}": value for name, value in tensors.items()}, "epoch": 239}
    content |= {"optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}, "previous_best": np.float64(79.5)}
    torch.save(content, tmp_path / "best.pth")
    arguments = f"backbone={backbone},method=unimatch"
    options = ("--config.model.dtype=float64", "--config.model.param_dtype=float64")
    done = run_main(
        f"--config=configs/cityscapes.py:{arguments}", f"--from={tmp_path}/best.pth", f"--to={tmp_path}/run", *options,
        JAX_ENABLE_X64="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(whole network, epoch 239, previous_best 79.5)" in done.stdout and "0 missing" in done.stdout

    with jax.enable_x64(True):
        config = cityscapes.get_config(arguments)
        config.model.update({"dtype": "float64", "param_dtype": "float64"})
        student = restored(tmp_path / "run", config).student
        found = golden.evaluation(golden_case, student)
        for name in ("iou_original", "iou_sliding"):
            assert golden.relative_error(found[name], golden_case.stored[name]) <= 1e-9
        convert.convert(str(tmp_path / "run"), str(tmp_path / "back.pth"))
    with pytest.raises(ConfigError, match="float64 needs the environment variable JAX_ENABLE_X64=1"):
        convert.convert(str(tmp_path / "run"), str(tmp_path / "again.pth"))
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    twin.load_state_dict(back, strict=True, assign=True)
    for name, value in tensors.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(back[name], value.double()), name


@pytest.fixture
def checkpoints(tiny_config, tmp_path):
    """Files of a student and of a teacher for `tiny_config`: (path, tensors) of each."""
    student = network_tensors(tiny_config())
    teacher = {name: value + np.float32(0.5) for name, value in student.items()}
    files = []
    for name, tensors in (("best", student), ("t_best", teacher)):
        files.append((tmp_path / f"{name}.safetensors", tensors))
        state_dict_files.write(files[-1][0], state_dicts.with_counters(tensors), {})
    return files


def test_student_and_teacher_are_evaluated_trained_on_and_exported(tiny_config, checkpoints, monkeypatch, tmp_path):
    (student_file, student), (teacher_file, teacher) = checkpoints
    config, run = tiny_config("dssn"), tmp_path / "run"
    convert.convert(str(student_file), str(run), config, teacher=str(teacher_file))
    state = restored(run, config)
    assert int(state.step) == 0
    for variables, tensors in ((state.student, student), (state.teacher, teacher)):
        jax.tree.map(np.testing.assert_array_equal, state_dicts.to_state_dict(variables), tensors)

    parts = experiment.build(config)
    like = parts.abstract_state().student
    networks = {
        "student": state_dicts.from_state_dict(student, like), "teacher": state_dicts.from_state_dict(teacher, like)
    }  # fmt: skip
    evaluator = evaluate.Evaluator(parts.model, config, parts.mesh)
    confusions = evaluator(networks, evaluator.groups(parts.sources.val))
    found = evaluate.evaluate(config, run, "best")
    assert found == {name: scores.of_confusion(counts, config.data.classes) for name, counts in confusions.items()}
    assert found["student"] != found["teacher"]

    weights = pretrained.read(run)  # As `model.pretrained` of another run.
    assert weights.whole and weights.notes == {"step": 0}
    jax.tree.map(np.testing.assert_array_equal, weights.tensors, student)
    for network, tensors in (("student", student), ("teacher", teacher)):
        convert.convert(str(run), str(tmp_path / f"{network}.safetensors"), network=network)
        back = safetensors.numpy.load_file(tmp_path / f"{network}.safetensors")
        jax.tree.map(np.testing.assert_array_equal, back, state_dicts.with_counters(tensors))

    started = []
    monkeypatch.setattr(train.Trainer, "run", lambda trainer: started.append(jax.device_get(trainer.state)))
    train.train(config, run)
    jax.tree.map(np.testing.assert_array_equal, started[0], state)
    assert f"continuing from step 0 of {run}" in (run / "log.txt").read_text()
    with pytest.raises(StateDictError, match="exists already"):
        convert.convert(str(student_file), str(run), config)


def test_checkpoints_from_before_stems_could_be_chosen(tiny_config, checkpoints, tmp_path):
    convert.convert(str(checkpoints[0][0]), str(tmp_path / "run"), tiny_config())
    path = tmp_path / "run/checkpoints/0/meta/metadata"
    meta = json.loads(path.read_text())
    for key in ("stem", "shortcut", "pretrained"):
        del meta["config"]["model"][key]
    path.write_text(json.dumps(meta))
    assert int(restored(tmp_path / "run", tiny_config()).step) == 0
    with pytest.raises(checkpoint.CheckpointError, match="stem is 'deep' there, '7x7' in the config"):
        restored(tmp_path / "run", tiny_config(model__stem="7x7"))


def test_backbones_are_converted_and_taken_from_whole_networks(tiny_config, checkpoints, tmp_path):
    """From the tensors alone: no configuration says which network they are of."""
    tensors = backbone_tensors(tiny_config())
    state_dict_files.write(tmp_path / "resnet10.safetensors", tensors, {"mean": "0.5 0.5 0.5", "std": "0.5 0.5 0.5"})
    convert.convert(str(tmp_path / "resnet10.safetensors"), str(tmp_path / "new/a.safetensors"))
    convert.convert(str(checkpoints[0][0]), str(tmp_path / "b.safetensors"), part="backbone")
    expected = state_dicts.with_counters({name: value for name, value in tensors.items() if not name.startswith("fc.")})
    for path in ("new/a.safetensors", "b.safetensors"):
        found, notes = state_dict_files.read(tmp_path / path)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert notes["mean"] == ("0.5 0.5 0.5" if path.startswith("new") else "0.485 0.456 0.406")


def test_the_teacher_is_a_copy_of_the_student_unless_given(tiny_config, checkpoints, tmp_path):
    (student_file, student), (teacher_file, _) = checkpoints
    convert.convert(str(student_file), str(tmp_path / "run"), tiny_config("dssn"))
    teacher = state_dicts.to_state_dict(restored(tmp_path / "run", tiny_config("dssn")).teacher)
    jax.tree.map(np.testing.assert_array_equal, teacher, student)
    convert.convert(str(student_file), str(tmp_path / "a"), tiny_config("unimatch"))
    with pytest.raises(StateDictError, match="the run has no teacher; it has student"):
        convert.convert(str(tmp_path / "a"), str(tmp_path / "c.safetensors"), network="teacher")
    with pytest.raises(ConfigError, match="the method 'unimatch' has no teacher"):
        convert.convert(str(student_file), str(tmp_path / "b"), tiny_config("unimatch"), teacher=str(teacher_file))


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("run", {}, "needs --config"),
        ("out.safetensors", {"network": "teacher"}, "holds one network"),
        ("out.safetensors", {"teacher": "t_best.safetensors"}, "--teacher is for converting to a work directory"),
        ("run", {"part": "backbone"}, "--part=backbone is for converting to a file"),
    ],
)
def test_flags_that_do_not_go_together(checkpoints, target, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        convert.convert(str(checkpoints[0][0]), str(tmp_path / target), **options)
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize(
    ("spoil", "target", "options", "message"),
    [
        (
            None,
            "run",
            {"data__classes": ("a", "b", "c")},
            r"classifier.weight has shape \(6, 16.*6 classes, the config 3",
        ),
        (None, "out.safetensors", {"data__classes": ("a", "b")}, "it has 6 classes, the config 2.*--part=backbone"),
        ("head.b4.gap.2.running_var", "run", {}, r"missing head.b4.gap.2.running_var \(16,\)"),
        ("backbone.bn1.bias", "out.safetensors", {}, r"missing backbone.bn1.bias \(32,\)"),
        (None, "run.npz", {}, "run.npz: expected .pth, .pt, .safetensors or"),
        (None, "best.safetensors", {}, "exists already"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(tiny_config, checkpoints, spoil, target, options, message, tmp_path):
    path, tensors = checkpoints[0]
    if spoil:
        state_dict_files.write(path, {name: value for name, value in tensors.items() if name != spoil}, {})
    before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(StateDictError, match=message):
        convert.convert(str(path), str(tmp_path / target), tiny_config(**options))
    assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_write_that_fails_leaves_nothing(tiny_config, checkpoints, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint.Checkpointer, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StateDictError, match="run: cannot be written: disk full"):
        convert.convert(str(checkpoints[0][0]), str(tmp_path / "run"), tiny_config())
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"not weights\n", ["--to=new.pth"], "weights.pth: not a file of PyTorch weights, or damaged or cut short"),
        (RUNS_CODE, ["--to=new", "--config=configs/pascal.py"], "weights.pth: refused, nothing was run"),
        (b"", [], "--mode=convert needs --to"),
    ],
)
def test_mistakes_end_with_one_line(content, options, message, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "weights.pth").write_bytes(content)
    options = [option.replace("--to=", f"--to={tmp_path}/") for option in options]
    done = run_main(f"--from={tmp_path}/weights.pth", *options)
    assert done.returncode != 0 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1 and message in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pth"]
