"""One training step, composed from what the method asks for: labels, forwards, losses, update, moving average."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dssn_jax import augment, losses, pseudo_labels, sharding, views
from dssn_jax.methods import Method
from dssn_jax.models import DeepLabV3Plus
from dssn_jax.train_state import TrainState
from dssn_jax.views import Views


class Labels(NamedTuple):
    """Logits [U, H, W, K] that label the strong views; `weak` is None when the student's training forward makes it."""

    weak: jax.Array | None
    partner: jax.Array | None


class Forward(NamedTuple):
    """The student's training forwards: logits, and batch statistics after them."""

    labeled: jax.Array  # [L, H, W, K]
    weak: jax.Array | None  # [U, H, W, K]
    feature: tuple[jax.Array, ...]  # One [U, H, W, K] a feature view.
    strong: tuple[jax.Array, ...]  # One [U, H, W, K] a strong view.
    batch_stats: dict


def compile_step(
    model: DeepLabV3Plus, method: Method, optimizer: optax.GradientTransformation, schedule, data, recipe, mesh
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Returns the jitted step over `mesh`: (state, batch of uint8 images) -> (state, metrics); the state is donated.

    `schedule` gives the learning rate that is reported, `data` (config.data) the mean and deviation of the images,
    `recipe` (`augment.from_config`) says how strong views are drawn; None: the batch holds them.
    """
    dtype = jnp.promote_types(model.dtype, jnp.float32)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        lr = schedule(state.step)
        batch = augment.add_strong_views(batch, recipe, state.rng, state.step)
        state, metrics = step(state, views.from_batch(batch, data.mean, data.std, dtype), model, method, optimizer)
        return state, metrics | {"lr": lr}

    everywhere, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
    return jax.jit(train_step, in_shardings=(everywhere, split), out_shardings=everywhere, donate_argnums=0)


def step(
    state: TrainState, seen: Views, model: DeepLabV3Plus, method: Method, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step on `seen`; returns the new state and scalar metrics (every loss term, mask ratios, grad_norm)."""
    labels, teacher_batch_stats = label(state, seen, model, method)
    dropout_key = jax.random.fold_in(state.rng, state.step)
    warming_up = state.step < method.warmup_steps if method.has_teacher else jnp.array(False)

    def loss_fn(params):
        outputs = forward({"params": params, "batch_stats": state.batch_stats}, seen, model, method, dropout_key)
        terms, ratios = loss_terms(outputs, labels, seen, method)
        return total_loss(terms, method, warming_up), (terms | ratios, outputs.batch_stats)

    (loss, (metrics, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        teacher_batch_stats=teacher_batch_stats,
    )
    if method.has_teacher:
        state = _move_teacher(state, jnp.where(warming_up, 0.0, method.keep_rate))
    return state, {"loss": loss, **metrics, "grad_norm": optax.tree.norm(gradients)}


def label(state: TrainState, seen: Views, model: DeepLabV3Plus, method: Method) -> tuple[Labels, dict | None]:
    """Returns what the labeler says of the weak views, and the teacher's batch statistics after it."""
    if method.strong_views == 0 or method.labeler == "none":
        return Labels(None, None), state.teacher_batch_stats
    if method.labeler == "teacher":
        weak, partner, batch_stats = _teacher_labels(state, seen, model, method)
        return Labels(weak, partner), batch_stats
    partner = model.apply(state.student, seen.image_m)
    weak = model.apply(state.student, seen.image_u) if method.labeler == "student_eval" else None
    return Labels(*jax.lax.stop_gradient((weak, partner))), state.teacher_batch_stats


def _teacher_labels(state: TrainState, seen: Views, model: DeepLabV3Plus, method: Method):
    """The partner first, then the weak view, with batch statistics (updating the running ones) in the first epochs."""

    def with_batch_stats(batch_stats):
        def one(batch_stats, image):
            variables = {"params": state.teacher_params, "batch_stats": batch_stats}
            logits, updated = model.apply(variables, image, train=True, mutable=["batch_stats"])
            return updated["batch_stats"], logits

        # A loop over the two batches, in the original's order: its body is compiled once.
        batch_stats, logits = jax.lax.scan(one, batch_stats, jnp.stack([seen.image_m, seen.image_u]))
        return logits[1], logits[0], batch_stats

    def with_running_stats(batch_stats):
        variables = {"params": state.teacher_params, "batch_stats": batch_stats}
        logits = model.apply(variables, sharding.interleave(seen.image_u, seen.image_m))
        return *sharding.separate(logits, [len(seen.image_u), len(seen.image_m)]), batch_stats

    early = state.step < method.teacher_batch_stats_steps
    return jax.lax.stop_gradient(jax.lax.cond(early, with_batch_stats, with_running_stats, state.teacher_batch_stats))


def forward(variables: dict, seen: Views, model: DeepLabV3Plus, method: Method, dropout_key: jax.Array) -> Forward:
    """Runs the student on labeled and weak views together, then on the strong views together."""
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    with_weak = method.feature_views > 0 or method.labeler == "student"
    parts = [seen.image_x, seen.image_u] if with_weak else [seen.image_x]
    logits, updated = apply(
        variables,
        sharding.interleave(*parts),
        views=method.feature_views,
        rngs={"dropout": dropout_key},
        method="with_feature_views",
    )
    # One [labeled, weak] for the features as they are, then one for each perturbed copy, of which only weak is used.
    clean, *perturbed = [sharding.separate(each, [len(part) for part in parts]) for each in logits]
    strong = ()
    if method.strong_views:
        logits, updated = apply({**variables, **updated}, sharding.interleave(*seen.strong))
        strong = tuple(sharding.separate(logits, [len(view) for view in seen.strong]))
    weak = clean[1] if with_weak else None
    return Forward(clean[0], weak, tuple(each[1] for each in perturbed), strong, updated["batch_stats"])


def loss_terms(outputs: Forward, labels: Labels, seen: Views, method: Method) -> tuple[dict, dict]:
    """Returns the unweighted loss terms, and the shares of valid pixels that are selected."""
    terms = {"loss_x": method.labeled(outputs.labeled, seen.label_x)}
    ratios = {}
    weak = outputs.weak if labels.weak is None else labels.weak
    for i, logits in enumerate(outputs.strong):
        target, selected = pseudo_labels.pseudo_label(seen.mixing(i, weak, labels.partner), method.selection)
        valid = seen.mixing(i, seen.valid_u, seen.valid_m)
        terms[f"loss_s{i + 1}"] = losses.consistency(logits, target, selected, valid)
        ratios[f"mask_ratio_s{i + 1}"] = _ratio(selected, valid)
    if method.uses_unlabeled:
        student = weak if outputs.weak is None else outputs.weak
        target, selected = pseudo_labels.pseudo_label(student, method.selection)
        ratios["mask_ratio"] = _ratio(selected, seen.valid_u)
        for i, logits in enumerate(outputs.feature):
            terms[f"loss_fp{i + 1}"] = losses.consistency(logits, target, selected, seen.valid_u)
    if method.image_contrast_weight:
        terms["contrast_image"] = losses.contrast(*outputs.strong)
    if method.feature_contrast_weight:
        terms["contrast_feature"] = losses.contrast(*outputs.feature)
    return terms, ratios


def total_loss(terms: dict[str, jax.Array], method: Method, warming_up: jax.Array) -> jax.Array:
    """Weighs the terms: method.md, "Loss". Strong views do not count during the teacher's warm-up."""
    if not method.uses_unlabeled:
        return terms["loss_x"]
    strong = sum(terms[f"loss_s{i + 1}"] for i in range(method.strong_views))
    feature = sum(terms[f"loss_fp{i + 1}"] for i in range(method.feature_views))
    total = terms["loss_x"] + method.strong_weight * jnp.where(warming_up, 0.0, strong)
    total += method.feature_weight * feature
    total += method.image_contrast_weight * terms.get("contrast_image", 0.0)
    total += method.feature_contrast_weight * terms.get("contrast_feature", 0.0)
    return 0.5 * total


def _ratio(selected: jax.Array, valid: jax.Array) -> jax.Array:
    """Share of the valid pixels that are selected; 0 if none is valid."""
    return (selected & valid).sum().astype(jnp.float32) / jnp.maximum(valid.sum(), 1).astype(jnp.float32)


def _move_teacher(state: TrainState, keep: jax.Array) -> TrainState:
    """The teacher's parameters and running statistics become keep * teacher + (1 - keep) * student."""

    def average(old, new):
        return (keep * old + (1 - keep) * new).astype(old.dtype)

    return state.replace(
        teacher_params=jax.tree.map(average, state.teacher_params, state.params),
        teacher_batch_stats=jax.tree.map(average, state.teacher_batch_stats, state.batch_stats),
    )
