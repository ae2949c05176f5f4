"""The loss of one step: teacher logits, the student's streams, loss terms and their weighted sum."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dssn_jax import sharding
from dssn_jax.methods import losses
from dssn_jax.methods.method import Method
from dssn_jax.methods.pseudo_labels import pseudo_label
from dssn_jax.methods.views import Views, mix
from dssn_jax.models.network import Network
from dssn_jax.models.resize import upsample


class TeacherLogits(NamedTuple):
    """Logits from which strong views get their pseudo-labels, [U, h, w, K]: low-resolution or of the size of the views.

    `weak` is None where the student's training forward provides it.
    """

    weak: jax.Array | None
    partner: jax.Array | None


class StudentLogits(NamedTuple):
    """Logits of the student's training forwards, low-resolution or of the size of the views."""

    labeled: jax.Array  # [L, h, w, K]
    weak: jax.Array | None  # [U, h, w, K]
    streams: dict[str, jax.Array]  # [U, h, w, K] by name of the stream.


@dataclasses.dataclass(frozen=True)
class Objective:
    """A network trained by a method."""

    network: Network
    method: Method

    def teacher_logits(
        self, student: dict, teacher: dict | None, views: Views, step: jax.Array
    ) -> tuple[TeacherLogits, dict | None]:
        """Predicts the weak views and their CutMix partners for the pseudo-labels of the strong views.

        `student` and `teacher` are variables of the network. Returns the logits, without a gradient, and the teacher's
        variables, whose running statistics move while it predicts with batch statistics.
        """
        if not self.method.of_view("strong"):
            return TeacherLogits(None, None), teacher
        if self.method.has_ema:
            logits, teacher = self._ema_logits(teacher, views, step)
        else:
            predict = functools.partial(self.network.apply, student, method="low_res_logits")
            weak = predict(views.image_u) if self.method.teacher == "student_eval" else None
            logits = TeacherLogits(weak, predict(views.image_m))
        return jax.lax.stop_gradient((logits, teacher))

    def _ema_logits(self, teacher: dict, views: Views, step: jax.Array) -> tuple[TeacherLogits, dict]:
        """Predicts with batch statistics in the first `batch_stats_steps` steps, then with running statistics."""

        def with_running_stats(teacher: dict):
            images = sharding.concat_sharded(views.image_u, views.image_m)
            logits = self.network.apply(teacher, images, method="low_res_logits")
            return TeacherLogits(*sharding.split_sharded(logits, [len(views.image_u), len(views.image_m)])), teacher

        def with_batch_stats(teacher: dict):
            # The partner first, then the weak view, as the original does; a scan, so that its body is compiled once.
            def body(teacher: dict, images: jax.Array):
                logits, teacher = self._train_apply(teacher, images, "low_res_logits")
                return teacher, logits

            teacher, logits = jax.lax.scan(body, teacher, jnp.stack([views.image_m, views.image_u]))
            return TeacherLogits(logits[1], logits[0]), teacher

        if self.method.ema.batch_stats_steps == 0 or set(teacher) == {"params"}:
            return with_running_stats(teacher)
        early = step < self.method.ema.batch_stats_steps
        return jax.lax.cond(early, with_batch_stats, with_running_stats, teacher)

    def student_logits(self, variables: dict, views: Views, key: jax.Array) -> tuple[StudentLogits, dict]:
        """Runs the student in training mode: labeled and weak images with feature streams, then the strong streams.

        `key` is consumed by perturbations. Returns the logits and the variables with updated statistics. Batches are
        joined so that rows stay on their device; everything that is joined shares its batch statistics.
        """
        feature, strong = self.method.of_view("feature"), self.method.of_view("strong")
        needs_weak = bool(feature) or self.method.teacher == "student"
        images = (views.image_x, views.image_u) if needs_weak else (views.image_x,)
        sizes = [len(image) for image in images]
        features, variables = self._train_apply(variables, sharding.concat_sharded(*images), "encode")
        # The original perturbs the labeled images too; nothing reads their logits, but they enter batch statistics.
        source = features
        if feature and not self.method.perturb_labeled:
            source = tuple(sharding.split_sharded(x, sizes)[-1] for x in features)
        batches = [features, *(self._perturb(stream, source, key) for stream in feature)]
        logits, variables = self._decode(variables, batches)
        clean = sharding.split_sharded(logits[0], sizes)
        copies = logits[1:]
        if self.method.perturb_labeled:
            copies = [sharding.split_sharded(x, sizes)[-1] for x in copies]
        outputs = dict(zip((stream.name for stream in feature), copies, strict=True))
        if strong:
            logits, variables = self._strong_logits(variables, strong, views, key)
            outputs |= logits
        return StudentLogits(clean[0], clean[1] if needs_weak else None, outputs), variables

    def _strong_logits(self, variables: dict, streams, views: Views, key: jax.Array) -> tuple[dict, dict]:
        sizes = [len(image) for image in views.strong]
        features, variables = self._train_apply(variables, sharding.concat_sharded(*views.strong), "encode")
        if any(stream.perturb for stream in streams):
            parts = zip(*(sharding.split_sharded(x, sizes) for x in features), strict=True)
            perturbed = [self._perturb(stream, x, key) for stream, x in zip(streams, parts, strict=True)]
            logits, variables = self._decode(variables, perturbed)
        else:
            logits, variables = self._train_apply(variables, features, "decode")
            logits = sharding.split_sharded(logits, sizes)
        return {stream.name: x for stream, x in zip(streams, logits, strict=True)}, variables

    def _perturb(self, stream, features: tuple[jax.Array, ...], key: jax.Array) -> tuple[jax.Array, ...]:
        index = self.method.streams.index(stream)
        return tuple(features) if stream.perturb is None else stream.perturb(tuple(features), key, index)

    def _decode(self, variables: dict, batches: list) -> tuple[list[jax.Array], dict]:
        """Decodes batches of feature maps together; returns the logits of each batch."""
        joined = tuple(sharding.concat_sharded(*maps) for maps in zip(*batches, strict=True))
        logits, variables = self._train_apply(variables, joined, "decode")
        return sharding.split_sharded(logits, [len(batch[0]) for batch in batches]), variables

    def _train_apply(self, variables: dict, inputs, method: str) -> tuple:
        """Applies a method of the network in training mode; returns its output and the updated variables."""
        mutable = [name for name in variables if name != "params"]
        output, updated = self.network.apply(variables, inputs, train=True, mutable=mutable, method=method)
        return output, {**variables, **updated}


