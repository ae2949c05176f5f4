"""TensorBoard panels of what training sees and what the networks make of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dssn_jax import sharding
from dssn_jax import visualize as pictures
from dssn_jax.learner import learner as experiment
from dssn_jax.learner import step as train_step
from dssn_jax.methods import pseudo_labels, views
from dssn_jax.methods import strong_augment as augment
from dssn_jax.models.resize import upsample


class Panels:
    """Draws the first images of the training batch and of the validation images."""

    def __init__(self, parts: experiment.Experiment, rows: int):
        """Takes the number of images of a panel."""
        self._parts, self._rows = parts, rows
        look = functools.partial(_look, parts=parts)
        self._look = jax.jit(look, out_shardings=sharding.replicated(parts.mesh))

    def __call__(self, state, batch: dict, evaluator) -> dict[str, np.ndarray]:
        """Returns pictures uint8 [H, W, 3] by name: labeled, unlabeled (if the method has views of it), validation."""
        seen = self.seen(state, batch)
        color = functools.partial(pictures.colorize, num_classes=len(self._parts.config.data.classes))
        panels = {
            "labeled/image-prediction-truth": pictures.panel(
                seen["image_x"], color(seen["prediction_x"]), color(seen["label_x"])
            )
        }
        if "pseudo_label" in seen:
            strong = [seen[name] for name in ("image_s1", "image_s2") if name in seen]
            maps = [color(seen["pseudo_label"]), pictures.mask(seen["selected"]), color(seen["prediction_u"])]
            names = "-".join(["weak", "strong1", "strong2"][: 1 + len(strong)])
            panels[f"unlabeled/{names}-pseudo_label-selected-prediction"] = pictures.panel(
                seen["image_u"], *strong, *maps
            )
        return panels | self._validation(state, evaluator, color)

    def seen(self, state, batch: dict) -> dict[str, np.ndarray]:
        """Returns what the step reads of the first images of a batch, and the class maps of them, by name."""
        return {name: np.asarray(value[: self._rows]) for name, value in self._look(state, batch).items()}

    def _validation(self, state, evaluator, color) -> dict[str, np.ndarray]:
        networks, shown = state.networks(), slice(self._rows)
        group = next(evaluator.groups(self._parts.sources.val, ahead=0))
        maps = [color(evaluator.class_maps(variables, group)[shown]) for variables in networks.values()]
        name = "-".join(["validation/image", *networks, "truth"])
        return {name: pictures.panel(group.images[shown], *maps, color(group.labels[shown]))}


def _look(state, batch: dict, parts: experiment.Experiment) -> dict[str, jax.Array]:
    """What the step reads of a batch, as pictures and class maps; `selected` are the pixels of the weak view."""
    model, method, data = parts.model, parts.method, parts.config.data
    # `state` is that after the step: the strong views of the batch are those of the step before.
    batch = augment.add_strong_views(batch, parts.recipe, state.rng, state.step - 1)
    seen = views.from_batch(batch, data.mean, data.std, jnp.promote_types(model.dtype, jnp.float32))
    found = {"image_x": batch["image_x"], "label_x": batch["label_x"]}
    found["prediction_x"] = model.apply(state.student, seen.image_x).argmax(-1)
    if not method.uses_unlabeled:
        return found
    labels, _ = train_step.label(state, seen, model, method)
    logits = model.apply(state.student, seen.image_u)
    weak = logits if labels.weak is None else upsample(labels.weak, *logits.shape[1:3])
    label, selected = pseudo_labels.pseudo_label(weak, method.selection)
    found |= {"image_u": batch["image_u"], "pseudo_label": label, "selected": selected & seen.valid_u}
    found["prediction_u"] = logits.argmax(-1)
    for i in range(method.strong_views):
        found[f"image_s{i + 1}"] = seen.mixing(i, batch[f"image_s{i + 1}"], batch[f"image_m{i + 1}"])
    return found
