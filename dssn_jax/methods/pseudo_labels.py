"""Selections: which pixels of a pseudo-label map are trained on, and with what weight.

A selection is a frozen dataclass with `init(num_classes)`, which returns its state (a pytree, {} if it has none),
`update(state, logits, valid)`, which takes the logits [U, h, w, K] of the unmixed weak views, as large as the decoder
gives them, once per step (or micro-batch) and returns the new state, and `__call__(probabilities, state)`, which maps
[B, H, W, K] to a weight per pixel: float [B, H, W]. `valid` bool [U, h, w] is False on padding. The arrays are those of
the global batch, so means over them are the same on any number of devices.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dssn_jax.methods.losses import LEAST_SHARE
from dssn_jax.models import platforms


class _Stateless:
    def init(self, num_classes: int) -> dict:
        """Returns the empty state."""
        del num_classes
        return {}

    def update(self, state: dict, logits: jax.Array, valid: jax.Array) -> dict:
        """Returns the state unchanged."""
        del logits, valid
        return state


@dataclasses.dataclass(frozen=True)
class ClassAware(_Stateless):
    """Class-aware selection (CPLG of DSSN; docs/method.md, Eq. 6).

    Per image and class: gamma_c = ratio * m_c if m_c > floor, else m_c, where m_c is the largest p_c in the image
    (padding included). A pixel is selected if p_c > gamma_c for any c.
    """

    ratio: float = 0.96
    floor: float = 0.92

    def __call__(self, probabilities: jax.Array, state: dict) -> jax.Array:
        """Maps probabilities [B, H, W, K] to weights 0 or 1, [B, H, W]."""
        del state
        largest = probabilities.max((1, 2), keepdims=True)
        gamma = jnp.where(largest > self.floor, self.ratio * largest, largest)
        return (probabilities > gamma).any(-1).astype(probabilities.dtype)


@dataclasses.dataclass(frozen=True)
class Threshold(_Stateless):
    """Pixels with a confidence of at least `threshold` (FixMatch, UniMatch; docs/method.md, Eq. 7); 0 selects all."""

    threshold: float

    def __call__(self, probabilities: jax.Array, state: dict) -> jax.Array:
        """Maps probabilities [B, H, W, K] to weights 0 or 1, [B, H, W]."""
        del state
        return (probabilities.max(-1) >= self.threshold).astype(probabilities.dtype)


@dataclasses.dataclass(frozen=True)
class _Running:
    """Selections whose state is a tree of running means, float32."""

    momentum: float = 0.999  # Weight of the old means in each update.


@dataclasses.dataclass(frozen=True)
class Adaptive(_Running):
    """Self-adaptive thresholds: one per class, lower for classes of which less is predicted (docs/method.md, Eq. 19).

    FreeMatch, Wang et al., ICLR 2023.
    """

    def init(self, num_classes: int) -> dict:
        """Returns the running means of the confidence, [], and of the probability of each class, [K]: 1 / K each."""
        even = jnp.full(num_classes, 1 / num_classes, jnp.float32)
        return {"confidence": even[0], "classes": even}

    def update(self, state: dict, logits: jax.Array, valid: jax.Array) -> dict:
        """Returns the running means after logits [U, h, w, K]."""
        probabilities = _probabilities(logits)
        means = {"confidence": _mean(probabilities.max(-1), valid), "classes": _mean(probabilities, valid)}
        return _move(state, means, valid, self.momentum)

    def __call__(self, probabilities: jax.Array, state: dict) -> jax.Array:
        """Maps probabilities [B, H, W, K] to weights 0 or 1, [B, H, W]."""
        thresholds = state["confidence"] * state["classes"] / state["classes"].max()
        return _reaching(probabilities, thresholds)


@dataclasses.dataclass(frozen=True)
class Soft(_Running):
    """Every pixel, with a weight that falls below the mean confidence as a Gaussian does (docs/method.md, Eq. 20).

    SoftMatch, Chen et al., ICLR 2023, without its uniform alignment.
    """

    deviations: float = 2.0  # Standard deviations of the confidence in one of the Gaussian (n_sigma in its code).

    def init(self, num_classes: int) -> dict:
        """Returns the running mean of the confidence, 1 / K, and its running variance, 1."""
        return {"mean": jnp.full((), 1 / num_classes, jnp.float32), "variance": jnp.ones((), jnp.float32)}

    def update(self, state: dict, logits: jax.Array, valid: jax.Array) -> dict:
        """Returns mean and variance (unbiased in the batch) after logits [U, h, w, K]."""
        confidence, count = _probabilities(logits).max(-1), valid.sum()
        mean = _mean(confidence, valid)
        variance = _mean(jnp.square(confidence - mean), valid) * count / jnp.maximum(count - 1, 1)
        return _move(state, {"mean": mean, "variance": variance}, valid, self.momentum)

    def __call__(self, probabilities: jax.Array, state: dict) -> jax.Array:
        """Maps probabilities [B, H, W, K] to weights in [0, 1], [B, H, W]."""
        below = jnp.minimum(probabilities.max(-1) - state["mean"], 0)
        variance = jnp.maximum(state["variance"], jnp.finfo(jnp.float32).eps) / self.deviations**2
        return jnp.exp(-jnp.square(below) / (2 * variance)).astype(probabilities.dtype)


@dataclasses.dataclass(frozen=True)
class ClassBalanced(_Running):
    """The most confident pixels of each class, the same share of every class (docs/method.md, Eq. 26).

    Class-balanced self-training, Zou et al., ECCV 2018, with running thresholds.
    """

    share: float = 0.5  # Selected share of the pixels that are predicted as a class, in (0, 1].

    def init(self, num_classes: int) -> dict:
        """Returns the running threshold of each class, [K]: at first 0, which selects all."""
        return {"thresholds": jnp.zeros(num_classes, jnp.float32)}

    def update(self, state: dict, logits: jax.Array, valid: jax.Array) -> dict:
        """Returns the running thresholds after logits [U, h, w, K]; that of a class without a pixel stays."""
        probabilities, valid = _probabilities(logits[:, ::2, ::2]), valid[:, ::2, ::2]
        confidence, labels = probabilities.max(-1), probabilities.argmax(-1)

        def quantile(label: jax.Array) -> jax.Array:
            return jnp.nanquantile(jnp.where((labels == label) & valid, confidence, jnp.nan), 1 - self.share)

        thresholds = state["thresholds"]
        quantiles = jax.vmap(quantile)(jnp.arange(len(thresholds)))
        batch = {"thresholds": jnp.where(jnp.isnan(quantiles), thresholds, quantiles)}
        return _move(state, batch, valid, self.momentum)

    def __call__(self, probabilities: jax.Array, state: dict) -> jax.Array:
        """Maps probabilities [B, H, W, K] to weights 0 or 1, [B, H, W]."""
        return _reaching(probabilities, state["thresholds"])


@dataclasses.dataclass(frozen=True)
class Aligned:
    """A selection after distribution alignment: classes are pseudo-labeled about as often as they are labeled.

    `pseudo_label` takes labels and weights from aligned logits: the probability of a class is multiplied by its share
    of the labeled pixels and divided by the running mean of its probabilities (docs/method.md, Eq. 25). ReMixMatch,
    Berthelot et al., ICLR 2020.
    """

    selection: Callable
    frequencies: tuple[float, ...]  # Share of each class of the labeled pixels.
    momentum: float = 0.999  # Weight of the old means in each update.

    def init(self, num_classes: int) -> dict:
        """Returns the running mean of the probability of each class, [K], at first `frequencies`, and the inner state.

        Raises ValueError for another number of classes.
        """
        if len(self.frequencies) != num_classes:
            raise ValueError(f"{len(self.frequencies)} frequencies for {num_classes} classes")
        return {"classes": self._target(), "selection": self.selection.init(num_classes)}

    def update(self, state: dict, logits: jax.Array, valid: jax.Array) -> dict:
        """Returns the state after logits [U, h, w, K]; the inner selection gets aligned ones."""
        classes = _move(state["classes"], _mean(_probabilities(logits), valid), valid, self.momentum)
        moved = {**state, "classes": classes}
        return {**moved, "selection": self.selection.update(state["selection"], self.align(logits, moved), valid)}

    def align(self, logits: jax.Array, state: dict) -> jax.Array:
        """Returns logits [..., K] plus the logarithm of the quotient of Eq. 25."""
        ratio = jnp.log(self._target()) - jnp.log(jnp.maximum(state["classes"], LEAST_SHARE))
        return logits + ratio.astype(logits.dtype)

    def __call__(self, probabilities: jax.Array, state: dict) -> jax.Array:
        """Maps aligned probabilities [B, H, W, K] to the weights of the inner selection, [B, H, W]."""
        return self.selection(probabilities, state["selection"])

    def _target(self) -> jax.Array:
        return jnp.maximum(jnp.array(self.frequencies, jnp.float32), LEAST_SHARE)


def _reaching(probabilities: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Returns 1 where the largest of probabilities [..., K] is at least the threshold of its class, [K], else 0."""
    selected = probabilities.max(-1) >= thresholds[probabilities.argmax(-1)]
    return selected.astype(probabilities.dtype)


