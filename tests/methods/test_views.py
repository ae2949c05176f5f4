import re

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import shapes
from dssn_jax import sharding
from dssn_jax.methods import views
from input_pipeline.batch import Batch
from input_pipeline.pipeline import train_dataset
from input_pipeline.sources.open import open_sources

DATA = ConfigDict({"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.5)})


def test_normalize_by_hand():
    image = np.array([[[0, 128, 255]]], np.uint8)
    normalized = views.normalize(image, DATA)
    np.testing.assert_allclose(normalized[0, 0], [-5, (128 / 255 - 0.4) / 0.2, 1.4], rtol=1e-5)
    np.testing.assert_array_equal(views.denormalize(normalized, DATA), image)


def test_cutmix_box_pastes_images_and_valid_pixels():
    image, partner = np.zeros((2, 6, 8, 3), np.uint8), np.full((2, 6, 8, 3), 255, np.uint8)
    boxes, valid = np.array([[[1, 2, 4, 7]], [[0, 0, 0, 0]]], np.int32), np.ones((2, 6, 8), bool)
    batch = Batch(image, valid, image, valid, partner, ~valid, boxes)
    strong = np.stack([image, partner], 1)[:, None]
    mixed = views.from_batch(batch, jnp.asarray(strong), DATA, jnp.float32)
    expected = np.zeros((2, 6, 8), bool)
    expected[0, 1:4, 2:7] = True
    np.testing.assert_array_equal(np.asarray(mixed.strong[0][..., 0]) > 0, expected)
    np.testing.assert_array_equal(views.mix(mixed.valid_u, mixed.valid_m, mixed.boxes[0]), ~expected)


def test_labeled_partners_are_pasted_with_their_labels_and_not_predicted():
    rng = np.random.default_rng(0)
    image, partner = (rng.integers(256, size=(2, 6, 8, 3), dtype=np.uint8) for _ in range(2))
    label = rng.integers(3, size=(2, 6, 8), dtype=np.uint8)
    label[:, 3] = 255
    boxes, valid = np.array([[[1, 2, 5, 7]], [[0, 0, 0, 0]]], np.int32), np.ones((2, 6, 8), bool)
    batch = Batch(image, label, image, valid, partner, boxes=boxes, label_m=label)
    data = ConfigDict({**DATA, "ignore": 255})
    mixed = views.from_batch(batch, jnp.asarray(np.stack([image, partner], 1)[:, None]), data, jnp.float32)
    inside = np.zeros((2, 6, 8), bool)
    inside[0, 1:5, 2:7] = True
    expected = np.where(inside[..., None], partner, image)
    np.testing.assert_array_equal(views.denormalize(mixed.strong[0], DATA), expected)
    np.testing.assert_array_equal(mixed.label_m, label)
    np.testing.assert_array_equal(mixed.valid_m, label != 255)
    assert mixed.image_m is None


def test_whole_classes_are_pasted_besides_the_box():
    """In a batch of the pipeline, as the strong views would be without augmentation."""
    config = shapes.get_config("crop=49")
    config.views.update({"mix_partner": "labeled", "paste_classes": 2})
    config.data.update({"flip": 0.5, "scale": (0.5, 1.5), "rare_temperature": 0.5})
    batch = train_dataset(open_sources(config), config)[3]
    views_ = views.from_batch(batch, jnp.asarray(_unchanged(batch)), config.data, jnp.float32)
    for i, strong in enumerate(views_.strong):
        for row in range(8):
            y0, x0, y1, x1 = batch.boxes[row, i]
            pasted = np.isin(batch.label_m[row], np.flatnonzero(batch.classes[row, i]))
            pasted[y0:y1, x0:x1] = True
            np.testing.assert_array_equal(views_.boxes[i][row], pasted)
            expected = np.where(pasted[..., None], batch.image_m[row], batch.image_u[row])
            np.testing.assert_array_equal(views.denormalize(strong[row], config.data), expected)
    assert batch.classes.shape == (8, 2, 6) and (batch.classes[:, 0] != batch.classes[:, 1]).any()


def _unchanged(batch):
    """Returns strong views without any change, uint8 [U, 2, 2, H, W, 3]."""
    pairs = np.stack([batch.image_u, batch.image_m], 1)
    return np.stack([pairs, pairs], 1)


def test_labeled_partners_are_pasted_without_any_exchange_between_devices():
    shape, mesh = (4, 6, 8), sharding.make_mesh(jax.devices()[:4])
    image, label, valid = np.zeros((*shape, 3), np.uint8), np.zeros(shape, np.uint8), np.ones(shape, bool)
    batch = Batch(image, label, image, valid, image, boxes=np.zeros((4, 2, 4), np.int32), label_m=label)
    batch = batch._replace(classes=np.zeros((4, 2, 3), bool))
    given = sharding.put_batch((batch, np.zeros((4, 2, 2, *shape[1:], 3), np.uint8)), mesh)
    data = ConfigDict({**DATA, "ignore": 255})
    from_batch = jax.jit(lambda batch, strong: views.from_batch(batch, strong, data, jnp.float32))
    compiled = from_batch.lower(*given).compile()
    assert compiled.output_shardings.strong[0].is_equivalent_to(sharding.batch_sharded(mesh), 4)
    text = compiled.as_text()
    assert "num_partitions=4" in text and not re.search("all-|collective-|reduce-scatter", text)


def test_reversed_partners_are_the_other_rows_of_pairs_before_mixing():
    """Equal to partners that are given: rows 1, 0, 3, 2; nothing but the boxes decides what is pasted."""
    rng = np.random.default_rng(0)
    image, strong = (rng.integers(256, size=(4, *shape, 6, 8, 3), dtype=np.uint8) for shape in ((), (2, 1)))
    valid, boxes = rng.random((4, 6, 8)) > 0.2, rng.integers(6, size=(4, 2, 4), dtype=np.int32)
    swapped = [1, 0, 3, 2]
    given = Batch(image, valid, image, valid, image[swapped], valid[swapped], boxes)
    with_partners = jnp.asarray(np.concatenate([strong, strong[swapped]], 2))
    expected = views.from_batch(given, with_partners, DATA, jnp.float32)
    batch = given._replace(image_m=None, valid_m=None)
    ours = views.from_batch(batch, jnp.asarray(strong), DATA, jnp.float32)
    assert ours.image_m is None
    for name in ("valid_m", "strong", "boxes"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name)
