"""`--mode=predict`: what is written, what is skipped, and that its scores are those of `--mode=eval`."""

import os
import re

import jax
import numpy as np
import pytest
from PIL import Image

from configs.checks import ConfigError
from dssn_jax import auto_config, visualize
from dssn_jax.evaluation import evaluate as evaluate_lib
from dssn_jax.evaluation import metrics
from dssn_jax.evaluation.evaluate import Evaluator, evaluate
from dssn_jax.evaluation.predict import UnreadableError, predict
from dssn_jax.learner import learner as learners
from dssn_jax.workdir import checkpoint, records
from input_pipeline.errors import DataError
from tests.evaluation import workdirs

SIZES = {"a": (40, 50), "sub/b": (33, 47), "sub/c": (64, 31), "d": (40, 50)}


@pytest.fixture
def root(tmp_path):
    """A data set of four images of three sizes, all of them for validation."""
    return workdirs.make_root(tmp_path / "root", SIZES)


@pytest.fixture(scope="module")
def state(tiny_config):
    """A state whose networks predict several classes in each image."""
    state = learners.build(tiny_config()).init_state()
    params = state.student["params"]
    classifier = params["decoder"]["classifier"]
    classifier = {**classifier, "kernel": 300 * classifier["kernel"]}
    variables = {**state.student, "params": {**params, "decoder": {**params["decoder"], "classifier": classifier}}}
    return state.replace(student=variables, teacher=variables)


@pytest.fixture
def run(tiny_config, state, root, tmp_path):
    """(configuration, work directory) of a run that saved only `state`."""
    options = {"data__source": "folder", "data__root": str(root), "data__split": "few"}
    config = tiny_config(**options, eval__batch=4, eval__buckets=1)
    workdirs.save(tmp_path / "run", config, state)
    return config, tmp_path / "run"


def opened(path):
    with Image.open(path) as picture:
        return picture.copy()


@pytest.mark.slow
def test_predictions_on_disk_score_as_evaluation_says(run, root, tmp_path):
    config, workdir = run
    expected = evaluate(workdir, config=config)["teacher"]
    assert predict(workdir, str(root / "splits/val.txt"), to=tmp_path / "out", config=config, confidence=True) == 4
    confusion = 0
    for name, size in SIZES.items():
        ids = opened(tmp_path / f"out/class_ids/images/{name}.png")
        assert ids.mode == "P" and ids.size == size[::-1]
        assert ids.getpalette()[:18] == visualize.palette(6).ravel().tolist()
        label = np.asarray(opened(root / f"masks/{name}.png"))
        confusion = confusion + metrics.confusion_matrix(np.asarray(ids).astype(int), label, 6)
        for picture in (f"overlays/images/{name}.jpg", f"confidence/images/{name}.png"):
            assert opened(tmp_path / "out" / picture).size == size[::-1]
        assert np.asarray(opened(tmp_path / f"out/confidence/images/{name}.png")).min() >= 255 // 6 - 1
    assert (confusion.sum(0) > 1000).sum() > 1  # More than one class is predicted.
    scores = metrics.scores_of(confusion, config.data.classes)
    assert scores.pop("iou") == pytest.approx(expected.pop("iou"))
    assert scores == pytest.approx(expected)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".part")]


def test_damaged_files_are_skipped_and_named(run, root, tmp_path):
    """One whose header cannot be read and one that is cut short; the others are predicted, in their folders."""
    config, workdir = run
    (root / "images/e.png").write_text("no picture")
    (root / "images/d.jpg").write_bytes((root / "images/d.jpg").read_bytes()[:900])
    with pytest.raises(UnreadableError, match="2 of 5 images were skipped") as error:
        predict(workdir, str(root / "images"), to=tmp_path / "out", config=config)
    assert "images/e.png" in str(error.value) and "images/d.jpg" in str(error.value)
    written = sorted(str(path.relative_to(tmp_path / "out/class_ids")) for path in (tmp_path / "out").rglob("*.png"))
    assert written == ["a.png", "sub/b.png", "sub/c.png"]


