"""Confusion matrices, scores and the evaluator, against counts by hand and images one by one."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax import auto_config, models, sharding
from dssn_jax.evaluation import evaluate as evaluate_lib
from dssn_jax.evaluation import metrics
from dssn_jax.evaluation.evaluate import Evaluator, MemoryLimitError, evaluate
from dssn_jax.evaluation.predict import predict
from dssn_jax.learner import learner as learners
from dssn_jax.models.resize import resize
from dssn_jax.workdir import checkpoint
from input_pipeline.eval_batches import EvalBatch
from tests.evaluation import workdirs

RNG = np.random.default_rng(0)


def confusion_by_hand(prediction, label, classes):
    counts = np.zeros((classes, classes), int)
    for true, predicted in zip(label.ravel(), prediction.ravel(), strict=True):
        if true != 255:
            counts[true, predicted] += 1
    return counts


def test_confusion_matrix_and_iou_by_hand():
    label = RNG.integers(0, 3, (2, 9, 7)).astype(np.uint8)
    label[0, :3] = 255
    prediction = RNG.integers(0, 3, label.shape)
    counts = metrics.confusion_matrix(prediction, label, 4)
    np.testing.assert_array_equal(counts, confusion_by_hand(prediction, label, 4))
    iou = metrics.iou(counts)
    for k in range(3):
        both = ((label == k) & (prediction == k)).sum()
        either = ((label != 255) & ((label == k) | (prediction == k))).sum()
        assert iou[k] == pytest.approx(both / either)
    assert iou[3] == 0  # In no image, and it counts.
    valid = label != 255
    assert metrics.pixel_accuracy(counts) == pytest.approx((label == prediction)[valid].mean())
    weights = [(label == k).sum() / valid.sum() for k in range(3)]
    scores = metrics.scores_of(counts, ("a", "b", "c", "d"))
    assert scores["miou"] == pytest.approx(25 * iou[:3].sum()) and scores["iou"]["b"] == pytest.approx(100 * iou[1])
    assert metrics.frequency_weighted_iou(counts) == pytest.approx(np.dot(weights, iou[:3]))


class Images:
    """A labeled source of noise of many sizes."""

    sizes = ((40, 50), (48, 48), (33, 70), (40, 50), (21, 33), (48, 48), (40, 50))

    def __init__(self):
        self._records = []
        for size in self.sizes:
            label = RNG.integers(0, 6, size).astype(np.uint8)
            label[RNG.random(size) < 0.1] = 255
            self._records.append({"image": RNG.integers(0, 256, (*size, 3)).astype(np.uint8), "label": label})

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return self._records[index]

    def name(self, index):
        return f"{index}.png"

    def size(self, index):
        return self.sizes[index]


def start(config, devices=None):
    learner = learners.build(config, sharding.make_mesh(jax.devices()[:devices]))
    return learner, learner.init_state().student, Evaluator(learner)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["original", "center_crop"])
def test_every_image_counts_once_on_several_devices(tiny_config, mode):
    """Seven images of four sizes on four devices, in two padded sizes, count what they count one by one."""
    config = tiny_config(eval__mode=mode, eval__crop=32, eval__batch=3, eval__buckets=2)
    learner, variables, evaluator = start(config)
    source, progress = Images(), []
    counts = evaluator({"student": variables, "again": variables}, evaluator.batches(source), progress.append)
    assert progress[-1] == len(source)

    expected = 0
    mean, std = np.array(config.data.mean), np.array(config.data.std)
    predict = jax.jit(lambda x: learner.network.apply(variables, x).argmax(-1))
    for index in range(len(source)):
        image, label = source[index]["image"], source[index]["label"]
        if mode == "center_crop":
            y, x = (max((side - 32) // 2, 0) for side in label.shape)
            image, label = image[y : y + 32, x : x + 32], label[y : y + 32, x : x + 32]
        x = ((image / 255 - mean) / std).astype(np.float32)[None]
        expected = expected + confusion_by_hand(np.asarray(predict(x)), label, 6)
    assert counts["student"].sum() == expected.sum()
    # Float rounding may flip a pixel between two equally likely classes.
    assert np.abs(counts["student"] - expected).sum() <= 0.002 * expected.sum()
    np.testing.assert_array_equal(counts["student"], counts["again"])


@pytest.mark.slow
def test_as_many_compilations_as_buckets(tiny_config):
    config = tiny_config(eval__batch=4, eval__buckets=2)
    _, variables, evaluator = start(config)
    evaluator({"student": variables}, evaluator.batches(Images()))
    assert evaluator._score._cache_size() <= 2


class Squares(nn.Module):
    """An encoder of 8 x 8 patches whose features depend on all of the image, and which respects no extent."""

    dtype: type = jnp.float32
    strides, size_multiple, input_size, supports_padding = (8,), 8, 8, False

    @nn.compact
    def __call__(self, x, train, extent=None):
        assert extent is None
        x = nn.Conv(16, (8, 8), (8, 8), padding="VALID")(x)
        return (x + 3 * x.mean((1, 2), keepdims=True),)


@pytest.fixture
def squares(tiny_config, monkeypatch):
    """Returns a function (SECTION__KEY=value, ...) -> configuration of a network with `Squares`."""
    monkeypatch.setitem(models.ENCODERS, "squares", models.Encoder(lambda model, **types: Squares()))
    return functools.partial(
        tiny_config, "supervised", model__encoder="squares", model__decoder="linear", data__crop=32
    )


@pytest.mark.slow
def test_networks_without_padding_have_a_program_per_size(squares, caplog):
    """Each image counts what it counts in a batch of its own; a warning, once, tells that this compiles much."""
    learner, variables, evaluator = start(squares(eval__batch=2, eval__buckets=3), devices=1)
    source = Images()
    for _ in range(2):
        together = evaluator({"student": variables}, evaluator.batches(source))["student"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "squares supports no padding: images of 4 sizes need a program for each, which is compiled first"
    ]
    assert len(evaluator._programs) == len(set(source.sizes)) == 4

    expected = 0
    mean, std = np.array(learner.config.data.mean), np.array(learner.config.data.std)
    for index in range(len(source)):
        image, label = source[index]["image"], source[index]["label"]
        x = ((image / 255 - mean) / std).astype(np.float32)[None]
        patches = resize(x, *(int(side / 8 + 0.5) * 8 for side in label.shape))
        logits = resize(learner.network.apply(variables, patches), *label.shape)
        expected = expected + confusion_by_hand(np.asarray(logits.argmax(-1))[0], label, 6)
    assert together.sum() == expected.sum() and np.abs(together - expected).sum() <= 0.002 * expected.sum()


def test_few_sizes_without_padding_need_no_warning(squares, caplog):
    _, _, evaluator = start(squares(eval__batch=2, eval__buckets=4), devices=1)
    next(evaluator.batches(Images()))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_class_maps_ignore_what_is_no_image(tiny_config):
    config = tiny_config(eval__batch=4, eval__buckets=1)
    _, variables, evaluator = start(config)
    batch = list(evaluator.batches(Images()))[-1]
    maps = evaluator.class_maps(variables, batch)
    assert maps.shape == batch.labels.shape and len(batch.indices) == 3
    for row, (height, width) in enumerate(batch.sizes):
        assert (maps[row, :height, :width] < 6).all()
        assert (maps[row, height:] == 255).all() and (maps[row, :, width:] == 255).all()


@pytest.mark.slow
def test_progress_counts_the_images_of_all_processes(tiny_config):
    """The rows of a batch that another process read hold images, but are not among this process's indices."""
    _, variables, evaluator = start(tiny_config())
    sizes = np.array([(20, 30)] * 6 + [(0, 0)] * 2, np.int32)
    images, labels = np.zeros((8, 20, 30, 3), np.uint8), np.zeros((8, 20, 30), np.uint8)
    batch, progress = EvalBatch(images, labels, sizes, indices=(0, 1, 2)), []
    evaluator({"student": variables}, [batch, batch], progress.append)
    assert progress == [6, 12]


