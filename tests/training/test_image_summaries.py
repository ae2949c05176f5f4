"""Pictures in TensorBoard show the views and labels that the step trained on."""

import numpy as np
import pytest

from dssn_jax.learner.step import VIEWS, stream_key
from dssn_jax.methods import strong_augment
from dssn_jax.training.image_summaries import ImageSummaries
from input_pipeline.pipeline import train_dataset
from input_pipeline.sources.open import open_sources

ROWS = 3


def draw(program):
    """Returns (the summaries' views after a step, its batch, the learner, the state before the step)."""
    learner = program.learner
    batch = train_dataset(open_sources(learner.config), learner.config)[0]
    before = program.init_state()
    state, _ = program.step(program.init_state(), batch)
    return ImageSummaries(learner, ROWS).views(state, batch), batch, learner, before


@pytest.mark.slow
def test_pictures_are_those_of_the_step(program):
    views, batch, learner, before = draw(program("dssn"))
    key = stream_key(before.rng, before.step, VIEWS)
    strong = np.asarray(strong_augment.strong_views(batch, learner.strong_augment, key))
    assert len(views["strong"]) == 2
    for number, picture in enumerate(views["strong"]):
        for row in range(ROWS):
            expected, (y0, x0, y1, x1) = strong[row, number, 0].copy(), batch.boxes[row, number]
            expected[y0:y1, x0:x1] = strong[row, number, 1, y0:y1, x0:x1]
            np.testing.assert_array_equal(picture[row], expected)
    for name in ("image_x", "label_x", "image_u"):
        np.testing.assert_array_equal(views[name], getattr(batch, name)[:ROWS])
    assert set(np.unique(views["selected"])) <= {0, 1} and not views["selected"][~batch.valid_u[:ROWS]].any()
    for name in ("prediction_x", "prediction_u", "pseudo_label"):
        assert views[name].shape == (ROWS, 33, 33) and views[name].min() >= 0 and views[name].max() < 6


@pytest.mark.slow
def test_supervised_training_has_pictures_of_labeled_images_alone(program):
    views, *_ = draw(program("supervised"))
    assert set(views) == {"image_x", "label_x", "prediction_x"}
