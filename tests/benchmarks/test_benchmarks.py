"""Every script of benchmarks and experiments parses its arguments, and the benchmarks run at a toy size."""

import importlib
import pathlib

import jax
import pytest

from benchmarks import augment, convert_memory, eval_sizes, hlo, memory, precision, records, saving, step, train_step
from benchmarks import input as input_benchmark
from configs import pascal
from dssn_jax import commands
from input_pipeline.pipeline import train_dataset
from input_pipeline.sources.open import open_sources
from input_pipeline.sources.shapes import ShapesSource
from tests.weights import tensors

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(
    f"{folder}.{file.stem}"
    for folder in ("benchmarks", "experiments")
    for file in (ROOT / folder).glob("*.py")
    if "\ndef main(" in file.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_describe_their_arguments(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert not stopped.value.code and module.__doc__.splitlines()[0] in capsys.readouterr().out


def test_views_are_timed():
    images = ShapesSource(33, 4, 0, part="train", labeled=False)[0]["image"][None]
    rows = [
        augment.measure_operation("solarize", images, 0.01),
        augment.measure_views("view", pascal.get_config().views, images, 0.01),
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["pillow_ms"] / row["device_ms"]) and row["device_ms"] > 0


@pytest.mark.slow
def test_padding_and_single_images_count_the_same_pixels(monkeypatch, capsys):
    arguments = "--images=5 --sizes=3 --smallest=32 --largest=36 --encoder=resnet10w16 --batch=4"
    monkeypatch.setattr("sys.argv", ["eval_sizes", *arguments.split()])
    assert eval_sizes.main() == 0
    assert "times the time without padding" in capsys.readouterr().out


@pytest.mark.slow
def test_input_pipelines_are_timed(monkeypatch):
    monkeypatch.setattr(input_benchmark, "IMAGES", 8)
    rows = input_benchmark.measure("voc 500x375", 0.1, [1])
    assert [row["loader"] for row in rows] == ["Pillow", "ours"] and all(row["crops/s"] > 0 for row in rows)


def test_packing_is_timed(tmp_path):
    rows = records.measure(tmp_path, 8, 1 << 20)
    assert len(rows) == 8 and all(row["seconds"] > 0 for row in rows)
    assert (tmp_path / "packed" / "index.json").exists()


def test_saving_is_timed(tiny_config, tmp_path):
    row = saving.measure(tiny_config("supervised"), 2, tmp_path)
    assert 0 < row["of which checksums s"] < row["later waits s"] < row["until complete s"]
    assert row["devices"] == jax.device_count() and row["first wait s"] > 0


@pytest.mark.slow
def test_memory_is_planned():
    small, large = (memory.planned("resnet10w16", batch, 33) for batch in (1, 2))
    assert 0 < small["temporary"] < large["temporary"]
    assert large["arguments"] > 3 * 4 * 1e6  # Parameters of student and teacher, and the momentum.


def test_the_forms_of_the_step_are_configurations():
    for keys in precision.FORMS.values():
        commands.parse(["--mode=check", "--config=configs/shapes.py", *(f"--config.{k}={v}" for k, v in keys.items())])
    for recipe, form, batch in step.SMALL_ROWS:
        config = step.configure(recipe, step.SMALL_CROP, batch, step.OURS.get(form, {}))
        assert config.data.crop == step.SMALL_CROP and config.data.labeled_batch == batch


@pytest.mark.parametrize(("partner", "classes"), [("other", 0), ("reversed", 0), ("labeled", 0), ("labeled", 2)])
def test_batches_have_the_form_of_the_pipeline(partner, classes, tiny_config):
    config = tiny_config("dssn", views__mix_partner=partner, views__paste_classes=classes)
    expected, batch = train_dataset(open_sources(config), config)[0], train_step.random_batch(config)
    forms = [jax.tree.map(lambda array: (array.shape, array.dtype), each) for each in (expected, batch)]
    assert forms[0] == forms[1]


@pytest.mark.slow
def test_our_step_is_timed(tiny_config):
    row = step.measure_jax(tiny_config("supervised"), 0.01)
    assert row["ms"] > 0 and row["first_s"] > row["ms"] / 1000
    assert row["flop"] > 1e8 and row["ceiling"] > 0 and row["bytes"] > row["argument_bytes"]


@pytest.mark.slow
def test_the_step_of_pytorch_is_timed(tiny_config, monkeypatch):
    pytest.importorskip("torch")
    tensors.register_bottleneck(monkeypatch)
    config = tiny_config(model__encoder=tensors.BOTTLENECK, data__labeled_batch=2, data__unlabeled_batch=2)
    assert step.measure_torch(config, "published", 0.01)["ms"] > 0


@pytest.mark.slow
def test_gradients_are_reduced_once_per_step_in_the_compiled_program(tiny_config):
    config = tiny_config("dssn")
    compiled = train_step.lower(config, jax.devices()).compile()
    reduced = [each.instruction for each in hlo.Program(compiled.as_text()).steps()]
    reduced = [each for each in reduced if each.opcode in hlo.COLLECTIVES]
    learner = train_step.build(config, jax.devices())
    kernels = [leaf for leaf in jax.tree.leaves(learner.abstract_state().student["params"]) if leaf.ndim == 4]
    backward = [each for each in reduced if "transpose(" in each.op_name]
    operations = ("/conv_general_dilated", "/dot_general")  # Some convolutions are products on a CPU.
    gradients = sum(each.bytes for each in backward if any(name in each.op_name for name in operations))
    assert 1 <= gradients / (4 * sum(leaf.size for leaf in kernels)) < 1.5  # Some are combined with statistics.
    assert {each.opcode for each in reduced} <= {"all-reduce", "all-gather"}


@pytest.mark.slow
def test_conversions_are_measured(monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr("sys.argv", ["convert_memory", "--encoder=resnet50"])
    convert_memory.main()
    assert capsys.readouterr().out.count("->") == 4
