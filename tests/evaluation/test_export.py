"""The exported network, run as README.md shows: by JAX alone, in another process."""

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
from dssn_jax.evaluation import scores
from dssn_jax.evaluation.export import PLATFORMS, export
from dssn_jax.learner import learner as experiment
from dssn_jax.workdir import checkpoint
from dssn_jax.workdir import restore as saved_run
from dssn_jax.workdir.recorder import write_json

README = pathlib.Path(__file__).parent.parent / "README.md"
# Runs the example, then the same network on all images at once; where this package is not to be found.
AFTER = """
import importlib.util
assert importlib.util.find_spec("dssn_jax") is None
batch = np.load("images.npy")
np.savez("found.npz", class_ids=network.call(batch)[0], probability=network.call(batch)[1])
"""


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """A work directory with a checkpoint of random networks: a student, and a teacher that differs from it."""
    config, workdir = tiny_config(), tmp_path_factory.mktemp("run")
    parts = experiment.build(config)
    state = parts.initial_state()
    state = state.replace(teacher_params=jax.tree.map(lambda leaf: leaf[..., ::-1], state.teacher_params))
    settings = json.loads(config.to_json())
    saved = checkpoint.Checkpointer(workdir)
    saved.save(3, state, {"config": settings, "scores": scores.new() | {"best_step": 3}}, 50.0)
    saved.close()
    # An export must not need the data.
    settings["data"] |= {"source": "folder", "root": "/nowhere"}
    write_json(workdir / "config.json", settings)
    return workdir


def test_the_example_of_the_readme(trained, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    path = export(str(trained), "best", None, "40x50", str(tmp_path / "network.stablehlo"))
    facts = json.loads((tmp_path / "network.stablehlo.json").read_text())
    assert facts["network"] == "teacher" and facts["step"] == 3 and facts["classes"][-1] == "cross"
    assert facts["platforms"] == list(PLATFORMS) == ["cpu", "cuda", "tpu"]
    example = next(
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "export" in code
    )
    assert len(example.splitlines()) <= 10 and path.name in example
    subprocess.run([sys.executable, "-c", example + AFTER], cwd=tmp_path, check=True)

    saved = saved_run.restore_networks(trained, "best")
    mean, std = np.array(saved.config.data.mean), np.array(saved.config.data.std)
    normalized = ((images / 255 - mean) / std).astype(np.float32)
    logits = jax.jit(lambda x: saved.model.apply(saved.variables["teacher"], x))(normalized)
    expected = np.asarray(jax.nn.softmax(logits))
    found = np.load(tmp_path / "found.npz")
    assert found["class_ids"].dtype == np.uint8 and found["class_ids"].shape == (3, 40, 50)
    # Rounding may flip a pixel between two equally likely classes.
    assert (found["class_ids"] != expected.argmax(-1)).mean() < 0.002
    np.testing.assert_allclose(found["probability"], expected.max(-1), atol=1e-4)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "class_ids.png")), found["class_ids"][0])
    student = np.asarray(jax.jit(lambda x: saved.model.apply(saved.variables["student"], x))(normalized)).argmax(-1)
    assert (found["class_ids"] != student).mean() > 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": "40"}, ConfigError, "--size='40' is not HEIGHTxWIDTH"),
        ({"to": "/nowhere/a.stablehlo"}, ConfigError, "folder /nowhere does not exist"),
        ({"which": "7"}, checkpoint.CheckpointError, "no checkpoint '7'"),
        ({"workdir": "/nowhere"}, saved_run.WorkdirError, "/nowhere: no such folder"),
    ],
)
def test_mistakes_are_named(trained, options, error, message):
    before = sorted(trained.iterdir())
    with pytest.raises(error, match=message):
        export(**{"workdir": str(trained), "which": "best", "network": None, "size": None, "to": None} | options)
    assert sorted(trained.iterdir()) == before
