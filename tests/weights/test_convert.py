"""`--mode=convert`: PyTorch checkpoints in, trained work directories out; what cannot be converted leaves nothing."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs.checks import ConfigError
from dssn_jax import commands
from dssn_jax.evaluation import evaluate, metrics
from dssn_jax.learner import learner as learner_lib
from dssn_jax.training import loop
from dssn_jax.weights import convert, files, names, pretrained
from dssn_jax.weights.files import StateDictError
from dssn_jax.workdir.checkpoint import Checkpointer
from dssn_jax.workdir.restore import restore
from input_pipeline.sources.open import open_source
from tests.weights import tensors as made
from tests.weights.tensors import encoder_tensors, network_tensors

RUNS_CODE = b"cposix\nsystem\n(S'exit'\ntR."  # A pickle that calls os.system("exit").


def test_a_checkpoint_of_the_original_has_pytorchs_logits_and_goes_back(monkeypatch, capsys, tmp_path):
    """The command converts a checkpoint in the original's form to a work directory, and that to the same tensors."""
    torch = pytest.importorskip("torch")
    from tests.reference import torch_twin

    made.register_bottleneck(monkeypatch)
    twin = torch_twin.DeepLabV3Plus(made.BOTTLENECK, 19)
    tensors = {name: torch.from_numpy(value) for name, value in made.made_up_like(twin).items()}
    twin.load_state_dict(tensors, strict=False)
    content = {"model": {f"module.{name}": value for name, value in twin.state_dict().items()}, "epoch": 239}
    content |= {"optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}, "previous_best": np.float64(79.5)}
    torch.save(content, tmp_path / "best.pth")

    image = np.random.default_rng(0).normal(size=(1, 65, 49, 3))
    with torch.no_grad():
        expected = twin.double().eval()(torch.from_numpy(image).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    with jax.enable_x64(True):
        arguments = [f"--config=configs/cityscapes.py:encoder={made.BOTTLENECK},method=unimatch", "--mode=convert"]
        arguments += ["--config.model.dtype=float64", "--config.model.param_dtype=float64"]
        assert commands.run([*arguments, f"--from={tmp_path}/best.pth", f"--to={tmp_path}/run"]) == 0
        log = capsys.readouterr().out
        assert "(full network, epoch 239, previous_best 79.5)" in log and "0 missing" in log
        restored = restore(tmp_path / "run")
        logits = jax.jit(restored.learner.network.apply)(restored.networks["student"], image)
        assert np.abs(logits - expected).max() <= 1e-9 * np.abs(expected).max()
        convert.convert(str(tmp_path / "run"), str(tmp_path / "back.pth"))
    with pytest.raises(ConfigError, match="float64 needs the environment variable JAX_ENABLE_X64=1"):
        convert.convert(str(tmp_path / "run"), str(tmp_path / "again.pth"))
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    twin.load_state_dict(back, strict=True)
    for name, value in tensors.items():
        assert torch.equal(back[name], value.double()), name


@pytest.fixture
def checkpoints(tiny_config, tmp_path):
    """Files of a student and of a teacher for `tiny_config`: (path, tensors) of each."""
    student = network_tensors(tiny_config())
    teacher = {name: value + np.float32(0.5) for name, value in student.items()}
    written = []
    for name, tensors in (("best", student), ("t_best", teacher)):
        written.append((tmp_path / f"{name}.safetensors", tensors))
        files.write(written[-1][0], names.with_counters(tensors), {})
    return written


def assert_networks(workdir, **expected):
    """Compares the networks in a work directory with tensors, by name."""
    networks = restore(workdir).networks
    assert networks.keys() == expected.keys()
    for name, tensors in expected.items():
        jax.tree.map(np.testing.assert_array_equal, names.to_state_dict(networks[name]), tensors)


@pytest.mark.slow
def test_student_and_teacher_are_exported_and_continued(tiny_config, checkpoints, monkeypatch, tmp_path):
    (student_file, student), (teacher_file, teacher) = checkpoints
    config, run = tiny_config("dssn"), tmp_path / "run"
    convert.convert(str(student_file), str(run), config=config, teacher=str(teacher_file))
    assert_networks(run, student=student, teacher=teacher)
    weights = pretrained.read(run)  # As `model.pretrained` of another run.
    assert weights.is_full_network and weights.metadata == {"step": 0}
    jax.tree.map(np.testing.assert_array_equal, weights.tensors, student)
    for network, tensors in (("student", student), ("teacher", teacher)):
        convert.convert(str(run), str(tmp_path / f"{network}.safetensors"), network=network)
        back = safetensors.numpy.load_file(tmp_path / f"{network}.safetensors")
        jax.tree.map(np.testing.assert_array_equal, back, names.with_counters(tensors))

    started = []
    monkeypatch.setattr(loop.Trainer, "train", lambda trainer: started.append(jax.device_get(trainer.state)))
    written = (run / "config.json").read_text()
    loop.train(config, run)
    like = learner_lib.build(config).init_state(
        weights=names.from_state_dict(student, restore(run).networks["student"])
    )
    expected = like.replace(teacher=names.from_state_dict(teacher, like.teacher))
    jax.tree.map(np.testing.assert_array_equal, started[0], jax.device_get(expected))
    assert f"continuing from step 0 of {run}" in (run / "log.txt").read_text()
    assert (run / "config.json").read_text() == written
    with pytest.raises(StateDictError, match="exists already"):
        convert.convert(str(student_file), str(run), config=config)


@pytest.mark.slow
def test_a_converted_work_directory_is_evaluated(tiny_config, checkpoints, tmp_path):
    (student_file, _), (teacher_file, _) = checkpoints
    config = tiny_config("dssn")
    convert.convert(str(student_file), str(tmp_path / "run"), config=config, teacher=str(teacher_file))
    scores = evaluate.evaluate(tmp_path / "run", config=config)
    restored, source = restore(tmp_path / "run"), open_source(config, "val")
    images, labels = (np.stack([source[i][key] for i in range(len(source))]) for key in ("image", "label"))
    for name, variables in restored.networks.items():
        logits = restored.learner.network.apply(variables, restored.learner.normalize(images))
        confusion = metrics.confusion_matrix(logits.argmax(-1), labels, len(config.data.classes))
        expected = metrics.scores_of(confusion, config.data.classes)
        assert scores[name]["iou"] == pytest.approx(expected["iou"], abs=0.1)  # A few pixels may have ties.
    assert scores["student"] != scores["teacher"]


@pytest.mark.slow
def test_frozen_parameters_are_the_students(tiny_config, checkpoints, tmp_path):
    (student_file, student), (teacher_file, teacher) = checkpoints
    config = tiny_config("dssn", optimizer__freeze="encoder/")
    convert.convert(str(student_file), str(tmp_path / "run"), config=config, teacher=str(teacher_file))
    frozen = {name for name in student if name.startswith("backbone.") and "running" not in name}
    expected = {name: student[name] if name in frozen else value for name, value in teacher.items()}
    assert_networks(tmp_path / "run", student=student, teacher=expected)


def test_encoders_are_converted_and_taken_from_full_networks(tiny_config, checkpoints, tmp_path):
    """From the tensors alone: no configuration defines the network."""
    tensors = encoder_tensors(tiny_config())
    files.write(tmp_path / "resnet10.safetensors", tensors, {"mean": "0.5 0.5 0.5", "std": "0.5 0.5 0.5"})
    convert.convert(str(tmp_path / "resnet10.safetensors"), str(tmp_path / "new/a.safetensors"))
    convert.convert(str(checkpoints[0][0]), str(tmp_path / "b.safetensors"), part="encoder")
    expected = names.with_counters({name: value for name, value in tensors.items() if not name.startswith("fc.")})
    for path, mean in (("new/a.safetensors", "0.5 0.5 0.5"), ("b.safetensors", "0.485 0.456 0.406")):
        written, metadata = files.read(tmp_path / path)
        jax.tree.map(np.testing.assert_array_equal, written, expected)
        assert metadata["mean"] == mean


@pytest.mark.slow
def test_the_teacher_is_a_copy_of_the_student_unless_given(tiny_config, checkpoints, tmp_path):
    (student_file, student), (teacher_file, _) = checkpoints
    convert.convert(str(student_file), str(tmp_path / "run"), config=tiny_config("dssn"))
    assert_networks(tmp_path / "run", student=student, teacher=student)
    config = tiny_config("unimatch")
    convert.convert(str(student_file), str(tmp_path / "a"), config=config)
    with pytest.raises(StateDictError, match="the run has no teacher; it has student"):
        convert.convert(str(tmp_path / "a"), str(tmp_path / "c.safetensors"), network="teacher")
    with pytest.raises(ConfigError, match="the method 'unimatch' has no EMA teacher"):
        convert.convert(str(student_file), str(tmp_path / "b"), config=config, teacher=str(teacher_file))


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("run", {}, "needs --config"),
        ("out.safetensors", {"teacher": "t_best.safetensors"}, "--teacher is for converting to a work directory"),
        ("run", {"part": "encoder"}, "--part=encoder is for converting to a file"),
        ("out.safetensors", {"part": "decoder"}, "unknown part 'decoder'"),
    ],
)
def test_options_that_do_not_go_together(checkpoints, target, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        convert.convert(str(checkpoints[0][0]), str(tmp_path / target), **options)
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize(
    ("removed", "target", "options", "message"),
    [
        (
            None,
            "run",
            {"data__classes": ("a", "b", "c")},
            r"classifier.weight has shape \(6, 16.*6 classes, the config 3",
        ),
        (None, "out.safetensors", {"data__classes": ("a", "b")}, "it has 6 classes, the config 2.*--part=encoder"),
        ("head.b2.gap.2.running_var", "run", {}, r"missing head.b2.gap.2.running_var \(16,\)"),
        ("backbone.bn1.bias", "out.safetensors", {}, r"missing backbone.bn1.bias \(32,\)"),
        (None, "run.npz", {}, "run.npz: expected .pth, .pt, .safetensors or"),
        (None, "best.safetensors", {}, "exists already"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(tiny_config, checkpoints, removed, target, options, message, tmp_path):
    path, tensors = checkpoints[0]
    if removed:
        files.write(path, {name: value for name, value in tensors.items() if name != removed}, {})
    before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(StateDictError, match=message):
        convert.convert(str(path), str(tmp_path / target), config=tiny_config(**options))
    assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_an_encoder_alone_is_no_work_directory(tiny_config, tmp_path):
    path, config = tmp_path / "encoder.safetensors", tiny_config()
    files.write(path, encoder_tensors(config), {})
    with pytest.raises(StateDictError, match="an encoder alone; .*--config.model.pretrained="):
        convert.convert(str(path), str(tmp_path / "run"), config=config)


@pytest.mark.slow
def test_tensors_of_an_unknown_network_need_a_config(tmp_path):
    files.write(tmp_path / "a.safetensors", {"vit.weight": np.zeros((3, 3), np.float32)}, {})
    with pytest.raises(StateDictError, match="fit no known encoder; --config"):
        convert.convert(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))


def test_a_file_of_one_network_has_no_teacher(checkpoints, tmp_path):
    with pytest.raises(StateDictError, match="best.safetensors: the file has no teacher; it has student"):
        convert.convert(str(checkpoints[0][0]), str(tmp_path / "out.safetensors"), network="teacher")


def test_a_write_that_fails_leaves_nothing(tiny_config, checkpoints, monkeypatch, tmp_path):
    monkeypatch.setattr(Checkpointer, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StateDictError, match="run: cannot be written: disk full"):
        convert.convert(str(checkpoints[0][0]), str(tmp_path / "run"), config=tiny_config())
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"not weights\n", ["--to=new.pth"], "weights.pth: not a file of PyTorch weights, or damaged or cut short"),
        (RUNS_CODE, ["--to=new", "--config=configs/pascal.py"], "weights.pth: refused, nothing was run"),
    ],
)
def test_mistakes_end_with_one_line(content, options, message, capsys, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "weights.pth").write_bytes(content)
    options = [option.replace("--to=", f"--to={tmp_path}/") for option in options]
    assert commands.run(["--mode=convert", f"--from={tmp_path}/weights.pth", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pth"]


def test_folders_of_the_user_stay(tiny_config, checkpoints, tmp_path):
    """The temporary folder is a new one."""
    own = tmp_path / ".run.part"
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    convert.convert(str(checkpoints[0][0]), str(tmp_path / "run"), config=tiny_config())
    assert (own / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {".run.part", "run", "best.safetensors", "t_best.safetensors"}