def loss_terms(
    student: StudentLogits, teacher: TeacherLogits, views: Views, method: Method, method_state: dict
) -> tuple[dict, dict, dict]:
    """Returns the unweighted loss terms, the shares of valid pixels that are selected, and the new method state."""
    terms, ratios = {"loss_x": _labeled_term(student.labeled, views.label_x, method.labeled_loss)}, {}
    if not method.uses_unlabeled:
        return terms, ratios, method_state
    weak = student.weak if teacher.weak is None else teacher.weak
    method_state = method.selection.update(method_state, jax.lax.stop_gradient(weak))
    select = functools.partial(pseudo_label, selection=method.selection, state=method_state)

    student_weak = weak if student.weak is None else student.weak
    student_target = Target(*select(_full_size(student_weak, views)), views.valid_u)
    ratios["mask_ratio"] = student_target.ratio()
    targets = {stream.name: student_target for stream in method.streams}
    if method.of_view("strong"):
        logits, partner = _full_size(weak, views), _full_size(teacher.partner, views)
        for stream, box in zip(method.of_view("strong"), views.boxes, strict=True):
            valid = mix(views.valid_u, views.valid_m, box)
            targets[stream.name] = Target(*select(mix(logits, partner, box)), valid)
            ratios[f"mask_ratio_{stream.name}"] = targets[stream.name].ratio()

    for view in ("strong", "feature"):
        names = [stream.name for stream in method.of_view(view)]
        pairs = {c.name: tuple(map(names.index, c.streams)) for c in method.contrasts if c.streams[0] in names}
        consistency, contrasts = _stream_terms(
            tuple(student.streams[name] for name in names),
            tuple(targets[name] for name in names),
            tuple(pairs.values()),
        )
        terms |= {f"loss_{name}": term for name, term in zip(names, consistency, strict=True)}
        terms |= {f"contrast_{name}": term for name, term in zip(pairs, contrasts, strict=True)}
    return terms, ratios, method_state


class Target(NamedTuple):
    """Pseudo-labels of a stream, with their weights."""

    labels: jax.Array  # int32 [U, H, W]
    weight: jax.Array  # float [U, H, W], 0 where not selected.
    valid: jax.Array  # bool [U, H, W], False where padded.

    def ratio(self) -> jax.Array:
        """Returns the mean weight of the valid pixels, the share that is selected; 0 if none is valid."""
        return (self.weight * self.valid).sum().astype(jnp.float32) / jnp.maximum(self.valid.sum(), 1)


def _full_size(logits: jax.Array, views: Views) -> jax.Array:
    return upsample(jax.lax.stop_gradient(logits), *views.valid_u.shape[1:])


# The terms save low-resolution logits for the backward pass and upsample them again there: everything else is as large
# as the images times the number of classes.
@functools.partial(jax.checkpoint, static_argnums=2, policy=losses.KEEP_SELECTIONS)
def _labeled_term(logits: jax.Array, labels: jax.Array, loss: Callable) -> jax.Array:
    return loss(upsample(logits, *labels.shape[1:]), labels)


@functools.partial(jax.checkpoint, static_argnums=2)
def _stream_terms(
    streams: tuple[jax.Array, ...], targets: tuple[Target, ...], pairs: tuple[tuple[int, int], ...]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the consistency of each stream with its target, and the contrast of each pair of streams."""
    full = [upsample(x, *target.labels.shape[1:]) for x, target in zip(streams, targets, strict=True)]
    consistency = [losses.consistency(x, *target) for x, target in zip(full, targets, strict=True)]
    return consistency, [losses.contrast(full[i], full[j]) for i, j in pairs]


def total_loss(terms: dict[str, jax.Array], method: Method, warming_up: jax.Array) -> jax.Array:
    """Returns the weighted sum of the terms (docs/method.md, Eq. 1), without strong views while the EMA warms up."""
    total = terms["loss_x"]
    if not method.uses_unlabeled:
        return total
    strong = sum(stream.weight * terms[f"loss_{stream.name}"] for stream in method.of_view("strong"))
    total += jnp.where(warming_up, 0.0, strong)
    total += sum(stream.weight * terms[f"loss_{stream.name}"] for stream in method.of_view("feature"))
    total += sum(contrast.weight * terms[f"contrast_{contrast.name}"] for contrast in method.contrasts)
    return 0.5 * total
