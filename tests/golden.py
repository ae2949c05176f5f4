"""Checks this implementation against golden numbers of the original one: `python -m tests.golden DIR`.

DIR holds `golden.json`, which lists cases, and one .npz a case. Weights and inputs are not stored: they are computed
from names (see `weight` and `Case.input`), so that any backbone, size and seed can be checked. Everything is float64.
Prints a line for each case and exits with 1 if an error is over the tolerance.
"""

import argparse
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

from dssn_jax import models
from dssn_jax.evaluation import inference, metrics
from dssn_jax.learner import state as train_state
from dssn_jax.learner import step as train_step
from dssn_jax.methods import losses, pseudo_labels, views
from dssn_jax.methods.method import Method
from dssn_jax.models.extent import Extent
from dssn_jax.weights import names as state_dicts

TOLERANCES = {"forward": 1e-9, "losses": 1e-9, "step": 1e-6, "evaluate": 1e-9}
DSSN = dict(
    strong_views=2, feature_views=2, labeler="teacher", strong_weight=0.25, feature_weight=0.25,
    image_contrast_weight=0.01, feature_contrast_weight=0.01,
)  # fmt: skip
# Each program runs only a few times: compiling it counts for more. It is large, so not all optimization can be missed.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": False}
)
# Our names of the terms -> those of the original.
TERMS = {
    "loss_x": "loss_x", "loss_s1": "loss_u_s1", "loss_s2": "loss_u_s2", "loss_fp1": "loss_u_w_fp1",
    "loss_fp2": "loss_u_w_fp2", "contrast_image": "contrast_image", "contrast_feature": "contrast_feature",
}  # fmt: skip


def normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 numbers that depend on `key` alone."""
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)


def weight(seed: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The made-up float32 weight called `name` in the PyTorch state dict, in PyTorch's `shape`."""
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
    """One case of a folder: its manifest entry, stored arrays, inputs and networks."""

    def __init__(self, folder: pathlib.Path, manifest: dict, entry: dict):
        self.entry, self.seed = entry, manifest["seed"]
        with np.load(folder / entry["file"]) as stored:
            self.stored = dict(stored)

    def input(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """The made-up float64 input called `name`."""
        return jnp.asarray(normal(f"{self.seed}input:{name}", tuple(shape)), jnp.float64)

    def model(self) -> models.DeepLabV3Plus:
        types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        backbone = models.BACKBONES[self.entry["backbone"]](**types)
        return models.DeepLabV3Plus(backbone, self.entry["num_classes"], feature_dropout=0.0, **types)

    def variables(self, seed_suffix: str = "") -> dict:
        """Variables filled by `weight`."""
        shapes = abstract_variables(self.model())
        zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
        state_dict = state_dicts.to_state_dict(zeros)
        filled = {name: weight(self.seed + seed_suffix, name, value.shape) for name, value in state_dict.items()}
        return state_dicts.from_state_dict(filled, shapes)


@functools.cache
def abstract_variables(model: models.DeepLabV3Plus) -> dict:
    """Shapes and dtypes of the network's variables."""
    return jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.zeros((1, 33, 33, 3)))


