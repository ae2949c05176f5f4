"""One training step, composed from what the method asks for: labels, forwards, losses, update, moving average."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dssn_jax import sharding
from dssn_jax.learner.state import TrainState
from dssn_jax.methods import losses, pseudo_labels, views
from dssn_jax.methods import strong_augment as augment
from dssn_jax.methods.method import Method
from dssn_jax.methods.views import Views
from dssn_jax.models import DeepLabV3Plus
from dssn_jax.models.resize import upsample


class Labels(NamedTuple):
    """Logits that label the strong views, coarse ([U, h, w, K], for `upsample`) or of the size of the views.

    `weak` is None when the student's training forward makes it.
    """

    weak: jax.Array | None
    partner: jax.Array | None


class Forward(NamedTuple):
    """The student's training forwards: logits, coarse or of the size of the views, and batch statistics after them."""

    labeled: jax.Array  # [L, h, w, K]
    weak: jax.Array | None  # [U, h, w, K]
    feature: tuple[jax.Array, ...]  # One [U, h, w, K] a feature view.
    strong: tuple[jax.Array, ...]  # One [U, h, w, K] a strong view.
    batch_stats: dict


class Statistics(NamedTuple):
    """Running statistics of batch norm, of the student and of the teacher (None without one)."""

    student: dict
    teacher: dict | None


