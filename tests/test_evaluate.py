import jax
import numpy as np
import pytest

from dssn_jax import evaluate, experiment, inference, metrics, scores, sharding
from input_pipeline import Group

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


@pytest.mark.parametrize("mode", inference.MODES)
def test_every_image_counts_once_on_several_devices(tiny_config, mode):
    """Groups that do not fill the four devices give the sum of the images predicted one by one."""
    config = tiny_config(eval__mode=mode, eval__crop=32)
    parts = experiment.build(config)
    variables = jax.jit(parts.initial_state)().student
    groups = []
    for count, height, width in ((3, 40, 50), (5, 48, 48), (1, 33, 70)):
        images = RNG.integers(0, 256, (count, height, width, 3)).astype(np.uint8)
        labels = RNG.integers(0, 6, (count, height, width)).astype(np.uint8)
        labels[RNG.random(labels.shape) < 0.1] = 255
        groups.append(Group(("name",) * count, images, labels))
    evaluator = evaluate.Evaluator(parts.model, config, parts.mesh)
    seen = []
    found = evaluator({"student": variables, "again": variables}, groups, seen.append)
    assert seen == [3, 8, 9]

    expected = 0
    mean, std = np.array(config.data.mean), np.array(config.data.std)
    predict = jax.jit(lambda x: inference.predict(parts.model, variables, x, mode, 32))
    for group in groups:
        for image, label in zip(group.images, group.labels, strict=True):
            if mode == "center_crop":
                y, x = (image.shape[0] - 32) // 2, (image.shape[1] - 32) // 2
                image, label = image[y : y + 32, x : x + 32], label[y : y + 32, x : x + 32]
            x = ((image / 255 - mean) / std).astype(np.float32)[None]
            expected = expected + confusion_by_hand(np.asarray(predict(x)), label, 6)
    assert found["student"].sum() == expected.sum()
    # Float rounding may flip a pixel between two equally likely classes.
    assert np.abs(found["student"] - expected).sum() <= 0.002 * expected.sum()
    np.testing.assert_array_equal(found["student"], found["again"])


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