@pytest.mark.slow
def test_neither_training_data_nor_the_batch_of_training_matter(tiny_config, tmp_path):
    """A run with batches of 3 on 3 devices is evaluated on 4, and needs the list of validation images alone."""
    options = {"data__labeled_batch": 3, "data__unlabeled_batch": 3}
    state = learners.build(tiny_config(**options), sharding.make_mesh(jax.devices()[:3])).init_state()
    workdirs.save(tmp_path / "run", tiny_config(**options), state)
    root = workdirs.make_root(tmp_path / "root", {"a": (40, 50), "b": (33, 47)})
    config = tiny_config(**options, data__source="folder", data__root=str(root), data__split="few")
    scores = evaluate(tmp_path / "run", config=config)
    assert set(scores) == {"student", "teacher"}
    assert predict(tmp_path / "run", str(root / "images"), to=tmp_path / "out", config=config) == 2


def test_scores_of_a_run():
    run = checkpoint.new_scores("miou")

    def update(step, **mious):
        scores = {name: {"miou": miou, "pixel_accuracy": 90.0 - step} for name, miou in mious.items()}
        return metrics.update_scores(run, step, scores)

    assert [update(10, student=30.0, teacher=20.0), update(20, student=25.0, teacher=40.0)] == [30.0, 40.0]
    update(30, student=40.0, teacher=39.0)
    assert (run["best_step"], run["best_score"]) == (30, 40.0)  # The later of equals.
    assert run["student"]["best"]["step"] == 30 and run["teacher"]["best"]["step"] == 20
    assert metrics.last_scores(run)["teacher"]["miou"] == 39.0
    assert metrics.continue_scores(run, "miou") == run
    run = metrics.continue_scores(run, "pixel_accuracy")
    update(40, student=1.0, teacher=2.0)
    assert (run["metric"], run["best_step"], run["best_score"]) == ("pixel_accuracy", 40, 50.0)
    assert run["student"]["best"]["step"] == 30  # The best of all its evaluations by the new metric.


