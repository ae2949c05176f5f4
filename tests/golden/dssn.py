"""Golden cases with a `backbone`: outputs of DSSN's code for made-up weights and inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import defaults
from dssn_jax import models
from dssn_jax.learner import optimizer as optimizers
from dssn_jax.learner.state import TrainState
from dssn_jax.learner.step import TrainStep
from dssn_jax.methods import method as methods
from dssn_jax.methods import objective, views
from dssn_jax.methods.losses import Ohem
from dssn_jax.methods.pseudo_labels import ClassAware, Threshold, pseudo_label
from dssn_jax.models.network import Network
from dssn_jax.weights import names
from tests.golden import case as cases
from tests.golden.case import jit, named

# Our names of the terms -> those of the original.
TERMS = {
    "loss_x": "loss_x", "loss_s1": "loss_u_s1", "loss_s2": "loss_u_s2", "loss_fp1": "loss_u_w_fp1",
    "loss_fp2": "loss_u_w_fp2", "contrast_image": "contrast_image", "contrast_feature": "contrast_feature",
}  # fmt: skip


class Case(cases.Case):
    """A case of DSSN's code."""

    def config(self):
        """Returns the configuration of the case: float64, without feature dropout."""
        config = defaults.get_config()
        config.model.update({"encoder": self.entry["backbone"], **cases.FLOAT64})
        config.method.feature_dropout = 0.0
        return config

    def network(self) -> Network:
        return models.build(self.config().model, self.entry["num_classes"])

    def weight(self, seed: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        n = cases.normal(seed + name, shape)
        if name.endswith(".running_var"):
            return np.exp(np.float32(0.1) * n)
        if name.endswith(".running_mean"):
            return np.float32(0.1) * n
        if name == "classifier.weight":
            return n
        if len(shape) == 4:
            return n * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        if name.endswith(".weight"):
            return np.float32(0.5) + np.float32(0.05) * n
        return np.float32(0.1) * n


def forward(case: Case) -> dict[str, np.ndarray]:
    """Computes evaluation- and training-mode outputs of the network."""
    network, variables = case.network(), case.variables()
    x = case.input(case.entry["name"], case.entry["input_shape"])

    @jit
    def run(variables, x):
        features = network.apply(variables, x, method="encode")
        return features, network.apply(variables, x), network.apply(variables, x, train=True, mutable=["batch_stats"])

    (c1, c4), logits, (train_logits, updated) = run(variables, x)
    outputs = {"logits": logits[:, ::3, ::3], "c1_mean": c1.mean((1, 2)), "c4_mean": c4.mean((1, 2))}
    outputs["train_logits"] = train_logits[:, ::3, ::3]
    return outputs | named(updated, "train_stats/")


def loss_terms(case: Case) -> dict[str, np.ndarray]:
    """Computes every loss term and the sums for the three selections, and OHEM."""
    given = {name[3:]: value for name, value in case.stored.items() if name.startswith("in/")}
    logits = {name: jnp.asarray(value, jnp.float64) for name, value in given.items() if value.ndim == 4}
    boxes = (jnp.asarray(given["box1"] == 1), jnp.asarray(given["box2"] == 1))
    valid = {"valid_u": jnp.asarray(given["ignore"] != 255), "valid_m": jnp.asarray(given["ignore_mix"] != 255)}
    views_ = views.Views(None, given["mask_x"], **valid, boxes=boxes)
    streams = {"s1": "pred_u_s1", "s2": "pred_u_s2", "fp1": "pred_u_w_fp1", "fp2": "pred_u_w_fp2"}
    streams = {ours: logits[theirs] for ours, theirs in streams.items()}
    student = objective.StudentLogits(logits["pred_x"], logits["pred_u_w"], streams)
    teacher = objective.TeacherLogits(logits["teacher_u_w"], logits["teacher_u_w_mix"])
    outputs = {}
    for name, selection in {
        "class_aware": ClassAware(),
        "fixed_0.95": Threshold(0.95),
        "fixed_0": Threshold(0.0),
    }.items():
        method = dataclasses.replace(methods.from_config(defaults.get_config(), 1), selection=selection)
        terms, ratios, _ = objective.loss_terms(student, teacher, views_, method, {})
        for ours, theirs in TERMS.items():
            shared = ours == "loss_x" or ours.startswith("contrast")
            outputs[f"out/{theirs}" if shared else f"out/{name}/{theirs}"] = terms[ours]
        outputs[f"out/{name}/mask_ratio"] = ratios["mask_ratio"].astype(jnp.float32)  # As the original's.
        outputs[f"out/{name}/total"] = objective.total_loss(terms, method, jnp.array(False))
        outputs[f"out/{name}/total_warmup"] = objective.total_loss(terms, method, jnp.array(True))
        outputs[f"{name}/mask"] = pseudo_label(student.weak, selection, {})[1]
        for i, box in enumerate(boxes):
            mixed = views.mix(teacher.weak, teacher.partner, box)
            outputs[f"{name}/mask_mix{i + 1}"] = pseudo_label(mixed, selection, {})[1]
    return outputs | _ohem_terms(case, logits["ohem_logits"], given["ohem_target"])


def _ohem_terms(case: Case, logits: jax.Array, target: np.ndarray) -> dict[str, np.ndarray]:
    outputs = {}
    for name in case.stored:
        if name.startswith("out/ohem/"):
            grouping, kept = name.removeprefix("out/ohem/").rsplit("_", 1)
            group = {"all": len(target), "per_image": 1}[grouping]
            outputs[name] = Ohem(0.7, int(kept), group)(logits, jnp.asarray(target))
    return outputs


def _train_step(case: Case) -> TrainStep:
    entry, config = case.entry, case.config()
    if entry["recipe"] == "cityscapes":
        config.method.update({"selection": "threshold", "threshold": 0.0})
    method = methods.from_config(config, steps_per_epoch=entry["steps"])  # Batch statistics in all steps.
    if "ohem" in entry:
        ohem = Ohem(entry["ohem"]["threshold"], entry["ohem"]["min_kept"], group=entry["batch"])
        method = dataclasses.replace(method, labeled_loss=ohem)
    config.optimizer.lr_mults = (("decoder/", float(entry["lr_multi"])),)
    optimizer = optimizers.build(config.optimizer, optax.constant_schedule(entry["lr"]))
    return TrainStep(objective.Objective(case.network(), method), optimizer)


def _step_views(case: Case, i: int) -> views.Views:
    entry, stored = case.entry, case.stored
    shape = (entry["batch"], entry["crop"], entry["crop"], 3)
    images = {name: case.input(f"step{i}:img_{name}", shape) for name in ("x", "u_w", "u_s1", "u_s2")}
    partners = {name: case.input(f"step{i}:img_{name}_mix", shape) for name in ("u_w", "u_s1", "u_s2")}
    masks = {
        name: jnp.asarray(stored[f"step{i}/{name}"]) for name in ("mask_x", "ignore", "ignore_mix", "box1", "box2")
    }
    boxes = (masks["box1"] == 1, masks["box2"] == 1)
    strong = tuple(
        views.mix(images[name], partners[name], box) for name, box in zip(("u_s1", "u_s2"), boxes, strict=True)
    )
    valid = (masks["ignore"] != 255, masks["ignore_mix"] != 255)
    return views.Views(images["x"], masks["mask_x"], images["u_w"], partners["u_w"], *valid, strong, boxes)


def steps(case: Case) -> dict[str, np.ndarray]:
    """Computes whole training iterations: terms, gradient norms, and the networks after the last."""
    train_step = _train_step(case)
    state, teacher = train_step.init(case.variables(), jax.random.PRNGKey(0)), case.variables("t")
    state = state.replace(teacher=teacher)
    take, outputs = jit(train_step), {}
    for i in range(case.entry["steps"]):
        new_state, terms = take(state, _step_views(case, i))
        for ours, theirs in (TERMS | {"loss": "loss", "grad_norm": "grad_norm"}).items():
            outputs[f"step{i}/{theirs}"] = terms[ours]
        for name, gradient in _gradients(state, new_state).items():
            outputs[f"step{i}/grad_norm/{name}"] = np.linalg.norm(gradient)
        state = new_state
    for network, variables in state.networks().items():
        outputs |= named(variables, f"final/{network}/")
    return outputs


def _gradients(before: TrainState, after: TrainState) -> dict[str, np.ndarray]:
    """Recovers the gradients from SGD's momentum: buffer = 0.9 * old buffer + gradient + decay * parameter."""
    momenta = [optax.tree_utils.tree_get(state.opt_state, "trace") for state in (before, after)]
    params = before.student["params"]
    gradients = jax.tree.map(lambda old, new, param: new - 0.9 * old - 1e-4 * param, *momenta, params)
    return names.to_state_dict({"params": gradients})


def evaluation(case: Case) -> dict[str, np.ndarray]:
    """Computes class maps and IoU; windows at the edges are cut short."""
    return cases.evaluate(case, case.variables(), "cut")


KINDS = {"forward": forward, "losses": loss_terms, "step": steps, "evaluate": evaluation}
