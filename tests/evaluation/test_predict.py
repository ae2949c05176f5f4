"""`--mode=predict`: what is written, what is skipped, and that it scores as `--mode=eval` says."""

import json

import numpy as np
import pytest
from configs.checks import ConfigError
from PIL import Image

from dssn_jax import visualize as pictures
from dssn_jax.evaluation import evaluate, metrics, predict, scores
from dssn_jax.learner import learner as experiment
from dssn_jax.workdir import checkpoint, recorder
from dssn_jax.workdir import restore as saved_run
from input_pipeline.errors import DataError

RNG = np.random.default_rng(0)
SIZES = {"a": (40, 50), "sub/b": (33, 47), "sub/c": (64, 31), "d": (40, 50)}


@pytest.fixture
def root(tmp_path):
    """A data set of four images of three sizes, all of them for validation."""
    for name, size in SIZES.items():
        for kind, suffix, array in (
            ("images", "jpg", RNG.integers(0, 255, (*size, 3), np.uint8)),
            ("masks", "png", RNG.integers(0, 6, size, np.uint8)),
        ):
            path = tmp_path / "root" / kind / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    lines = "".join(f"images/{name}.jpg masks/{name}.png\n" for name in SIZES)
    for name in ("few/labeled.txt", "few/unlabeled.txt", "val.txt"):
        path = tmp_path / "root/splits" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines)
    return tmp_path / "root"


@pytest.fixture
def run(tiny_config, root, tmp_path):
    """(configuration, work directory) of a run of which nothing but the initial state was saved."""
    options = {"data__source": "folder", "data__root": str(root), "data__split": "few"}
    config = tiny_config("dssn", **options, eval__batch=4, eval__buckets=1)
    saved = checkpoint.Checkpointer(tmp_path / "run")
    meta = {"config": json.loads(config.to_json()), "scores": {**scores.new(), "best_step": 0}}
    state = experiment.build(config).initial_state()
    sharp = {"kernel": 300 * state.params["classifier"]["kernel"], "bias": state.params["classifier"]["bias"]}
    params = {**state.params, "classifier": sharp}  # Several classes in each image.
    saved.save(0, state.replace(params=params, teacher_params=params), meta)
    saved.close()
    return config, tmp_path / "run"


def test_predictions_on_disk_score_as_evaluation_says(run, root, tmp_path):
    config, workdir = run
    expected = evaluate.evaluate(config, workdir, "best")["teacher"]
    assert predict.predict(config, workdir, str(root / "splits/val.txt"), str(tmp_path / "out"), confidence=True) == 4
    confusion = 0
    for name, size in SIZES.items():
        ids = Image.open(tmp_path / f"out/class_ids/images/{name}.png")
        assert ids.mode == "P" and ids.size == size[::-1]
        assert ids.getpalette()[:18] == pictures.palette(6).ravel().tolist()
        label = np.asarray(Image.open(root / f"masks/{name}.png"))
        confusion = confusion + metrics.confusion_matrix(np.asarray(ids).astype(int), label, 6)
        for picture in (f"overlays/images/{name}.jpg", f"confidence/images/{name}.png"):
            assert Image.open(tmp_path / "out" / picture).size == size[::-1]
        assert np.asarray(Image.open(tmp_path / f"out/confidence/images/{name}.png")).min() >= 255 // 6 - 1
    assert (confusion.sum(0) > 0).sum() > 2  # Classes are predicted, not one class.
    found = scores.of_confusion(confusion, config.data.classes)
    assert found.pop("iou") == pytest.approx(expected.pop("iou"))
    assert found == pytest.approx(expected)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".part")]


def test_damaged_files_are_skipped_and_named(run, root, tmp_path):
    """One whose header cannot be read and one that is cut short; the others are predicted, in their folders."""
    config, workdir = run
    (root / "images/e.png").write_text("no picture")
    (root / "images/d.jpg").write_bytes((root / "images/d.jpg").read_bytes()[:900])
    with pytest.raises(predict.UnreadableError, match="2 of 5 images were skipped") as error:
        predict.predict(config, workdir, str(root / "images"), str(tmp_path / "out"))
    assert "images/e.png" in str(error.value) and "images/d.jpg" in str(error.value)
    found = sorted(str(path.relative_to(tmp_path / "out/class_ids")) for path in (tmp_path / "out").rglob("*.png"))
    assert found == ["a.png", "sub/b.png", "sub/c.png"]


def test_mistakes_leave_nothing(run, root, tmp_path):
    config, workdir = run
    Image.new("RGB", (9, 9)).save(root / "images/a.png")
    for images, options, error, message in (
        (root / "images", {}, ConfigError, r"a\.jpg and a\.png would both be a\.png"),
        (root / "nowhere", {}, DataError, "no such file or folder"),
        (root / "splits/few", {}, DataError, "no image in this folder"),
        (root / "images/d.jpg", {"which": "7"}, checkpoint.CheckpointError, "no checkpoint '7'"),
    ):
        with pytest.raises(error, match=message):
            predict.predict(config, workdir, str(images), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_the_work_directory_tells_the_configuration(run, root, tmp_path):
    config, workdir = run
    recorder.write_json(workdir / "config.json", json.loads(config.to_json()))
    assert predict.predict(None, workdir, str(root / "images/d.jpg"), str(tmp_path / "out"), network="student") == 1
    assert (tmp_path / "out/class_ids/d.png").exists()
    with pytest.raises(saved_run.WorkdirError, match="no such folder"):
        predict.predict(None, tmp_path / "nowhere", str(root / "images/d.jpg"), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
