"""The loss of one step: teacher logits, the student's streams, loss terms and their weighted sum."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import flatten_util

from dssn_jax import sharding
from dssn_jax.methods import losses
from dssn_jax.methods.method import Method
from dssn_jax.methods.pseudo_labels import pseudo_label
from dssn_jax.methods.views import Views, mix, swap_pairs
from dssn_jax.models.batch_norm import Batches
from dssn_jax.models.network import Network
from dssn_jax.models.resize import upsample


class Keys(NamedTuple):
    """Random keys of a step or micro-batch, each consumed by one purpose."""

    perturb: jax.Array  # Perturbations of features.
    rope: jax.Array  # Encoders that draw positions in training, as their rng "rope".


class Features(NamedTuple):
    """Feature maps of the views of a step, [N, h, w, C] each, of an encoder that student and teacher share."""

    labeled: tuple[jax.Array, ...]
    weak: tuple[jax.Array, ...] | None = None
    partner: tuple[jax.Array, ...] | None = None
    strong: tuple[jax.Array, ...] | None = None  # All strong views, joined by `concat_sharded`.


class TeacherLogits(NamedTuple):
    """Logits from which strong views get their pseudo-labels, [U, h, w, K]: low-resolution or of the size of the views.

    `weak` is None where the student's training forward provides it; `partner` where weak views are each other's
    partners, or partners are labeled.
    """

    weak: jax.Array | None = None
    partner: jax.Array | None = None


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
    batches: Batches = Batches()  # How joined images are normalized in training, all as one batch.

    def encode(self, variables: dict, views: Views) -> Features:
        """Encodes all views in evaluation mode, without a gradient: for an encoder that is frozen.

        Given to `teacher_logits` and `student_logits`, the features of the weak views are computed once for both.
        """
        encode = functools.partial(self.network.apply, jax.lax.stop_gradient(variables), method="encode")
        images = {"labeled": views.image_x, "weak": views.image_u, "partner": views.image_m}
        images = {name: image for name, image in images.items() if image is not None}
        maps = encode(sharding.concat_sharded(*images.values()))
        features = dict(zip(images, _split(maps, [len(image) for image in images.values()]), strict=True))
        strong = encode(sharding.concat_sharded(*views.strong)) if views.strong else None
        return Features(**features, strong=strong)

    def teacher_logits(
        self, student: dict, teacher: dict | None, views: Views, step: jax.Array, features: Features | None = None
    ) -> tuple[TeacherLogits, dict | None]:
        """Predicts the weak views and their CutMix partners for the pseudo-labels of the strong views.

        `student` and `teacher` are variables of the network, `features` what `encode` returned, if the encoder is
        frozen. Returns the logits, without a gradient, and the teacher's variables, whose running statistics move while
        it predicts with batch statistics.
        """
        if not self.method.of_view("strong"):
            return TeacherLogits(), teacher
        function, inputs = "low_res_logits", (views.image_u, views.image_m)
        if features is not None:
            function, inputs = "decode", (features.weak, features.partner)
        inputs = [each for each in inputs if each is not None]
        if self.method.has_ema:
            logits, teacher = self._ema_logits(teacher, function, inputs, step)
        elif self.method.teacher == "student_eval":
            logits = TeacherLogits(*self._predict(student, function, inputs))
        else:
            logits = TeacherLogits(None, *self._predict(student, function, inputs[1:]))
        return jax.lax.stop_gradient((logits, teacher))

    def _ema_logits(self, teacher: dict, function: str, inputs: list, step: jax.Array) -> tuple[TeacherLogits, dict]:
        """Predicts with batch statistics in the first `batch_stats_steps` steps, then with running statistics."""

        def with_running_stats(teacher: dict):
            return TeacherLogits(*self._predict(teacher, function, inputs)), before

        def with_batch_stats(teacher: dict):
            # The partner first, then the weak view, as the original does; a scan, so that its body is compiled once.
            def body(teacher: dict, each):
                if function == "decode" or "encoder" in teacher["batch_stats"]:
                    logits, teacher = self._train_apply(teacher, each, function)
                else:  # The encoder's training mode has nothing but randomness, which is for the student.
                    maps = self.network.apply(teacher, each, method="encode")
                    logits, teacher = self._train_apply(teacher, maps, "decode")
                return teacher, logits

            stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *reversed(inputs))
            teacher, logits = jax.lax.scan(body, teacher, stacked)
            return TeacherLogits(*reversed(list(logits))), flatten_util.ravel_pytree(teacher["batch_stats"])[0]

        if self.method.ema.batch_stats_steps == 0 or "batch_stats" not in teacher:
            return TeacherLogits(*self._predict(teacher, function, inputs)), teacher
        # The branches return one vector: each array that passed through them would be copied by a kernel of its own.
        before, restore = flatten_util.ravel_pytree(teacher["batch_stats"])
        early = step < self.method.ema.batch_stats_steps
        logits, after = jax.lax.cond(early, with_batch_stats, with_running_stats, teacher)
        return logits, {**teacher, "batch_stats": restore(after)}

    def _predict(self, variables: dict, function: str, inputs: list) -> list[jax.Array]:
        """Applies a function of the network in evaluation mode to inputs of one size, joined; returns their logits."""
        if not inputs:
            return []
        logits = self.network.apply(variables, _join(inputs), method=function)
        return sharding.split_sharded(logits, [len(logits) // len(inputs)] * len(inputs))

    def student_logits(
        self, variables: dict, views: Views, keys: Keys, features: Features | None = None
    ) -> tuple[StudentLogits, dict]:
        """Runs the student in training mode: labeled and weak images with feature streams, then the strong streams.

        Returns the logits and the variables with updated statistics. Batches are joined so that rows stay on their
        device; everything that is joined shares its batch statistics. With `features` of `encode`, decodes only.
        """
        feature, strong = self.method.of_view("feature"), self.method.of_view("strong")
        needs_weak = bool(feature) or self.method.teacher == "student"
        images = (views.image_x, views.image_u) if needs_weak else (views.image_x,)
        sizes = [len(image) for image in images]
        if features is None:
            maps, strong_maps, variables = self._encode_views(variables, images, views.strong, keys.rope)
        else:
            maps, strong_maps = _join((features.labeled, features.weak)[: len(images)]), features.strong
        # The original perturbs the labeled images too; nothing reads their logits, but they enter batch statistics.
        source = maps if self.method.perturb_labeled or not feature else _split(maps, sizes)[-1]
        batches = [maps, *(self._perturb(stream, source, keys.perturb) for stream in feature)]
        logits, variables = self._decode(variables, batches)
        clean = sharding.split_sharded(logits[0], sizes)
        copies = logits[1:]
        if self.method.perturb_labeled:
            copies = [sharding.split_sharded(x, sizes)[-1] for x in copies]
        outputs = dict(zip((stream.name for stream in feature), copies, strict=True))
        if strong:
            logits, variables = self._strong_logits(variables, strong, strong_maps, keys.perturb)
            outputs |= logits
        return StudentLogits(clean[0], clean[1] if needs_weak else None, outputs), variables

    def _strong_logits(self, variables: dict, streams, maps: tuple[jax.Array, ...], key) -> tuple[dict, dict]:
        """Decodes the joined feature maps of the strong views; returns the logits by stream, and the variables."""
        sizes = [len(maps[0]) // len(streams)] * len(streams)
        if any(stream.perturb for stream in streams):
            pairs = zip(streams, _split(maps, sizes), strict=True)
            logits, variables = self._decode(variables, [self._perturb(stream, x, key) for stream, x in pairs])
        else:
            logits, variables = self._train_apply(variables, maps, "decode")
            logits = sharding.split_sharded(logits, sizes)
        return {stream.name: x for stream, x in zip(streams, logits, strict=True)}, variables

    def _perturb(self, stream, maps: tuple[jax.Array, ...], key: jax.Array) -> tuple[jax.Array, ...]:
        return maps if stream.perturb is None else stream.perturb(maps, key, self.method.number(stream))

    def _decode(self, variables: dict, batches: list) -> tuple[list[jax.Array], dict]:
        """Decodes batches of feature maps together; returns the logits of each batch."""
        logits, variables = self._train_apply(variables, _join(batches), "decode")
        return sharding.split_sharded(logits, [len(batch[0]) for batch in batches]), variables

    def _encode_views(self, variables: dict, images, strong, key: jax.Array) -> tuple:
        """Encodes labeled and weak `images` together in training mode, then the `strong` views, if there are any.

        Returns the feature maps of both and the variables. As many images as strong views are encoded at once, which is
        half as many operations; batch statistics are those of one after the other.
        """
        if strong and len(strong) * len(strong[0]) == sum(map(len, images)) and not self.network.draws:
            joined = sharding.concat_sharded(
                *(sharding.concat_sharded(*x) for x in (images, strong)), pieces=self.batches.devices
            )
            maps, variables = self._train_apply(variables, joined, "encode", train=self.batches._replace(count=2))
            return *_split(maps, [len(joined) // 2] * 2, self.batches.devices), variables
        encoded = []
        for number, batch in enumerate((images, strong)):
            maps = None
            if batch:
                rngs = {"rope": jax.random.fold_in(key, number)}
                joined = sharding.concat_sharded(*batch)
                maps, variables = self._train_apply(variables, joined, "encode", rngs=rngs)
            encoded.append(maps)
        return *encoded, variables

    def _train_apply(self, variables: dict, inputs, function: str, **options) -> tuple:
        """Applies a function of the network in training mode; returns its output and the updated variables."""
        options = {"train": self.batches, "mutable": [name for name in variables if name != "params"], **options}
        output, updated = self.network.apply(variables, inputs, method=function, **options)
        return output, {**variables, **updated}


def _join(batches) -> jax.Array | tuple[jax.Array, ...]:
    """Joins batches of images, or of feature maps, so that rows stay on their device."""
    return jax.tree.map(lambda *arrays: sharding.concat_sharded(*arrays), *batches)


def _split(maps: tuple[jax.Array, ...], sizes: list[int], pieces: int | None = None) -> list[tuple[jax.Array, ...]]:
    """Splits feature maps that belong to batches of `sizes`, joined by `_join` or in `pieces`."""
    return list(zip(*(sharding.split_sharded(x, sizes, pieces) for x in maps), strict=True))


def loss_terms(
    student: StudentLogits, teacher: TeacherLogits, views: Views, method: Method, method_state: dict
) -> tuple[dict, dict, dict]:
    """Returns the unweighted loss terms, the shares of valid pixels that are selected, and the new method state.

    All are scalars but the shares "pseudo_labels" [K], by class. All are those of logits plus the method's
    `logit_shifts`.
    """
    if method.logit_shifts:
        student, teacher = jax.tree.map(
            lambda logits: logits + jnp.asarray(method.logit_shifts, logits.dtype), (student, teacher)
        )
    terms, ratios = {"loss_x": _labeled_term(student.labeled, views.label_x, method.labeled_loss)}, {}
    if not method.uses_unlabeled:
        return terms, ratios, method_state
    weak = student.weak if teacher.weak is None else teacher.weak
    valid = _valid_logits(views.valid_u, *weak.shape[1:3])
    method_state = method.selection.update(method_state, jax.lax.stop_gradient(weak), valid)
    select = functools.partial(pseudo_label, selection=method.selection, state=method_state)

    student_weak = weak if student.weak is None else student.weak
    student_target = Target(*select(_full_size(student_weak, views)), views.valid_u)
    ratios["mask_ratio"] = student_target.ratio()
    ratios["pseudo_labels"] = class_shares(student_target, weak.shape[-1])
    targets = {stream.name: student_target for stream in method.streams}
    if method.of_view("strong"):
        mixed = _mixed_targets(_full_size(weak, views), teacher.partner, views, select)
        for stream, (target, pseudo) in zip(method.of_view("strong"), mixed, strict=True):
            targets[stream.name] = target
            ratios[f"mask_ratio_{stream.name}"] = pseudo.ratio()

    for view in ("strong", "feature"):
        names = [stream.name for stream in method.of_view(view)]
        pairs = {c.name: tuple(map(names.index, c.streams)) for c in method.contrasts if c.streams[0] in names}
        consistency, contrasts = _stream_terms(
            tuple(student.streams[name] for name in names),
            tuple(targets[name] for name in names),
            tuple(pairs.values()),
            method.pseudo_label_weights,
        )
        terms |= {f"loss_{name}": term for name, term in zip(names, consistency, strict=True)}
        terms |= {f"contrast_{name}": term for name, term in zip(pairs, contrasts, strict=True)}
    return terms, ratios, method_state


def _valid_logits(valid: jax.Array, height: int, width: int) -> jax.Array:
    """Maps valid pixels, bool [U, H, W], to those logits [U, height, width] of the same corners that are nearest."""
    rows, columns = (
        np.linspace(0, size - 1, count).round().astype(int)
        for size, count in zip(valid.shape[1:], (height, width), strict=True)
    )
    return valid[:, rows][:, :, columns]


class Target(NamedTuple):
    """Pseudo-labels of a stream, with their weights."""

    labels: jax.Array  # int32 [U, H, W]
    weight: jax.Array  # float [U, H, W], 0 where not selected.
    valid: jax.Array  # bool [U, H, W], False where padded.

    def ratio(self) -> jax.Array:
        """Returns the mean weight of the valid pixels, the share that is selected; 0 if none is valid."""
        return (self.weight * self.valid).sum() / jnp.maximum(self.valid.sum(), 1)


def class_shares(target: Target, classes: int) -> jax.Array:
    """Returns the weight of the pixels of each class, divided by the number of valid pixels: [K]; 0 if none is valid.

    Every fourth pixel of every fourth row is looked at: shares are as good, and cost next to nothing.
    """
    labels, weight, valid = (each[:, ::4, ::4] for each in target)
    is_class = jax.nn.one_hot(labels, classes, dtype=weight.dtype)
    return (is_class * (weight * valid)[..., None]).sum((0, 1, 2)) / jnp.maximum(valid.sum(), 1)


def _mixed_targets(
    logits: jax.Array, partner: jax.Array | None, views: Views, select: Callable
) -> list[tuple[Target, Target]]:
    """Returns, for each strong view, its target and the part of it that is pseudo-labeled.

    `logits` are those of the weak views, at full size, and `partner` those of the partners. Pixels of a labeled partner
    have its labels with weight 1 (docs/method.md, Eq. 21).
    """
    if views.label_m is None:
        partner = swap_pairs(logits) if partner is None else _full_size(partner, views)
        valid = [mix(views.valid_u, views.valid_m, box) for box in views.boxes]
        targets = [Target(*select(mix(logits, partner, box)), v) for box, v in zip(views.boxes, valid, strict=True)]
        return list(zip(targets, targets, strict=True))
    weak = Target(*select(logits), views.valid_u)
    true = Target(views.label_m.astype(weak.labels.dtype), jnp.ones_like(weak.weight), views.valid_m)
    return [
        (Target(*(mix(*pair, box) for pair in zip(weak, true, strict=True))), weak._replace(valid=weak.valid & ~box))
        for box in views.boxes
    ]


def _full_size(logits: jax.Array, views: Views) -> jax.Array:
    return upsample(jax.lax.stop_gradient(logits), *views.valid_u.shape[1:])


# The terms save low-resolution logits for the backward pass and upsample them again there: everything else is as large
# as the images times the number of classes.
@functools.partial(jax.checkpoint, static_argnums=2, policy=losses.KEEP_PIXELS)
def _labeled_term(logits: jax.Array, labels: jax.Array, loss: Callable) -> jax.Array:
    return loss(upsample(logits, *labels.shape[1:]), labels)


@functools.partial(jax.checkpoint, static_argnums=(2, 3), policy=losses.KEEP_PIXELS)
def _stream_terms(
    streams: tuple[jax.Array, ...],
    targets: tuple[Target, ...],
    pairs: tuple[tuple[int, int], ...],
    class_weights: tuple[float, ...],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the consistency of each stream with its target, and the contrast of each pair of streams."""
    full = [upsample(x, *target.labels.shape[1:]) for x, target in zip(streams, targets, strict=True)]
    consistency = [losses.consistency(x, *target, class_weights) for x, target in zip(full, targets, strict=True)]
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
