"""The exported network, run as docs/using_a_model.md shows: by JAX alone, in another process."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from configs.checks import ConfigError
from dssn_jax.evaluation import export as export_lib
from dssn_jax.evaluation.export import PLATFORMS, export
from dssn_jax.learner import learner as learners
from dssn_jax.models.resize import resize
from dssn_jax.weights.files import StateDictError
from dssn_jax.workdir import checkpoint, restore
from dssn_jax.workdir.records import write_json
from tests.evaluation import workdirs

GUIDE = pathlib.Path(__file__).parents[2] / "docs/using_a_model.md"
# Runs the example, then the same network on all images at once, where this package cannot be imported.
AFTER = """
import importlib.util
assert importlib.util.find_spec("dssn_jax") is None
batch = np.load("images.npy")
np.savez("outputs.npz", class_ids=network.call(batch)[0], probability=network.call(batch)[1])
"""


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """A work directory with a checkpoint of random networks: a student, and a teacher that differs from it."""
    config, workdir = tiny_config(), tmp_path_factory.mktemp("run")
    state = learners.build(config).init_state()
    state = state.replace(teacher=jax.tree.map(lambda leaf: leaf[..., ::-1], state.teacher))
    workdirs.save(workdir, config, state)
    # An export must not need the data.
    settings = json.loads(config.to_json())
    settings["data"] |= {"source": "folder", "root": "/nowhere"}
    write_json(workdir / "config.json", settings)
    return workdir


@pytest.mark.slow
def test_the_example_of_the_guide(trained, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    path = export(trained, to=tmp_path / "network.stablehlo", size="40x50")
    description = json.loads((tmp_path / "network.stablehlo.json").read_text())
    assert description["network"] == "teacher" and description["step"] == 3 and description["classes"][-1] == "cross"
    assert description["platforms"] == list(PLATFORMS) == ["cpu", "cuda", "tpu"]
    example = next(
        code for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "export" in code
    )
    assert len(example.splitlines()) <= 10 and path.name in example
    subprocess.run([sys.executable, "-c", example + AFTER], cwd=tmp_path, check=True)

    learner, _, networks, _ = restore.restore(trained)
    mean, std = np.array(learner.config.data.mean), np.array(learner.config.data.std)
    normalized = ((images / 255 - mean) / std).astype(np.float32)
    apply = jax.jit(learner.network.apply)
    expected = np.asarray(jax.nn.softmax(apply(networks["teacher"], normalized)))
    with np.load(tmp_path / "outputs.npz") as archive:
        outputs = dict(archive)
    assert outputs["class_ids"].dtype == np.uint8 and outputs["class_ids"].shape == (3, 40, 50)
    # Rounding may flip a pixel between two equally likely classes.
    assert (outputs["class_ids"] != expected.argmax(-1)).mean() < 0.002
    np.testing.assert_allclose(outputs["probability"], expected.max(-1), atol=1e-4)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "class_ids.png")), outputs["class_ids"][0])
    student = np.asarray(apply(networks["student"], normalized)).argmax(-1)
    assert (outputs["class_ids"] != student).mean() > 0.1


@pytest.mark.slow
def test_a_network_of_patches_is_exported_for_any_size(tiny_config):
    """The artifact resizes images to the nearest multiples of the patch, and logits back, as evaluation does."""
    learner = learners.build(
        tiny_config("supervised", model__encoder="dinov2_w64", model__decoder="linear", data__crop=28)
    )
    variables = learner.init_state().student
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3)).astype(np.uint8)
    class_ids, probability = export_lib.lower(learner, variables, 40, 50).call(images)
    logits = learner.network.apply(variables, resize(learner.normalize(images), 42, 56))
    expected = np.asarray(jax.nn.softmax(resize(logits, 40, 50)))
    assert class_ids.shape == (2, 40, 50) and (class_ids != expected.argmax(-1)).mean() < 0.002
    np.testing.assert_allclose(probability, expected.max(-1), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": "40"}, ConfigError, "--size='40' is not HEIGHTxWIDTH"),
        ({"to": "/nowhere/a.stablehlo"}, ConfigError, "folder /nowhere does not exist"),
        ({"checkpoint": "7"}, checkpoint.CheckpointError, "no checkpoint '7'"),
        ({"workdir": "/nowhere"}, checkpoint.CheckpointError, "/nowhere/checkpoints: no such folder"),
    ],
)
def test_mistakes_are_named(trained, options, error, message):
    before = sorted(trained.iterdir())
    with pytest.raises(error, match=message):
        export(**{"workdir": trained} | options)
    assert sorted(trained.iterdir()) == before


@pytest.mark.slow
def test_files_of_the_user_stay(trained, tmp_path):
    to, beside = tmp_path / "a.stablehlo", tmp_path / "a.stablehlo.json"
    for file in (to, beside):
        file.write_text("mine")
        with pytest.raises(ConfigError, match=f"--to={file}: exists already"):
            export(trained, to=to, size="33x33")
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
        file.unlink()
    for _ in range(2):  # An export may be renewed.
        export(trained, to=to, size="33x33")


def test_weights_that_are_not_finite_are_named(trained, tmp_path, monkeypatch):
    learner, step, networks, state = restore.restore(trained)
    kernel = networks["teacher"]["params"]["decoder"]["classifier"]["kernel"]
    networks["teacher"]["params"]["decoder"]["classifier"]["kernel"] = kernel.at[0].set(np.nan)
    monkeypatch.setattr(export_lib, "restore", lambda *_: restore.Restored(learner, step, networks, state))
    with pytest.raises(
        StateDictError, match="step 3 of .*: teacher: classifier.weight holds a number that is not finite"
    ):
        export(trained, to=tmp_path / "a.stablehlo")
    assert list(tmp_path.iterdir()) == []
