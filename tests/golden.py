"""Checks this implementation against golden numbers of the original one: `python -m tests.golden DIR`.

DIR holds `golden.json`, which lists cases, and one .npz a case. Weights and inputs are not stored: they are computed
from names (see `weight` and `Case.input`), so that any backbone, size and seed can be checked. Everything is float64.
Prints a line for each case and exits with 1 if an error is over the tolerance.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import zlib

if __name__ == "__main__":  # Before the first use of JAX. Tests set these in conftest.py and ask for x64 themselves.
    os.environ["JAX_ENABLE_X64"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import defaults
from dssn_jax import models
from dssn_jax.evaluation import inference, metrics
from dssn_jax.learner import optimizer as optimizers
from dssn_jax.learner.learner import init_variables
from dssn_jax.learner.state import TrainState
from dssn_jax.learner.step import TrainStep
from dssn_jax.methods import method as methods
from dssn_jax.methods import objective, views
from dssn_jax.methods.losses import Ohem
from dssn_jax.methods.pseudo_labels import ClassAware, Threshold, pseudo_label
from dssn_jax.models.extent import Extent
from dssn_jax.models.network import Network
from dssn_jax.weights import names

TOLERANCES = {"forward": 1e-9, "losses": 1e-9, "step": 1e-6, "evaluate": 1e-9}
# Each program runs only a few times, so compile time counts more; but it is large, so some optimization pays.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": False}
)
# Our names of the terms -> those of the original.
TERMS = {
    "loss_x": "loss_x", "loss_s1": "loss_u_s1", "loss_s2": "loss_u_s2", "loss_fp1": "loss_u_w_fp1",
    "loss_fp2": "loss_u_w_fp2", "contrast_image": "contrast_image", "contrast_feature": "contrast_feature",
}  # fmt: skip


def normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns standard normal float32 numbers that depend on `key` alone."""
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)