def relative_error(found, expected) -> float:
    """Largest absolute difference over the largest absolute expected value; inf for another shape or a NaN."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind in "bui":
        return 0.0 if np.array_equal(found, expected) else float("inf")
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12)
    return float("inf") if np.isnan(error) else float(error)


def forward(case: Case) -> dict[str, np.ndarray]:
    """Evaluation- and training-mode outputs of the network."""
    model, variables = case.model(), case.variables()
    x = case.input(case.entry["name"], case.entry["input_shape"])
    c1, c4 = jit(lambda v, x: model.apply(v, x, method="features"))(variables, x)
    logits = jit(model.apply)(variables, x)
    train_logits, updated = jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
    found = {"logits": logits[:, ::3, ::3], "c1_mean": c1.mean((1, 2)), "c4_mean": c4.mean((1, 2))}
    found["train_logits"] = train_logits[:, ::3, ::3]
    statistics = state_dicts.to_state_dict({"params": {}, **updated})
    return found | {f"train_stats/{name}": value for name, value in statistics.items()}


def loss_terms(case: Case) -> dict[str, np.ndarray]:
    """Every loss term and sum for the three selections, and OHEM."""
    given = {name[3:]: value for name, value in case.stored.items() if name.startswith("in/")}
    logits = {name: jnp.asarray(value, jnp.float64) for name, value in given.items() if value.ndim == 4}
    seen = views.Views(
        None, given["mask_x"],
        valid_u=jnp.asarray(given["ignore"] != 255), valid_m=jnp.asarray(given["ignore_mix"] != 255),
        mixing=views.Mixing((jnp.asarray(given["box1"] == 1), jnp.asarray(given["box2"] == 1))),
    )  # fmt: skip
    outputs = train_step.Forward(
        logits["pred_x"], logits["pred_u_w"], (logits["pred_u_w_fp1"], logits["pred_u_w_fp2"]),
        (logits["pred_u_s1"], logits["pred_u_s2"]), {},
    )  # fmt: skip
    labels = train_step.Labels(logits["teacher_u_w"], logits["teacher_u_w_mix"])
    selections = {"class_aware": pseudo_labels.ClassAware(), "fixed_0.95": pseudo_labels.Threshold(0.95)}
    found = {}
    for name, selection in (selections | {"fixed_0": pseudo_labels.Threshold(0.0)}).items():
        method = Method(**DSSN, selection=selection)
        terms, ratios = train_step.loss_terms(outputs, labels, seen, method)
        for ours, theirs in TERMS.items():
            shared = ours == "loss_x" or ours.startswith("contrast")
            found[f"out/{theirs}" if shared else f"out/{name}/{theirs}"] = terms[ours]
        found[f"out/{name}/mask_ratio"] = ratios["mask_ratio"]
        found[f"out/{name}/total"] = train_step.total_loss(terms, method, jnp.array(False))
        found[f"out/{name}/total_warmup"] = train_step.total_loss(terms, method, jnp.array(True))
        found[f"{name}/mask"] = pseudo_labels.pseudo_label(outputs.weak, selection)[1]
        for i in range(2):
            mixed = seen.mixing(i, labels.weak, labels.partner)
            found[f"{name}/mask_mix{i + 1}"] = pseudo_labels.pseudo_label(mixed, selection)[1]
    return found | _ohem_terms(case, logits["ohem_logits"], given["ohem_target"])


def _ohem_terms(case: Case, logits: jax.Array, target: np.ndarray) -> dict[str, np.ndarray]:
    found = {}
    for name in case.stored:
        if name.startswith("out/ohem/"):
            grouping, kept = name.removeprefix("out/ohem/").rsplit("_", 1)
            group = {"all": len(target), "per_image": 1}[grouping]
            found[name] = losses.ohem_cross_entropy(logits, target, 0.7, int(kept), group)
    return found


def _step_method(entry: dict) -> Method:
    options = {"selection": pseudo_labels.ClassAware(), "teacher_batch_stats_steps": entry["steps"]}
    if "ohem" in entry:
        ohem = entry["ohem"]
        options |= dict(labeled_loss="ohem", ohem_threshold=ohem["threshold"], ohem_min_kept=ohem["min_kept"])
        options |= dict(ohem_group=entry["batch"])
    if entry["recipe"] == "cityscapes":
        options["selection"] = pseudo_labels.Threshold(0.0)
    return Method(**DSSN, **options)


def _step_views(case: Case, i: int) -> views.Views:
    entry, stored = case.entry, case.stored
    shape = (entry["batch"], entry["crop"], entry["crop"], 3)
    images = {name: case.input(f"step{i}:img_{name}", shape) for name in ("x", "u_w", "u_s1", "u_s2")}
    partners = {name: case.input(f"step{i}:img_{name}_mix", shape) for name in ("u_w", "u_s1", "u_s2")}
    masks = {
        name: jnp.asarray(stored[f"step{i}/{name}"]) for name in ("mask_x", "ignore", "ignore_mix", "box1", "box2")
    }
    return views.mix(
        images["x"], masks["mask_x"], images["u_w"], partners["u_w"],
        [images["u_s1"], images["u_s2"]], [partners["u_s1"], partners["u_s2"]],
        masks["ignore"] != 255, masks["ignore_mix"] != 255, [masks["box1"] == 1, masks["box2"] == 1],
    )  # fmt: skip


def steps(case: Case) -> dict[str, np.ndarray]:
    """Whole training iterations: terms, gradient norms, and the networks after the last."""
    from dssn_jax.learner import optimizer as optimizers

    entry, model, method = case.entry, case.model(), _step_method(case.entry)
    optimizer = optimizers.sgd(optax.constant_schedule(entry["lr"]), entry["lr_multi"], 0.9, 1e-4)
    state = train_state.create(case.variables(), optimizer, jax.random.PRNGKey(0), teacher=True)
    teacher = case.variables("t")
    state = state.replace(teacher_params=teacher["params"], teacher_batch_stats=teacher["batch_stats"])
    # SGD's momentum buffer tells each gradient: buffer = 0.9 * old buffer + gradient + decay * parameter.
    take = jit(lambda state, seen: train_step.step(state, seen, model, method, optimizer))
    found = {}
    for i in range(entry["steps"]):
        new_state, terms = take(state, _step_views(case, i))
        for ours, theirs in (TERMS | {"loss": "loss", "grad_norm": "grad_norm"}).items():
            found[f"step{i}/{theirs}"] = terms[ours]
        for name, gradient in _gradients(state, new_state).items():
            found[f"step{i}/grad_norm/{name}"] = np.linalg.norm(gradient)
        state = new_state
    for who, variables in (("student", state.student), ("teacher", state.teacher)):
        found |= {f"final/{who}/{name}": value for name, value in state_dicts.to_state_dict(variables).items()}
    return found


def _gradients(before: train_state.TrainState, after: train_state.TrainState) -> dict[str, np.ndarray]:
    momenta = [optax.tree_utils.tree_get(state.opt_state, "trace") for state in (before, after)]
    gradients = jax.tree.map(lambda old, new, param: new - 0.9 * old - 1e-4 * param, *momenta, before.params)
    return state_dicts.to_state_dict({"params": gradients, "batch_stats": {}})


def evaluation(case: Case, variables: dict | None = None) -> dict[str, np.ndarray]:
    """Class maps and IoU of whole-image and sliding-window prediction; the images are one padded batch."""
    model, classes = case.model(), case.entry["num_classes"]
    variables = case.variables() if variables is None else variables
    count = sum(name.endswith("/mask") for name in case.stored)
    images = [case.input(f"eval{i}", case.stored[f"{i}/shape"])[0] for i in range(count)]
    masks = [case.stored[f"{i}/mask"].reshape(image.shape[:2]) for i, image in enumerate(images)]
    sizes = np.array([image.shape[:2] for image in images])
    padding = [[(0, most - side) for most, side in zip(sizes.max(0), size, strict=True)] for size in sizes]
    batch = jnp.stack([jnp.pad(image, [*pad, (0, 0)]) for image, pad in zip(images, padding, strict=True)])
    labels = jnp.stack([jnp.pad(mask, pad, constant_values=255) for mask, pad in zip(masks, padding, strict=True)])
    extent = Extent(*jnp.asarray(sizes.T, jnp.int32))
    found = {}
    for mode, window in (("original", 0), ("sliding", case.entry["crop"])):
        predictions = jit(functools.partial(inference.Inference(window).predict, model))(variables, batch, extent)
        for i, (height, width) in enumerate(sizes):
            found[f"{i}/pred_{mode}"] = predictions[i, :height, :width].reshape(case.stored[f"{i}/mask"].shape)
        iou = 100 * metrics.iou(metrics.confusion_matrix(predictions, labels, classes))
        found |= {f"iou_{mode}": iou, f"miou_{mode}": iou.mean()}
    return found


KINDS = {"forward": forward, "losses": loss_terms, "step": steps, "evaluate": evaluation}
GIVEN = ("in/", "input_shape")  # Stored, but no outputs; of steps and evaluation: masks, boxes and shapes.


def is_output(kind: str, name: str) -> bool:
    """Tells the stored outputs from the stored inputs."""
    last = name.rsplit("/", 1)[-1]
    if kind == "step" and last in ("mask_x", "ignore", "ignore_mix", "box1", "box2"):
        return False
    return not (name.startswith(GIVEN) or kind == "evaluate" and last in ("mask", "shape"))


def check(folder: str | os.PathLike, file: str, report=print) -> bool:
    """Checks one case, reports the largest relative error and where it is; True if it is within the tolerance."""
    folder = pathlib.Path(folder)
    manifest = json.loads((folder / "golden.json").read_text())
    entry = next(entry for entry in manifest["cases"] if entry["file"] == file)
    case, kind = Case(folder, manifest, entry), entry["kind"]
    found = KINDS[kind](case)
    expected = {name: value for name, value in case.stored.items() if is_output(kind, name)}
    errors = {
        name: relative_error(found[name], value) if name in found else float("inf") for name, value in expected.items()
    }
    worst = max(errors, key=errors.get)
    passed = errors[worst] <= TOLERANCES[kind]
    verdict = "ok    " if passed else "FAILED"
    report(
        f"{verdict} {file:36s} {len(errors):4d} arrays, error {errors[worst]:.1e} <= {TOLERANCES[kind]:.0e} ({worst})"
    )
    return passed


def files(folder: str | os.PathLike) -> list[str]:
    """The files of the cases of a folder."""
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
