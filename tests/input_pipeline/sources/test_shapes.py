"""Generated shapes: records, determinism, classes, and how hard they are."""

import pickle

import numpy as np
import pytest

from input_pipeline.class_names import SHAPES_CLASSES
from input_pipeline.errors import DataError
from input_pipeline.sources import shapes
from input_pipeline.sources.open import Sources, digest, open_source, open_sources
from input_pipeline.sources.shapes import ShapesSource


@pytest.fixture
def shapes_config(config):
    config.data.source = "shapes"
    config.data.classes = SHAPES_CLASSES
    return config


def _classes(source, count):
    """Returns the classes of each image, bool [count, 6]."""
    return np.array([np.bincount(source[i]["label"].ravel(), minlength=6) > 0 for i in range(count)])


def test_records_and_sizes(shapes_config):
    sources = open_sources(shapes_config)
    assert [len(source) for source in sources] == [16, 512, 64]
    record = sources.labeled[0]
    assert record["image"].shape == (96, 96, 3) and record["label"].shape == (96, 96) == sources.labeled.size(0)
    assert record["image"].dtype == record["label"].dtype == np.uint8
    assert set(sources.unlabeled[0]) == {"image"}
    with pytest.raises(IndexError):
        sources.labeled[16]


def test_labeled_are_the_first_unlabeled_and_val_is_apart(shapes_config):
    sources = open_sources(shapes_config)
    for index in range(16):
        np.testing.assert_array_equal(sources.labeled[index]["image"], sources.unlabeled[index]["image"])
        assert sources.labeled.name(index) == sources.unlabeled.name(index)
    images = [source[i]["image"].tobytes() for source in (sources.unlabeled, sources.val) for i in range(64)]
    assert len(set(images)) == 128
    assert sources.val.name(0) != sources.labeled.name(0)


def test_images_depend_on_seed_and_index_alone():
    source = ShapesSource(48, 8, 5, "train", labeled=True)
    forward = [source[i] for i in range(8)]
    copy = pickle.loads(pickle.dumps(ShapesSource(48, 100, 5, "train", labeled=True)))
    for index in reversed(range(8)):
        for key in ("image", "label"):
            np.testing.assert_array_equal(copy[index][key], forward[index][key])
    assert (ShapesSource(48, 8, 6, "train", labeled=True)[0]["image"] != forward[0]["image"]).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_class_is_labeled_and_validated(seed):
    for part, count in (("train", 16), ("val", 16)):
        classes = _classes(ShapesSource(96, count, seed, part, labeled=True), count)
        assert classes.any(0).all()
        assert set(np.flatnonzero(classes[:, shapes.CROSS])) == {3, 13}
        assert classes[:4].any(0)[1:5].all()


def test_rare_class_is_rare_and_small():
    source = ShapesSource(96, 200, 0, "train", labeled=True)
    pixels = sum(np.bincount(source[i]["label"].ravel(), minlength=6) for i in range(200))
    share = pixels / pixels.sum()
    assert share[0] > 0.7 and share[shapes.CROSS] < 0.01 and (share[1:5] > 0.015).all()


def test_outlines_have_their_areas():
    """At radius 1: disk pi, rectangle 1.9 x 1.2, triangle 3 sqrt(3) / 4, ring pi (1 - 0.4^2), cross 4 (0.8) - 0.8^2."""
    v, u = np.mgrid[-1.5:1.5:601j, -1.5:1.5:601j]
    expected = (np.pi, 1.9 * 1.2, 3 * np.sqrt(3) / 4, 0.84 * np.pi, 2 * 2 * 0.8 - 0.64)
    for shape, area in enumerate(expected, 1):
        assert shapes._outline(shape, v, u, 1.0).sum() * (3 / 600) ** 2 == pytest.approx(area, rel=0.02)


def test_color_alone_does_not_settle_the_class():
    """Bayes' rule on a pixel's color, estimated from 150 labeled images, reaches an IoU of about 2/3."""
    train = _color_counts(ShapesSource(96, 150, 0, "train", labeled=True), 150)
    counts = _color_counts(ShapesSource(96, 50, 0, "val", labeled=True), 50)
    prediction = train.argmax(0)  # The most frequent class of each color.
    confusion = np.stack([counts[:, prediction == shape].sum(1) for shape in range(6)], 1)
    iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    assert 0.4 < iou[1:5].mean() < 0.75, iou


def _color_counts(source, count):
    """Returns the number of pixels of each class and color, in 12 levels per channel, int [6, 12 ** 3]."""
    counts = np.zeros((6, 12**3), int)
    for index in range(count):
        record = source[index]
        level = record["image"].astype(int) * 12 // 256
        np.add.at(counts, (record["label"], level @ [144, 12, 1]), 1)
    return counts


def test_open_shapes_bad_config(shapes_config):
    shapes_config.data.classes = ("a", "b")
    with pytest.raises(DataError, match="the generated shapes have"):
        open_sources(shapes_config)
    shapes_config.data.classes = SHAPES_CLASSES
    shapes_config.data.shapes.labeled = 600
    with pytest.raises(DataError, match="labeled 600, unlabeled 512"):
        open_sources(shapes_config)


def test_open_source(shapes_config):
    for split, source in zip(Sources._fields, open_sources(shapes_config), strict=True):
        single = open_source(shapes_config, split)
        assert digest(single) == digest(source) and set(single[0]) == set(source[0])
