"""Golden cases with an `encoder`: outputs of UniMatch V2's code (DINOv2, DPT) and of Hugging Face's DINOv3."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import defaults
from configs import methods as method_configs
from dssn_jax import models
from dssn_jax.learner import optimizer as optimizers
from dssn_jax.learner.state import TrainState
from dssn_jax.learner.step import TrainStep
from dssn_jax.methods import method as methods
from dssn_jax.methods import objective, views
from dssn_jax.methods.losses import Ohem
from dssn_jax.models.network import Network
from tests.golden import case as cases
from tests.golden.case import jit, named

TERMS = {"loss": "loss", "loss_x": "loss_x", "loss_s1": "loss_u_s1", "loss_s2": "loss_u_s2", "mask_ratio": "mask_ratio"}
STEPS = 100  # Length of the run that the learning rate decays over.
# Our names, which are Meta's -> those of Hugging Face, for the weights of DINOv3. Projections: see `Case._qkv`.
DINOV3_NAMES = (
    (r"backbone\.", ""),
    (r"cls_token|mask_token", r"embeddings.\g<0>"),
    ("storage_tokens", "embeddings.register_tokens"),
    (r"patch_embed\.proj", "embeddings.patch_embeddings"),
    (r"blocks\.", "layer."),
    (r"attn\.proj", "attention.o_proj"),
    (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
    (r"mlp\.fc1", "mlp.up_proj"),
    (r"mlp\.fc2", "mlp.down_proj"),
    (r"mlp\.w1", "mlp.gate_proj"),
    (r"mlp\.w2", "mlp.up_proj"),
    (r"mlp\.w3", "mlp.down_proj"),
)


class Case(cases.Case):
    """A case of a vision transformer."""

    @property
    def is_dinov3(self) -> bool:
        return self.entry["kind"] == "forward_dinov3"

    def config(self):
        """Returns the configuration of the network in float64."""
        config = defaults.get_config()
        family = "dinov3" if self.is_dinov3 else "dinov2"
        config.model.update({"encoder": f"{family}_{self.entry['encoder']}", "decoder": "dpt", **cases.FLOAT64})
        return config

    def network(self) -> Network:
        return models.build(self.config().model, self.entry.get("num_classes", 2))

    def weight(self, seed: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if not self.is_dinov3:
            return weight(seed, name, shape)
        if ".qkv." in name:
            return self._qkv(seed, name, shape)
        for pattern, replacement in DINOV3_NAMES:
            name = re.sub(pattern, replacement, name)
        return weight(seed, name, shape)

    @staticmethod
    def _qkv(seed: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the three projections in one; keys have no bias."""
        shape, (block, kind) = (shape[0] // 3, *shape[1:]), re.fullmatch(r".*blocks\.(\d+).*\.(\w+)", name).groups()
        parts = [f"layer.{block}.attention.{part}_proj.{kind}" for part in "qkv"]
        return np.concatenate(
            [
                np.zeros(shape, np.float32) if part.endswith("k_proj.bias") else weight(seed, part, shape)
                for part in parts
            ]
        )


def weight(seed: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the made-up float32 weight called `name` in the original's state dict, in its `shape`."""
    n = cases.normal(seed + name, shape)
    if name.endswith(".output_conv.2.weight"):
        return np.float32(0.02) * n
    if len(shape) == 4:
        return n * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if len(shape) == 2 and name.endswith(".weight"):
        return n * np.float32(np.sqrt(1 / shape[1]))
    if name.endswith((".weight", ".gamma", ".lambda1")):
        return np.float32(0.5) + np.float32(0.05) * n
    return np.float32(0.1) * n


def forward(case: Case) -> dict[str, np.ndarray]:
    """Computes logits, and means and first tokens of the four levels."""
    network = case.network()

    @jit
    def run(variables, x):
        levels = network.apply(variables, x, method="encode")
        return levels, network.apply(variables, x)

    levels, logits = run(case.variables(), case.input(case.entry["name"], case.entry["input_shape"]))
    stride = 3 if case.stored["logits"].shape[1] == -(-logits.shape[1] // 3) else 37
    outputs = {"logits": logits[:, ::stride, ::stride]}
    for i, level in enumerate(levels):
        outputs |= {f"level{i}_mean": level.mean((1, 2)), f"level{i}_first": level[:, 0, 0]}
    return outputs


def forward_dinov3(case: Case) -> dict[str, np.ndarray]:
    """Computes all tokens of the last level, and means of the patch tokens of the four."""
    network = case.network()
    prefix = 1 + network.encoder.registers

    @jit
    def run(variables, x):
        return network.apply(variables, x, method=lambda network, x: network.encoder.tokens(x, False))

    levels = run(case.variables(), case.input(case.entry["name"], case.entry["input_shape"]))
    last = levels[-1]
    outputs = {"cls": last[:, 0], "registers": last[:, 1:prefix], "patches": last[:, prefix:][:, ::2, ::3]}
    return outputs | {f"level{i}_mean": level[:, prefix:].mean(1) for i, level in enumerate(levels)}


@dataclasses.dataclass(frozen=True, eq=False)
class GivenDropout:
    """Multiplies the channels by factors [B, C] for the first stream of a pair, by 2 minus them for the second."""

    factors: jax.Array

    def __call__(self, features: tuple[jax.Array, ...], key: jax.Array, index: int) -> tuple[jax.Array, ...]:
        factors = (2 - self.factors if index % 2 else self.factors)[:, None, None]
        return tuple(x * factors.astype(x.dtype) for x in features)


def train_step(case: Case, factors: jax.Array | None) -> TrainStep:
    """Returns the step of the case, with the channel factors of one iteration."""
    entry, config = case.entry, case.config()
    method_configs.apply(config, entry["method"])
    config.method.update({"teacher": "ema", "threshold": entry["threshold"]})
    config.ema.update({"ramp": True, "decay": 0.996, "warmup_steps": 0, "batch_stats_epochs": 0})
    method = methods.from_config(config, 1)
    if factors is not None:
        streams = [dataclasses.replace(stream, perturb=GivenDropout(factors)) for stream in method.streams]
        method = dataclasses.replace(method, streams=tuple(streams))
    if "ohem" in entry:
        ohem = Ohem(entry["ohem"]["threshold"], entry["ohem"]["min_kept"], group=entry["batch"])
        method = dataclasses.replace(method, labeled_loss=ohem)
    config.optimizer.update({
        "name": "adamw", "weight_decay": 0.01, "lr_mults": (("decoder/", float(entry["lr_multi"])),),
    })  # fmt: skip
    poly = optimizers.poly(entry["lr"], STEPS)
    # The released code sets the learning rate after the step that it computes it for.
    optimizer = optimizers.build(config.optimizer, lambda step: poly(jnp.maximum(step - 1, 0)))
    return TrainStep(objective.Objective(case.network(), method), optimizer)


def step_inputs(case: Case, i: int) -> tuple[views.Views, jax.Array | None]:
    """Returns the views and channel factors of iteration `i`.

    Partners are the batch in reverse. The unlabeled images of an even batch are ordered so that these are neighbors,
    as in `views.mix_partner=reversed`; in an odd one partners are given.
    """
    entry, stored = case.entry, case.stored
    batch, side = entry["batch"], entry["crop"]
    images = {name: case.input(f"step{i}:img_{name}", (batch, side, side, 3)) for name in ("x", "u_w", "u_s1", "u_s2")}
    masks = {name: jnp.asarray(stored[f"step{i}/{name}"]) for name in ("mask_x", "ignore", "box1", "box2")}
    given, factors = batch % 2 == 1, stored.get(f"step{i}/channel_mask1")
    order = np.arange(batch)
    if not given:
        order = np.stack([order, order[::-1]], 1)[: batch // 2].ravel()
    unlabeled = {name: value[order] for name, value in {**images, **masks}.items() if name not in ("x", "mask_x")}
    swap = (lambda x: x[::-1]) if given else views.swap_pairs
    streams = range(1, 3 if entry["method"] == "unimatch_v2" else 2)
    boxes = tuple(unlabeled[f"box{v}"] == 1 for v in streams)
    strong = tuple(
        views.mix(unlabeled[f"u_s{v}"], swap(unlabeled[f"u_s{v}"]), box) for v, box in zip(streams, boxes, strict=True)
    )
    weak, valid = unlabeled["u_w"], unlabeled["ignore"] != 255
    partner = swap(weak) if given else None
    inputs = views.Views(images["x"], masks["mask_x"], weak, partner, valid, swap(valid), strong, boxes)
    return inputs, None if factors is None else jnp.asarray(factors, jnp.float64)[order]


def steps(case: Case) -> dict[str, np.ndarray]:
    """Computes whole training iterations: terms, gradient norms, and the networks after the last."""
    initial = train_step(case, None)
    state = initial.init(case.variables(), jax.random.PRNGKey(0)).replace(teacher=case.variables("t"))
    take = jit(lambda state, inputs, factors: train_step(case, factors)(state, inputs))
    outputs = {}
    for i in range(case.entry["steps"]):
        new_state, metrics = take(state, *step_inputs(case, i))
        outputs |= {f"step{i}/{theirs}": metrics[ours] for ours, theirs in TERMS.items() if ours in metrics}
        outputs[f"step{i}/grad_norm"] = metrics["grad_norm"]
        gradients = named({"params": _gradients(state, new_state)}, f"step{i}/grad_norm/")
        outputs |= {name: np.linalg.norm(gradient) for name, gradient in gradients.items()}
        state = new_state
    for network, variables in state.networks().items():
        outputs |= named(variables, f"final/{network}/")
    return outputs


def _gradients(before: TrainState, after: TrainState) -> dict:
    """Recovers the gradients from AdamW's first moment: new = 0.9 * old + 0.1 * gradient."""
    moments = [optax.tree_utils.tree_get(state.opt_state, "mu") for state in (before, after)]
    return jax.tree.map(lambda old, new: (new - 0.9 * old) / (1 - 0.9), *moments)


def evaluation(case: Case) -> dict[str, np.ndarray]:
    """Computes class maps and IoU; the last window is moved in."""
    return cases.evaluate(case, case.variables(), "inside")


KINDS = {"forward": forward, "forward_dinov3": forward_dinov3, "step": steps, "evaluate": evaluation}