def _move(means, batch, valid: jax.Array, momentum: float):
    """Returns the running `means` after a batch with the means `batch`; unchanged if no pixel is valid."""
    rate = jnp.where(valid.any(), 1 - momentum, 0)
    return jax.tree.map(lambda old, new: (old + rate * (new - old)).astype(old.dtype), means, batch)


def _probabilities(logits: jax.Array) -> jax.Array:
    """Returns the probabilities of logits, in at least float32."""
    return jax.nn.softmax(logits.astype(platforms.wide(logits.dtype)))


def _mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the mean of values [U, h, w, ...] over the valid pixels; 0 if none is valid."""
    weight = valid.reshape(valid.shape + (1,) * (values.ndim - valid.ndim))
    return jnp.where(weight, values, 0).sum((0, 1, 2)) / jnp.maximum(valid.sum(), 1)


# Name in config.method.selection -> constructor from config.method.
SELECTIONS = {
    "class_aware": lambda method: ClassAware(method.class_aware_ratio, method.class_aware_floor),
    "threshold": lambda method: Threshold(method.threshold),
    "adaptive": lambda method: Adaptive(method.selection_momentum),
    "soft": lambda method: Soft(method.selection_momentum),
    "class_balanced": lambda method: ClassBalanced(method.selection_momentum, method.balanced_share),
}


def pseudo_label(logits: jax.Array, selection, state: dict) -> tuple[jax.Array, jax.Array]:
    """Maps logits [B, H, W, K] to labels int32 [B, H, W] and weights float [B, H, W], without a gradient."""
    logits = jax.lax.stop_gradient(logits)
    if isinstance(selection, Aligned):
        logits = selection.align(logits, state)
    return logits.argmax(-1).astype(jnp.int32), selection(jax.nn.softmax(logits), state)
