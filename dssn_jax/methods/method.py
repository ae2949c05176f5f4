"""A method as data: the streams that are trained on, where their targets come from and how the terms are weighted."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from configs.checks import ConfigError, check_choice
from dssn_jax.methods import losses, perturbations, pseudo_labels
from input_pipeline import class_statistics


def _frequencies(config) -> np.ndarray | None:
    """Returns the share of each class of the labeled pixels, float64 [K].

    None while `data.class_pixels` is unset, in a network that is only applied: then classes are not balanced.
    """
    pixels = config.data.class_pixels
    return class_statistics.frequencies(pixels) if pixels else None


def class_weights(config) -> tuple[float, ...]:
    """Returns the weights of the classes in the labeled loss (docs/method.md, Eq. 23); () for equal ones."""
    frequencies, power = _frequencies(config), config.method.class_weight_power
    return losses.class_weights(frequencies, power) if power and frequencies is not None else ()


def logit_shifts(config) -> tuple[float, ...]:
    """Returns the numbers that are added to the logits in training (docs/method.md, Eq. 27); () for none."""
    frequencies, factor = _frequencies(config), config.method.logit_adjustment
    return losses.logit_shifts(frequencies, factor) if factor and frequencies is not None else ()


def _selection(config) -> Callable:
    """Returns the selection, aligned if `align_classes` asks for it."""
    method, frequencies = config.method, _frequencies(config)
    selection = pseudo_labels.SELECTIONS[method.selection](method)
    if not method.align_classes or frequencies is None:
        return selection
    return pseudo_labels.Aligned(selection, tuple(frequencies.tolist()), method.selection_momentum)


# Sources of the pseudo-labels of strong views; configs/defaults.py explains them.
TEACHERS = ("ema", "student_eval", "student", "none")
# Name in config.method.labeled_loss -> constructor from the configuration.
LABELED_LOSSES = {
    "ce": lambda config: losses.CrossEntropy(config.data.ignore, class_weights(config)),
    "ohem": lambda config: losses.Ohem(
        config.method.ohem_threshold,
        config.method.ohem_min_kept * config.method.ohem_group,
        config.method.ohem_group,
        config.data.ignore,
        class_weights(config),
    ),
}


@dataclasses.dataclass(frozen=True)
class Stream:
    """A view of the unlabeled images whose prediction is trained toward pseudo-labels: one consistency term."""

    name: str  # Its term is called "loss_NAME".
    view: str  # strong: a strongly augmented, mixed image | feature: the weak view with perturbed features.
    weight: float
    perturb: Callable | None = None  # See `dssn_jax.methods.perturbations`.
    # Source of its pseudo-labels. teacher: the teacher's logits, mixed like the view | student: the student's logits of
    # the weak view.
    target: str = "teacher"


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A contrast term between the logits of two streams of the same kind of view."""

    name: str  # The term is called "contrast_NAME".
    streams: tuple[str, str]  # Names of streams.
    weight: float


@dataclasses.dataclass(frozen=True)
class Ema:
    """How the EMA teacher follows the student (docs/method.md, Eq. 8)."""

    decay: float = 0.996
    ramp: bool = False  # Use min(1 - 1 / (step + 1), decay).
    warmup_steps: int = 1  # The teacher is a copy of the student, and strong views do not count.
    batch_stats_steps: int = 0  # The teacher predicts with batch statistics.

    def rate(self, step: jax.Array) -> jax.Array:
        """Returns the weight of the old teacher in the update after `step` (int32 [], from 0)."""
        decay = jnp.minimum(1 - 1 / (step + 1), self.decay) if self.ramp else self.decay
        return jnp.where(step < self.warmup_steps, 0.0, decay)


