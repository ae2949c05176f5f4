"""The description of compiled steps: its numbers add up, and parts are those of the real step."""

import json

import jax
import pytest

from benchmarks import compiled, hlo, scaling
from dssn_jax.learner.learner import Learner
from dssn_jax.learner.step import TrainStep
from dssn_jax.methods import objective, strong_augment
from tests.benchmarks.test_hlo import GPU
from tests.benchmarks.test_scaling import NETWORK

# Sizes of the step that the last test compiles for four devices with jax 0.10.2. A change that needs more says why.
BOUNDS = {"gigabytes_moved": 0.1, "launches": 2760, "all-reduces": 49, "reduced megabytes": 1.77}
GROWTH = 1.05  # For other releases of the compiler.
TARGETS = sorted(file.stem for file in compiled.TARGETS.glob("*.json"))


@pytest.mark.parametrize("name", TARGETS)
def test_targets_name_their_sources(name):
    target = compiled.read_target(name)
    assert target.platform in ("cuda", "tpu", "cpu") and target.bytes_source and target.flop_source
    assert {"bfloat16", "tf32", "float32"} <= {*target.flop_per_second}
    if target.platform == "cuda":
        description = (compiled.TARGETS / target.description).read_text()
        assert f"device_memory_size: {target.memory_bytes}\n" in description
        bandwidth = int(description.split("memory_bandwidth: ")[1].split()[0])
        assert bandwidth == pytest.approx(target.bytes_per_second, rel=0.01)


def test_functions_of_parts_exist():
    known = {
        function.__qualname__
        for owner in (Learner, TrainStep)
        for function in vars(owner).values()
        if callable(function)
    }
    for module in (objective, strong_augment):
        known |= {value.__name__ for value in vars(module).values() if callable(value) and hasattr(value, "__name__")}
    known |= {f"Objective.{name}" for name in vars(objective.Objective)}
    assert {name for _, names in compiled.PARTS for name in names} <= known


@pytest.mark.parametrize(
    ("op_name", "function", "part"),
    [
        ("jit(train_step)/jvp(Network.encode)/encoder/conv1", "Objective.student_logits", "forward"),
        ("jit(train_step)/transpose(jvp(Network.encode))/encoder/conv1", "Objective.student_logits", "backward"),
        ("jit(train_step)/cond/branch_0_fun/Network.low_res_logits/encoder", "Objective.teacher_logits", "teacher"),
        ("jit(train_step)/transpose(jvp(jvp()))/checkpoint", "loss_terms", "loss, backward"),
        ("jit(train_step)/mul", "TrainStep._update", "update"),
        ("jit(train_step)/transpose(jvp(Network.decode))/decoder", "", "backward"),
        ("jit(train_step)/jvp(Hh,bhwc->bHwc)/dot_general", "", "loss"),
        ("", "", "other"),
    ],
)
def test_parts_follow_the_functions_of_the_step(op_name, function, part):
    frames = [hlo.Frame("/repository/dssn_jax/step.py", 1, function)] if function else []
    assert compiled.part(op_name, frames) == part


def test_totals_are_sums_of_launches():
    target = compiled.read_target("h100")
    program = hlo.Program(GPU)
    launched = compiled.kernels(program, target)
    result = compiled.summary(launched)
    assert result["launches"] == 7 + 3 + 1  # The branch of a true condition is left out.
    convolution = 2 * 2 * 9 * 9 * 4 + 2 * 6 * 3 * 3 * 4 + 2 * 2 * 5 * 5 * 6
    assert sum(each.bytes for each in launched if each.kind == "convolution") == 3 * convolution
    for table in ("kinds", "parts"):
        assert sum(row["launches"] for row in result[table]) == result["launches"]
    slowest = max(launched, key=lambda each: each.seconds)
    assert slowest.seconds == slowest.bytes / target.bytes_per_second
    assert [tuple(row.values()) for row in compiled.collectives(program, 4)] == [
        ("all-reduce", "f32", 0, 1, 32e-6, 1, 32e-6), ("reduce-scatter", "f32", 0, 1, 8e-6, 0, 0)
    ]  # fmt: skip


@pytest.mark.slow
def test_the_step_is_described_and_compared(tmp_path, monkeypatch, capsys):
    file = tmp_path / "step.json"
    keys = ("data.crop=33", "data.labeled_batch=4", "data.unlabeled_batch=4", "model.encoder=resnet10w16")
    settings = ["--config=configs/shapes.py:method=dssn", *(f"--config.{key}" for key in keys)]
    command = ["compiled", "--target=cpu", f"--topology={jax.device_count()}", f"--json={file}", *settings]
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # The tests have set their devices.
    monkeypatch.setattr("sys.argv", command)
    compiled.main()
    result = json.loads(file.read_text())
    parts = {row["part"]: row for row in result["parts"]}
    assert {"views", "teacher", "forward", "backward", "loss", "loss, backward", "update"} <= {*parts}
    assert parts.get("other", {"gigabytes": 0})["gigabytes"] < 0.1 * result["gigabytes_moved"]
    # XLA's count before optimization has the loops' bodies once and elementwise work too.
    assert result["tflop"] == pytest.approx(result["compiler_tflop"], rel=0.5)
    assert {row["kind"] for row in result["collectives"]} == {"all-reduce"}
    assert (result["devices"], result["images_per_device"]) == (jax.device_count(), 8 / jax.device_count())
    assert scaling.estimate(scaling.read(file), NETWORK, 64)["MB"] < GROWTH * BOUNDS["reduced megabytes"]
    reduced = {"all-reduces": "count", "reduced megabytes": "MB"}
    sizes = result | {name: sum(row[key] for row in result["collectives"]) for name, key in reduced.items()}
    assert {name: sizes[name] for name, bound in BOUNDS.items() if sizes[name] > GROWTH * bound} == {}
    assert any(row["source"].startswith("dssn_jax/models/") for row in result["sources"])
    monkeypatch.setattr("sys.argv", [*command, f"--compare={file}"])
    capsys.readouterr()
    compiled.main()
    assert "new / old" in capsys.readouterr().out