def test_mistakes_leave_nothing(run, root, tmp_path):
    config, workdir = run
    Image.new("RGB", (9, 9)).save(root / "images/a.png")
    for images, options, error, message in (
        (root / "images", {}, ConfigError, r"a\.jpg and a\.png would both be a\.png"),
        (root / "nowhere", {}, DataError, "no such file or folder"),
        (root / "splits", {}, DataError, "no image in this folder"),
        (root / "images/d.jpg", {"checkpoint": "7"}, checkpoint.CheckpointError, "no checkpoint '7'"),
    ):
        with pytest.raises(error, match=message):
            predict(workdir, str(images), to=tmp_path / "out", config=config, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_configuration_is_read_from_the_work_directory(run, root, tmp_path):
    _, workdir = run
    assert predict(workdir, str(root / "images/d.jpg"), to=tmp_path / "out", network="student") == 1
    assert (tmp_path / "out/class_ids/d.png").exists()
    with pytest.raises(records.WorkdirError, match="no such folder"):
        predict(tmp_path / "nowhere", str(root / "images/d.jpg"), to=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_an_image_that_is_too_large_is_skipped_and_named(run, root, tmp_path, monkeypatch):
    """The others, one of which would share its batch, have the predictions that they have without it."""
    config, workdir = run
    predict(workdir, str(root / "images"), to=tmp_path / "expected", config=config)
    Image.new("RGB", (700, 500)).save(root / "images/large.jpg")
    monkeypatch.setattr(evaluate_lib, "_MOST_SCORES", 32 * 300 * 300)
    monkeypatch.setattr(auto_config, "free_memory", lambda: 30e6)
    with pytest.raises(UnreadableError, match=r"1 of 5 images were skipped") as error:
        predict(workdir, str(root / "images"), to=tmp_path / "out", config=config)
    assert re.search(r"images/large\.jpg: 700x500 pixels need \d+ MB of memory, and 8 MB are free", str(error.value))
    for name in SIZES:
        picture = f"class_ids/{name}.png"
        np.testing.assert_array_equal(opened(tmp_path / "out" / picture), opened(tmp_path / "expected" / picture))


@pytest.mark.slow
def test_a_device_that_runs_out_of_memory_ends_no_prediction(run, root, tmp_path, monkeypatch):
    config, workdir = run
    original, calls = Evaluator._run, []

    def full(self, program, variables, batch):
        calls.append(1)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n\nmore")
        return original(self, program, variables, batch)

    monkeypatch.setattr(Evaluator, "_run", full)
    monkeypatch.setattr(evaluate_lib, "_MOST_SCORES", 32)  # Images of other sizes are in other batches.
    with pytest.raises(UnreadableError, match="2 of 4 images were skipped:\n.*images/a.*: out of memory: RES") as error:
        predict(workdir, str(root / "images"), to=tmp_path / "out", config=config)
    assert str(error.value).count("\n") == 2
    assert {path.name for path in (tmp_path / "out").rglob("*.png")} == {"b.png", "c.png"}


def test_files_of_the_user_stay(run, root, tmp_path):
    config, workdir = run
    own = tmp_path / "own/class_ids/a.png"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(root)
    before = sorted(tmp_path.rglob("*"))
    for to, message in (
        ("own", "own: neither empty nor a folder of predictions"),
        ("file", "file: is a file; expected a folder"),
        ("root", r"root: the image .*images/a\.jpg is in it"),
        ("link/images", r"link/images: the image .*images/a\.jpg is in it"),
        ("root/images/out", "root/images/out: in the folder of the images"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict(workdir, str(root / "images"), to=tmp_path / to, config=config)
    assert sorted(tmp_path.rglob("*")) == before and own.read_text() == "mine"
    for _ in range(2):  # Predictions may be renewed.
        predict(workdir, str(root / "images/d.jpg"), to=tmp_path / "out", config=config)


def test_names_that_are_not_utf_8(run, root, tmp_path):
    config, workdir = run
    name = os.fsdecode(b"caf\xe9.jpg")
    (root / "images/d.jpg").rename(root / "images" / name)
    (root / "images" / os.fsdecode(b"bad\xe9.jpg")).write_text("none")
    with pytest.raises(UnreadableError, match=r"bad\\xe9\.jpg"):
        predict(workdir, str(root / "images"), to=tmp_path / "out", config=config)
    assert opened(tmp_path / "out/class_ids" / name.replace(".jpg", ".png")).size == (50, 40)