def weight(seed: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the made-up float32 weight called `name` in the PyTorch state dict, in PyTorch's `shape`."""
    n = normal(seed + name, shape)
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


class Case:
    """A case of a folder: its manifest entry, stored arrays, inputs and network."""

    def __init__(self, folder: pathlib.Path, manifest: dict, entry: dict):
        self.entry, self.seed = entry, manifest["seed"]
        with np.load(folder / entry["file"]) as stored:
            self.stored = dict(stored)

    def input(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """Returns the made-up float64 input called `name`."""
        return jnp.asarray(normal(f"{self.seed}input:{name}", tuple(shape)), jnp.float64)

    def config(self):
        """Returns the configuration of the case: float64, without feature dropout."""
        config = defaults.get_config()
        types = {"dtype": "float64", "param_dtype": "float64"}
        config.model.update({"encoder": self.entry["backbone"], **types})
        config.method.feature_dropout = 0.0
        return config

    def network(self) -> Network:
        return models.build(self.config().model, self.entry["num_classes"])

    def variables(self, seed_suffix: str = "") -> dict:
        """Returns variables filled by `weight`."""
        shapes = abstract_variables(self.network())
        zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
        state_dict = names.to_state_dict(zeros)
        filled = {name: weight(self.seed + seed_suffix, name, value.shape) for name, value in state_dict.items()}
        return names.from_state_dict(filled, shapes)


@functools.cache
def abstract_variables(network: Network) -> dict:
    """Returns the shapes and dtypes of the network's variables."""
    return jax.eval_shape(functools.partial(init_variables, network), jax.random.PRNGKey(0))


def relative_error(value, expected) -> float:
    """Largest absolute difference over the largest absolute expected value; inf for another shape or a NaN."""
    value, expected = np.asarray(value), np.asarray(expected)
    if value.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind in "bui":
        return 0.0 if np.array_equal(value, expected) else float("inf")
    error = np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-12)
    return float("inf") if np.isnan(error) else float(error)


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
    return outputs | {f"train_stats/{name}": value for name, value in names.to_state_dict(updated).items()}


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
        outputs[f"out/{name}/mask_ratio"] = ratios["mask_ratio"]
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
        outputs |= {f"final/{network}/{name}": value for name, value in names.to_state_dict(variables).items()}
    return outputs


def _gradients(before: TrainState, after: TrainState) -> dict[str, np.ndarray]:
    """Recovers the gradients from SGD's momentum: buffer = 0.9 * old buffer + gradient + decay * parameter."""
    momenta = [optax.tree_utils.tree_get(state.opt_state, "trace") for state in (before, after)]
    params = before.student["params"]
    gradients = jax.tree.map(lambda old, new, param: new - 0.9 * old - 1e-4 * param, *momenta, params)
    return names.to_state_dict({"params": gradients})


def evaluation(case: Case, variables: dict | None = None) -> dict[str, np.ndarray]:
    """Computes class maps and IoU of whole-image and sliding-window prediction of one padded batch."""
    network, classes = case.network(), case.entry["num_classes"]
    variables = case.variables() if variables is None else variables
    count = sum(name.endswith("/mask") for name in case.stored)
    images = [case.input(f"eval{i}", case.stored[f"{i}/shape"])[0] for i in range(count)]
    masks = [case.stored[f"{i}/mask"].reshape(image.shape[:2]) for i, image in enumerate(images)]
    sizes = np.array([image.shape[:2] for image in images])
    padding = [[(0, most - side) for most, side in zip(sizes.max(0), size, strict=True)] for size in sizes]
    batch = jnp.stack([jnp.pad(image, [*pad, (0, 0)]) for image, pad in zip(images, padding, strict=True)])
    labels = jnp.stack([jnp.pad(mask, pad, constant_values=255) for mask, pad in zip(masks, padding, strict=True)])
    extent = Extent(*jnp.asarray(sizes.T, jnp.int32))
    outputs = {}
    for mode, window in (("original", 0), ("sliding", case.entry["crop"])):
        predictions, _ = jit(inference.Inference(network, window).predict)(variables, batch, extent)
        for i, (height, width) in enumerate(sizes):
            outputs[f"{i}/pred_{mode}"] = predictions[i, :height, :width].reshape(case.stored[f"{i}/mask"].shape)
        iou = 100 * metrics.iou(metrics.confusion_matrix(predictions, labels, classes))
        outputs |= {f"iou_{mode}": iou, f"miou_{mode}": iou.mean()}
    return outputs


KINDS = {"forward": forward, "losses": loss_terms, "step": steps, "evaluate": evaluation}
GIVEN = ("in/", "input_shape")  # Stored, but no outputs; of steps and evaluation: masks, boxes and shapes.


def is_output(kind: str, name: str) -> bool:
    """Returns whether a stored array is an output, not an input."""
    last = name.rsplit("/", 1)[-1]
    if kind == "step" and last in ("mask_x", "ignore", "ignore_mix", "box1", "box2"):
        return False
    return not (name.startswith(GIVEN) or kind == "evaluate" and last in ("mask", "shape"))


def check(folder: str | os.PathLike, file: str, report=print) -> bool:
    """Checks one case and reports the largest relative error with its array; returns whether it is within tolerance."""
    folder = pathlib.Path(folder)
    manifest = json.loads((folder / "golden.json").read_text())
    entry = next(entry for entry in manifest["cases"] if entry["file"] == file)
    case, kind = Case(folder, manifest, entry), entry["kind"]
    outputs = KINDS[kind](case)
    expected = {name: value for name, value in case.stored.items() if is_output(kind, name)}
    errors = {
        name: relative_error(outputs[name], value) if name in outputs else float("inf")
        for name, value in expected.items()
    }
    worst = max(errors, key=errors.get)
    passed = errors[worst] <= TOLERANCES[kind]
    verdict = "ok    " if passed else "FAILED"
    report(
        f"{verdict} {file:36s} {len(errors):4d} arrays, error {errors[worst]:.1e} <= {TOLERANCES[kind]:.0e} ({worst})"
    )
    return passed


def files(folder: str | os.PathLike) -> list[str]:
    """Returns the files of the cases of a folder."""
    manifest = json.loads((pathlib.Path(folder) / "golden.json").read_text())
    return [entry["file"] for entry in manifest["cases"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    if not (folder / "golden.json").is_file():
        print(f"{folder / 'golden.json'}: no such file", file=sys.stderr)
        return 2
    passed = [check(folder, file, lambda line: print(line, flush=True)) for file in files(folder)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