@dataclasses.dataclass(frozen=True)
class Method:
    """Data that define a training step; `from_config` fills it from `config.method` and `config.ema`."""

    streams: tuple[Stream, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    teacher: str = "none"  # A name of TEACHERS.
    ema: Ema | None = None  # Set if and only if the teacher is the EMA network.
    selection: Callable = pseudo_labels.Threshold(0.95)  # noqa: RUF009
    labeled_loss: Callable = losses.CrossEntropy()  # noqa: RUF009
    pseudo_label_weights: tuple[float, ...] = ()  # By class; (): equal ones.
    logit_shifts: tuple[float, ...] = ()  # Added to the logits of the classes in training; (): nothing.
    perturb_labeled: bool = True

    @property
    def has_ema(self) -> bool:
        return self.ema is not None

    @property
    def uses_unlabeled(self) -> bool:
        return bool(self.streams)

    def number(self, stream: Stream) -> int:
        """Returns the number of a stream; feature streams, which come after the strong ones, start at an even one."""
        index, strong = self.streams.index(stream), len(self.of_view("strong"))
        return index + strong % 2 if stream.view == "feature" else index

    def of_view(self, view: str) -> tuple[Stream, ...]:
        """Returns the streams of one kind of view, "strong" or "feature"."""
        return tuple(stream for stream in self.streams if stream.view == view)


def from_config(config, steps_per_epoch: int) -> Method:
    """Returns the method of a configuration that `check` has accepted; epochs of the EMA schedule become steps."""
    method, ema = config.method, config.ema
    strong_perturb, feature_perturb = (
        perturbations.PERTURBATIONS[name](method) for name in (method.strong_perturb, method.feature_perturb)
    )
    strong = [Stream(f"s{i + 1}", "strong", method.strong_weight, strong_perturb) for i in range(method.strong_views)]
    feature = [
        Stream(f"fp{i + 1}", "feature", method.feature_weight, feature_perturb, target="student")
        for i in range(method.feature_views)
    ]
    contrasts = [
        Contrast(name, (streams[0].name, streams[1].name), weight)
        for name, streams, weight in (
            ("image", strong, method.image_contrast_weight),
            ("feature", feature, method.feature_contrast_weight),
        )
        if weight
    ]
    return Method(
        streams=(*strong, *feature),
        contrasts=tuple(contrasts),
        teacher=method.teacher,
        ema=_ema(ema, steps_per_epoch) if method.teacher == "ema" else None,
        selection=_selection(config),
        labeled_loss=LABELED_LOSSES[method.labeled_loss](config),
        pseudo_label_weights=class_weights(config) if method.weigh_pseudo_labels else (),
        logit_shifts=logit_shifts(config),
        perturb_labeled=method.perturb_labeled,
    )


def check_pairs(config, parts: int) -> None:
    """Raises ConfigError if `views.mix_partner=reversed` cannot pair the unlabeled images of each part of a batch.

    `parts` is the number of devices times that of micro-batches.
    """
    images = config.data.unlabeled_batch
    if config.method.strong_views and config.views.mix_partner == "reversed" and images // parts % 2:
        raise ConfigError(
            f"config.data.unlabeled_batch is {images}; config.views.mix_partner='reversed' swaps pairs of images on "
            f"each of the {parts} devices (times micro-batches): expected a multiple of {2 * parts}, or "
            "config.views.mix_partner='other'"
        )


def _ema(ema, steps_per_epoch: int) -> Ema:
    return Ema(
        decay=ema.decay,
        ramp=ema.ramp,
        warmup_steps=max(ema.warmup_steps, round(ema.warmup_epochs * steps_per_epoch)),
        batch_stats_steps=round(ema.batch_stats_epochs * steps_per_epoch),
    )


def check(config) -> None:
    """Raises ConfigError if `config.method` names something unknown or combines what does not fit."""
    method = config.method
    for key, known in (
        ("teacher", TEACHERS),
        ("selection", pseudo_labels.SELECTIONS),
        ("labeled_loss", LABELED_LOSSES),
        ("strong_perturb", perturbations.PERTURBATIONS),
        ("feature_perturb", perturbations.PERTURBATIONS),
    ):
        check_choice(f"config.method.{key}", method[key], known)
    if method.strong_views and method.teacher == "none":
        raise ConfigError("config.method.teacher is 'none', but config.method.strong_views > 0 needs pseudo-labels")
    for kind in ("strong", "feature"):
        if method[f"{kind}_perturb"] == "complementary" and method[f"{kind}_views"] % 2:
            views = f"config.method.{kind}_views is {method[f'{kind}_views']}"
            raise ConfigError(f"{views}; {kind}_perturb='complementary' needs an even number")
    for key, views in (("image_contrast_weight", "strong_views"), ("feature_contrast_weight", "feature_views")):
        if method[key] and method[views] != 2:
            raise ConfigError(f"config.method.{key} is {method[key]}, which needs config.method.{views}=2")
