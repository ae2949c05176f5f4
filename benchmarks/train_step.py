"""The training step that the benchmarks measure, and a batch for it."""

import jax
import numpy as np

from dssn_jax import sharding
from dssn_jax.learner import learner as learners
from dssn_jax.learner.learner import Learner
from input_pipeline.batch import Batch, labeled_rows
from input_pipeline.pipeline import RunLength

LENGTH = RunLength(1000, 100)  # Schedules need one; no measurement depends on it.


def random_batch(config, seed: int = 0) -> Batch:
    """Returns noise in the form of a batch: a tenth of the pixels is padding, CutMix boxes are a fifth of the crop."""
    rng, crop, unlabeled = np.random.default_rng(seed), config.data.crop, config.data.unlabeled_batch

    def images(count: int) -> np.ndarray:
        return rng.integers(256, size=(count, crop, crop, 3), dtype=np.uint8)

    label = rng.integers(len(config.data.classes), size=(labeled_rows(config), crop, crop), dtype=np.uint8)
    label[:, : crop // 10] = config.data.ignore
    if not config.method.strong_views:
        return Batch(images(len(label)), label)
    valid = np.ones((unlabeled, crop, crop), bool)
    valid[:, : crop // 10] = False
    box = np.array([crop // 4, crop // 4, 3 * crop // 4, 2 * crop // 3], np.int32)
    boxes = np.tile(box, (unlabeled, config.method.strong_views, 1))
    batch = Batch(images(len(label)), label, images(unlabeled), valid, boxes=boxes)
    if config.views.mix_partner == "reversed":  # Partners are in the batch.
        return batch
    if config.views.mix_partner == "labeled":
        labels = rng.integers(len(config.data.classes), size=valid.shape, dtype=np.uint8)
        batch = batch._replace(image_m=images(unlabeled), label_m=np.where(valid, labels, config.data.ignore))
        if config.views.paste_classes:
            classes = np.arange(len(config.data.classes)) < config.views.paste_classes
            batch = batch._replace(classes=np.tile(classes, (*boxes.shape[:2], 1)))
        return batch
    return batch._replace(image_m=images(unlabeled), valid_m=valid.copy())


def build(config, devices: list[jax.Device]) -> Learner:
    """Returns the learner of a configuration on `devices`."""
    return learners.build(config, sharding.make_mesh(devices), LENGTH)


def lower(config, devices: list[jax.Device]) -> jax.stages.Lowered:
    """Lowers the training step of a configuration for `devices`, without data or weights."""
    learner = build(config, devices)
    batch = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), random_batch(config))
    return learner.make_train_step().lower(learner.abstract_state(), batch)
