import jax
import numpy as np
import pytest

from dssn_jax import sharding
from dssn_jax.evaluation import evaluate, metrics, scores
from dssn_jax.learner import learner as experiment

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
    found = metrics.iou(counts)
    for k in range(3):
        both = ((label == k) & (prediction == k)).sum()
        either = ((label != 255) & ((label == k) | (prediction == k))).sum()
        assert found[k] == pytest.approx(both / either)
    assert found[3] == 0  # Never seen, and it counts.
    valid = label != 255
    assert metrics.pixel_accuracy(counts) == pytest.approx((label == prediction)[valid].mean())
    weights = [(label == k).sum() / valid.sum() for k in range(3)]
    assert metrics.frequency_weighted_iou(counts) == pytest.approx(np.dot(weights, found[:3]))


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


def start(config):
    parts = experiment.build(config)
    return parts, parts.initial_state().student, evaluate.Evaluator(parts.model, config, parts.mesh)


@pytest.mark.parametrize("mode", ["original", "center_crop"])
def test_every_image_counts_once_on_several_devices(tiny_config, mode):
    """Seven images of four sizes on four devices, in two padded sizes, count what they count one by one."""
    config = tiny_config(eval__mode=mode, eval__crop=32, eval__batch=3, eval__buckets=2)
    parts, variables, evaluator = start(config)
    source, seen = Images(), []
    found = evaluator({"student": variables, "again": variables}, evaluator.groups(source), seen.append)
    assert seen[-1] == len(source)

    expected = 0
    mean, std = np.array(config.data.mean), np.array(config.data.std)
    predict = jax.jit(lambda x: parts.model.apply(variables, x).argmax(-1))
    for index in range(len(source)):
        image, label = source[index]["image"], source[index]["label"]
        if mode == "center_crop":
            y, x = (max((side - 32) // 2, 0) for side in label.shape)
            image, label = image[y : y + 32, x : x + 32], label[y : y + 32, x : x + 32]
        x = ((image / 255 - mean) / std).astype(np.float32)[None]
        expected = expected + confusion_by_hand(np.asarray(predict(x)), label, 6)
    assert found["student"].sum() == expected.sum()
    # Float rounding may flip a pixel between two equally likely classes.
    assert np.abs(found["student"] - expected).sum() <= 0.002 * expected.sum()
    np.testing.assert_array_equal(found["student"], found["again"])


def test_as_many_compilations_as_buckets(tiny_config):
    config = tiny_config(eval__batch=4, eval__buckets=2)
    _, variables, evaluator = start(config)
    evaluator({"student": variables}, evaluator.groups(Images()))
    assert evaluator._score._cache_size() <= 2


def test_class_maps_ignore_what_is_no_image(tiny_config):
    config = tiny_config(eval__batch=4, eval__buckets=1)
    _, variables, evaluator = start(config)
    group = list(evaluator.groups(Images()))[-1]
    maps = evaluator.class_maps(variables, group)
    assert maps.shape == group.labels.shape and len(group.indices) == 3
    for row, (height, width) in enumerate(group.sizes):
        assert (maps[row, :height, :width] < 6).all()
        assert (maps[row, height:] == 255).all() and (maps[row, :, width:] == 255).all()


def test_scores_of_a_run():
    kept = scores.new()
    scores.update(kept, 10, {"student": {"miou": 30.0, "iou": {}}, "teacher": {"miou": 20.0, "iou": {}}})
    scores.update(kept, 20, {"student": {"miou": 25.0, "iou": {}}, "teacher": {"miou": 40.0, "iou": {}}})
    scores.update(kept, 30, {"student": {"miou": 40.0, "iou": {}}, "teacher": {"miou": 39.0, "iou": {}}})
    assert (kept["best_step"], kept["best_miou"]) == (30, 40.0)  # The later of equals.
    assert kept["student"]["best"]["step"] == 30 and kept["teacher"]["best"]["step"] == 20
    assert scores.last(kept)["teacher"]["miou"] == 39.0


def test_mesh_of_some_devices():
    assert sharding.make_mesh(jax.devices()[:2]).size == 2