def compile_step(
    model: DeepLabV3Plus,
    method: Method,
    optimizer: optax.GradientTransformation,
    schedule,
    data,
    recipe,
    mesh,
    accumulation: int = 1,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Returns the jitted step over `mesh`: (state, batch of uint8 images) -> (state, metrics); the state is donated.

    `schedule` gives the learning rate that is reported, `data` (config.data) the mean and deviation of the images,
    `recipe` (`augment.from_config`) says how strong views are drawn; None: the batch holds them. With `accumulation`
    the batch is gone through in so many parts, and their mean gradient makes the one update of the step.
    """
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    see = functools.partial(views.from_batch, mean=data.mean, std=data.std, dtype=dtype)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        lr = schedule(state.step)
        batch = augment.add_strong_views(batch, recipe, state.rng, state.step)
        if accumulation == 1:
            state, metrics = step(state, see(batch), model, method, optimizer)
        else:
            parts = sharding.split_rows(batch, accumulation, mesh)
            state, metrics = accumulated_step(state, parts, see, model, method, optimizer)
        return state, metrics | {"lr": lr}

    everywhere, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
    return jax.jit(train_step, in_shardings=(everywhere, split), out_shardings=everywhere, donate_argnums=0)


def step(
    state: TrainState, seen: Views, model: DeepLabV3Plus, method: Method, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step on `seen`; returns the new state and scalar metrics (every loss term, mask ratios, grad_norm)."""
    key = jax.random.fold_in(state.rng, state.step)
    gradients, metrics, statistics = differentiate(state, seen, model, method, key)
    return _update(state, gradients, metrics, statistics, method, optimizer)


def accumulated_step(
    state: TrainState,
    batches: dict,
    see: Callable[[dict], Views],
    model: DeepLabV3Plus,
    method: Method,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step on the mean gradient of batches [parts, rows, ...], each turned into views when it is its turn.

    Batch norm has the statistics of each part, and the running ones move once a part; every mean over pixels, and the
    choice of hard pixels (OHEM), is over those of the part.
    """
    parts = len(jax.tree.leaves(batches)[0])
    key = jax.random.fold_in(state.rng, state.step)

    def one(carry, part):
        total, statistics = carry
        number, batch = part
        current = state.replace(batch_stats=statistics.student, teacher_batch_stats=statistics.teacher)
        found = differentiate(current, see(batch), model, method, jax.random.fold_in(key, number))
        gradients, metrics, statistics = found
        return (jax.tree.map(jnp.add, total, gradients), statistics), metrics

    start = jax.tree.map(jnp.zeros_like, state.params), Statistics(state.batch_stats, state.teacher_batch_stats)
    (total, statistics), metrics = jax.lax.scan(one, start, (jnp.arange(parts), batches))
    gradients = jax.tree.map(lambda gradient: gradient / parts, total)
    metrics = {name: values.mean() for name, values in metrics.items()}
    return _update(state, gradients, metrics, statistics, method, optimizer)


def differentiate(
    state: TrainState, seen: Views, model: DeepLabV3Plus, method: Method, dropout_key: jax.Array
) -> tuple[dict, dict[str, jax.Array], Statistics]:
    """Returns the gradients of the loss on `seen`, scalar metrics, and the running statistics after the forwards."""
    labels, teacher_batch_stats = label(state, seen, model, method)

    def loss_fn(params):
        outputs = forward({"params": params, "batch_stats": state.batch_stats}, seen, model, method, dropout_key)
        terms, ratios = loss_terms(outputs, labels, seen, method)
        return total_loss(terms, method, _warming_up(state, method)), (terms | ratios, outputs.batch_stats)

    (loss, (metrics, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return gradients, {"loss": loss, **metrics}, Statistics(batch_stats, teacher_batch_stats)


def _update(state: TrainState, gradients, metrics: dict, statistics: Statistics, method: Method, optimizer):
    """Moves the student by the gradients, and the teacher after it."""
    warming_up = _warming_up(state, method)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=statistics.student,
        opt_state=opt_state,
        teacher_batch_stats=statistics.teacher,
    )
    if method.has_teacher:
        state = _move_teacher(state, jnp.where(warming_up, 0.0, method.keep_rate))
    return state, {**metrics, "grad_norm": optax.tree.norm(gradients)}


def _warming_up(state: TrainState, method: Method) -> jax.Array:
    return state.step < method.warmup_steps if method.has_teacher else jnp.array(False)


def label(state: TrainState, seen: Views, model: DeepLabV3Plus, method: Method) -> tuple[Labels, dict | None]:
    """Returns what the labeler says of the weak views, and the teacher's batch statistics after it."""
    if method.strong_views == 0 or method.teacher == "none":
        return Labels(None, None), state.teacher_batch_stats
    if method.teacher == "teacher":
        weak, partner, batch_stats = _teacher_labels(state, seen, model, method)
        return Labels(weak, partner), batch_stats
    coarse = functools.partial(model.apply, method="coarse")
    partner = coarse(state.student, seen.image_m)
    weak = coarse(state.student, seen.image_u) if method.teacher == "student_eval" else None
    return Labels(*jax.lax.stop_gradient((weak, partner))), state.teacher_batch_stats


def _teacher_labels(state: TrainState, seen: Views, model: DeepLabV3Plus, method: Method):
    """The partner first, then the weak view, with batch statistics (updating the running ones) in the first epochs."""

    def with_batch_stats(batch_stats):
        def one(batch_stats, image):
            variables = {"params": state.teacher_params, "batch_stats": batch_stats}
            logits, updated = model.apply(variables, image, train=True, mutable=["batch_stats"], method="coarse")
            return updated["batch_stats"], logits

        # A loop over the two batches, in the original's order: its body is compiled once.
        batch_stats, logits = jax.lax.scan(one, batch_stats, jnp.stack([seen.image_m, seen.image_u]))
        return logits[1], logits[0], batch_stats

    def with_running_stats(batch_stats):
        variables = {"params": state.teacher_params, "batch_stats": batch_stats}
        logits = model.apply(variables, sharding.interleave(seen.image_u, seen.image_m), method="coarse")
        return *sharding.separate(logits, [len(seen.image_u), len(seen.image_m)]), batch_stats

    early = state.step < method.teacher_batch_stats_steps
    return jax.lax.stop_gradient(jax.lax.cond(early, with_batch_stats, with_running_stats, state.teacher_batch_stats))


def forward(variables: dict, seen: Views, model: DeepLabV3Plus, method: Method, dropout_key: jax.Array) -> Forward:
    """Runs the student on labeled and weak views together, then on the strong views together."""
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    with_weak = method.feature_views > 0 or method.teacher == "student"
    (clean, feature), updated = apply(
        variables,
        (seen.image_x, seen.image_u) if with_weak else (seen.image_x,),
        views=method.feature_views,
        perturb_all=method.perturb_labeled,
        rngs={"dropout": dropout_key},
        method="coarse_with_feature_views",
    )
    strong = ()
    if method.strong_views:
        logits, updated = apply({**variables, **updated}, sharding.interleave(*seen.strong), method="coarse")
        strong = tuple(sharding.separate(logits, [len(view) for view in seen.strong]))
    return Forward(clean[0], clean[1] if with_weak else None, feature, strong, updated["batch_stats"])


def loss_terms(outputs: Forward, labels: Labels, seen: Views, method: Method) -> tuple[dict, dict]:
    """Returns the unweighted loss terms, and the shares of valid pixels that are selected."""
    terms, ratios = {"loss_x": _labeled_term(outputs.labeled, seen.label_x, method)}, {}
    if not method.uses_unlabeled:
        return terms, ratios
    size = seen.valid_u.shape[1:]
    weak = outputs.weak if labels.weak is None else labels.weak
    if outputs.strong:
        weak_full, partner_full = (upsample(jax.lax.stop_gradient(x), *size) for x in (weak, labels.partner))
        targets = []
        for i in range(len(outputs.strong)):
            mixed = seen.mixing(i, weak_full, partner_full)
            valid = seen.mixing(i, seen.valid_u, seen.valid_m)
            targets.append((*pseudo_labels.pseudo_label(mixed, method.selection), valid))
            ratios[f"mask_ratio_s{i + 1}"] = _ratio(*targets[-1][1:])
        consistency, contrast = _view_terms(outputs.strong, tuple(targets))
        terms |= {f"loss_s{i + 1}": term for i, term in enumerate(consistency)}
    student = weak if outputs.weak is None else outputs.weak
    student_full = upsample(jax.lax.stop_gradient(student), *size)
    target = (*pseudo_labels.pseudo_label(student_full, method.selection), seen.valid_u)
    ratios["mask_ratio"] = _ratio(*target[1:])
    if method.image_contrast_weight:
        terms["contrast_image"] = contrast
    if outputs.feature:
        consistency, contrast = _view_terms(outputs.feature, (target,) * len(outputs.feature))
        terms |= {f"loss_fp{i + 1}": term for i, term in enumerate(consistency)}
    if method.feature_contrast_weight:
        terms["contrast_feature"] = contrast
    return terms, ratios


# The terms keep coarse logits for the backward pass and bring them to size again there: everything else is as large as
# the images times the number of classes.
@functools.partial(jax.checkpoint, static_argnums=2, policy=losses.KEEP_SELECTIONS)
def _labeled_term(logits: jax.Array, labels: jax.Array, method: Method) -> jax.Array:
    return method.labeled(upsample(logits, *labels.shape[1:]), labels)


@jax.checkpoint
def _view_terms(views: tuple[jax.Array, ...], targets) -> tuple[list[jax.Array], jax.Array | None]:
    """Consistency of each view with its target (labels, selected pixels, valid pixels), and the contrast of a pair."""
    full = [upsample(view, *target[0].shape[1:]) for view, target in zip(views, targets, strict=True)]
    consistency = [losses.consistency(logits, *target) for logits, target in zip(full, targets, strict=True)]
    return consistency, losses.contrast(*full) if len(full) == 2 else None


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
