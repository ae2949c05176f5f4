"""Pictures of what training reads and what the networks predict, for TensorBoard and the report."""

import contextlib
import functools

import jax
import numpy as np

from dssn_jax import sharding, visualize
from dssn_jax.evaluation.evaluate import Evaluator
from dssn_jax.learner.learner import Learner
from dssn_jax.learner.state import TrainState
from dssn_jax.methods.objective import Objective
from dssn_jax.methods.pseudo_labels import pseudo_label
from dssn_jax.methods.views import denormalize
from dssn_jax.models.resize import upsample
from input_pipeline.batch import Batch
from input_pipeline.sources.open import Source


class ImageSummaries:
    """Draws the first `rows` images of a training batch, and of the validation images."""

    def __init__(self, learner: Learner, rows: int):
        self._learner, self._rows = learner, rows
        self._color = functools.partial(visualize.colorize, num_classes=len(learner.config.data.classes))
        self._views = jax.jit(self._draw, out_shardings=sharding.replicated(learner.mesh))

    def views(self, state: TrainState, batch: Batch) -> dict:
        """Returns what the step that led to `state` read of the first images of its batch, and their predictions.

        Pictures uint8 [n, H, W, 3] and class maps [n, H, W]: image_x, label_x and prediction_x of labeled images. If
        the method uses unlabeled ones, image_u (the weak view), pseudo_label, selected (weights in [0, 1], for the weak
        view) and prediction_u, and under "strong" a list of the mixed strong views. Predictions are the student's.
        """
        return jax.tree.map(lambda array: np.asarray(array[: self._rows]), self._views(state, batch))

    def panels(self, state: TrainState, batch: Batch) -> dict[str, np.ndarray]:
        """Returns pictures of the training batch, uint8 [H, W, 3] with a row per image, by name."""
        views, color = self.views(state, batch), self._color
        panels = {
            "labeled/image-prediction-truth": visualize.panel(
                views["image_x"], color(views["prediction_x"]), color(views["label_x"])
            )
        }
        if "image_u" in views:
            maps = [color(views["pseudo_label"]), visualize.mask(views["selected"]), color(views["prediction_u"])]
            names = "-".join(["weak", *(f"strong{i + 1}" for i in range(len(views["strong"])))])
            panels[f"unlabeled/{names}-pseudo_label-selected-prediction"] = visualize.panel(
                views["image_u"], *views["strong"], *maps
            )
        return panels

    def validation_panel(self, state: TrainState, evaluator: Evaluator, val: Source) -> dict[str, np.ndarray]:
        """Returns a picture of validation images with the predictions of each network, as `panels` does."""
        networks, shown = state.networks(), slice(self._rows)
        with contextlib.closing(evaluator.batches(val)) as batches:
            batch = next(batches)
        maps = [self._color(evaluator.class_maps(variables, batch)[shown]) for variables in networks.values()]
        name = "-".join(["validation/image", *networks, "truth"])
        return {name: visualize.panel(batch.images[shown], *maps, self._color(batch.labels[shown]))}

    def _draw(self, state: TrainState, batch: Batch) -> dict:
        learner = self._learner
        network, method = learner.network, learner.method
        views = learner.views(batch, state.rng, state.step - 1)  # The step that led to `state`.
        student, teacher = state.student, state.networks().get("teacher")
        drawn = {"image_x": batch.image_x, "label_x": batch.label_x}
        drawn["prediction_x"] = network.apply(student, views.image_x).argmax(-1)
        if not method.uses_unlabeled:
            return drawn
        logits = network.apply(student, views.image_u)
        teacher_logits, _ = Objective(network, method).teacher_logits(student, teacher, views, state.step)
        weak = logits if teacher_logits.weak is None else upsample(teacher_logits.weak, *logits.shape[1:3])
        label, weight = pseudo_label(weak, method.selection, state.method_state)
        drawn |= {"image_u": batch.image_u, "pseudo_label": label, "selected": weight * views.valid_u}
        drawn["prediction_u"] = logits.argmax(-1)
        return drawn | {"strong": [denormalize(image, learner.config.data) for image in views.strong]}