def test_the_table_has_a_row_for_each_class_and_metric():
    counts = np.array([[3, 1], [0, 4]])
    table = metrics.class_table({name: metrics.scores_of(counts, ("ground", "sky")) for name in metrics.NETWORKS})
    cells = {line.split("  ")[0].strip(): line.split()[-2:] for line in table.splitlines()}
    assert cells["ground"] == ["75.00", "75.00"] and cells["sky"] == ["80.00", "80.00"]
    assert cells["Mean IoU"] == ["77.50", "77.50"] and cells["Pixel accuracy"] == ["87.50", "87.50"]
    assert {metric.title for metric in metrics.METRICS.values()} <= cells.keys()


@pytest.mark.slow
def test_fewer_rows_at_a_time_give_the_same_scores(tiny_config, monkeypatch):
    """One image at a time by the bound of pixels, and by that of memory."""
    learner, variables, _ = start(tiny_config("supervised", eval__batch=4, eval__buckets=2), devices=1)
    source = Images()

    def confusion():
        evaluator = Evaluator(learner)
        batches = list(evaluator.batches(source))
        return evaluator({"student": variables}, batches)["student"], {len(batch.images) for batch in batches}

    whole, rows = confusion()
    assert rows == {4}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_lib, "_MOST_SCORES", 32)
        by_pixels, rows = confusion()
    assert rows == {1}
    np.testing.assert_array_equal(by_pixels, whole)
    needed = {key[1][0]: program.needed for key, program in _programs(learner, source).items()}
    monkeypatch.setattr(auto_config, "free_memory", lambda: needed[4] - 1)
    by_memory, rows = confusion()
    assert 1 in rows
    np.testing.assert_array_equal(by_memory, whole)


def _programs(learner, source):
    evaluator = Evaluator(learner)
    list(evaluator.batches(source))
    return evaluator._programs


@pytest.mark.slow
def test_validation_images_that_are_too_large_are_left_out_and_named(tiny_config, monkeypatch, caplog):
    learner, variables, _ = start(tiny_config("supervised", eval__batch=2, eval__buckets=7), devices=1)
    source, evaluator = Images(), Evaluator(learner)
    source.sizes = (*source.sizes, (480, 320))
    source._records.append({"image": np.zeros((480, 320, 3), np.uint8), "label": np.zeros((480, 320), np.uint8)})
    whole = evaluator({"student": variables}, evaluator.batches(source, indices=range(7)))["student"]
    monkeypatch.setattr(evaluate_lib, "_MOST_SCORES", 32 * 480 * 200)
    monkeypatch.setattr(auto_config, "free_memory", lambda: 5e6)
    evaluator = Evaluator(learner)
    left = evaluator({"student": variables}, evaluator.batches(source))["student"]
    np.testing.assert_array_equal(left, whole)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and re.search(r"1 images are left out: 7.png: 320x480 pixels need .* MB", warnings[0])
    monkeypatch.setattr(auto_config, "free_memory", lambda: 0)
    with pytest.raises(MemoryLimitError, match="MB of memory, and 0 MB are free"):
        list(Evaluator(learner).batches(source))


def test_the_table_shows_any_class():
    scores = metrics.scores_of(np.diag([3, 1, 2, 1]), ("mean", "Mean IoU", "\x1b[31mred\x01", "12"))
    lines = metrics.class_table({"student": scores}).splitlines()
    assert [line.rsplit(None, 1)[0] for line in lines[2:6]] == ["mean", "Mean IoU", "\\x1b[31mred\\x01", "12"]
