"""Loss terms (docs/method.md, "Loss"). Logits [B, H, W, K] are in at least float32."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

_SELECTION, _PIXELS = "selection", "pixels"
# Policy for `jax.checkpoint` of a loss: saves, for the backward pass, the selected pixels and what was summed over the
# classes of a pixel.
KEEP_PIXELS = jax.checkpoint_policies.save_only_these_names(_SELECTION, _PIXELS)
LEAST_SHARE = 1e-5  # Where logarithms of the shares of classes are taken, smaller ones count as this.


@jax.custom_vjp
def pixel_cross_entropy(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the cross-entropy per pixel [B, H, W]; 0 where `valid` bool [B, H, W] is False, whatever the label.

    The backward pass is one pass over the logits: automatic differentiation would scatter into a map of its own.
    """
    return _cross_entropy_forward(logits, labels, valid)[0]


def _cross_entropy_forward(logits, labels, valid):
    log_sum = checkpoint_name(jax.nn.logsumexp(logits, -1), _PIXELS)
    of_label = jnp.where(_one_hot(labels, logits), logits, 0).sum(-1)
    return jnp.where(valid, log_sum - of_label, 0), (logits, labels, valid, log_sum)


def _cross_entropy_backward(saved, gradient):
    logits, labels, valid, log_sum = saved
    probabilities = jnp.exp(logits - log_sum[..., None])
    gradient = jnp.where(valid, gradient, 0)
    return (probabilities - _one_hot(labels, logits)) * gradient[..., None], None, None


pixel_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _one_hot(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns the labels as bool [B, H, W, K]; no class is True for labels beyond the last one."""
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)


def class_weights(frequencies: np.ndarray, power: float) -> tuple[float, ...]:
    """Returns a weight per class, frequency ** -power times a constant with which the mean pixel weighs 1 (Eq. 23).

    `frequencies` [K] sum to 1; a class with frequency 0 weighs 1.
    """
    occurs = frequencies > 0
    raw = np.where(occurs, frequencies, 1) ** -float(power)
    return tuple(np.where(occurs, raw / (frequencies * raw).sum(), 1).tolist())


def logit_shifts(frequencies: np.ndarray, factor: float) -> tuple[float, ...]:
    """Returns `factor` times the logarithm of the frequencies [K], which count as at least `LEAST_SHARE` (Eq. 27)."""
    return tuple((factor * np.log(np.maximum(frequencies, LEAST_SHARE))).tolist())


def _mean(
    losses: jax.Array, labels: jax.Array, kept: jax.Array, weights: tuple[float, ...], axis: int | None = None
) -> jax.Array:
    """Returns the mean of the losses that are `kept` along `axis`, weighted by class; 0 if none is.

    `losses` are 0, and `labels` may be no class ids, where not `kept`; no `weights` are equal ones.
    """
    if not weights:
        return losses.sum(axis) / jnp.maximum(kept.sum(axis), 1)
    weight = jnp.where(kept, jnp.asarray(weights, losses.dtype)[jnp.where(kept, labels, 0)], 0)
    total = weight.sum(axis)
    return (weight * losses).sum(axis) / jnp.where(total > 0, total, 1)


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy over the labeled pixels (docs/method.md, Eq. 2), weighted by class (Eq. 23)."""

    ignore: int = 255  # Label of pixels without a label.
    weights: tuple[float, ...] = ()  # By class; (): equal ones.

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Maps logits [B, H, W, K] and labels [B, H, W] to a scalar; 0 if every pixel is ignored."""
        valid = labels != self.ignore
        return _mean(pixel_cross_entropy(logits, labels, valid), labels, valid, self.weights)


@dataclasses.dataclass(frozen=True)
class Ohem:
    """Cross-entropy of hard pixels (online hard example mining), averaged over image groups (docs/method.md, Eq. 3).

    A group keeps the pixels whose true class has at most the probability `threshold`, but at least `min_kept` pixels:
    the threshold rises to the min_kept-th smallest probability, where ignored pixels count as 1. A group with fewer
    valid pixels keeps them all; one without any contributes 0. The mean over the kept pixels is weighted by class
    (Eq. 23); which are kept does not depend on the weights.
    """

    threshold: float
    min_kept: int  # Pixels per group.
    group: int  # Consecutive images whose pixels are ranked together; divides the batch.
    ignore: int = 255
    weights: tuple[float, ...] = ()  # By class; (): equal ones.

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Maps logits [B, H, W, K] and labels [B, H, W] to a scalar."""
        valid = labels != self.ignore
        losses = pixel_cross_entropy(logits, labels, valid).reshape(len(labels) // self.group, -1)
        valid = valid.reshape(losses.shape)
        # The probability of the true class is exp(-loss); ignored pixels have loss 0 and so count as 1.
        probabilities = jnp.exp(-jax.lax.stop_gradient(losses))
        rank = min(self.min_kept, probabilities.shape[1]) - 1
        limit = jnp.maximum(kth_smallest(probabilities, rank), self.threshold)
        keep_all = valid.sum(-1, keepdims=True) < self.min_kept
        kept = checkpoint_name(valid & (keep_all | (probabilities <= limit)), _SELECTION)
        return _mean(jnp.where(kept, losses, 0), labels.reshape(losses.shape), kept, self.weights, axis=-1).mean()


def kth_smallest(values: jax.Array, rank: int) -> jax.Array:
    """Returns the value of `rank` (0: the smallest) in each row of `values` [G, N] in [0, 1], exactly: [G, 1].

    Nonnegative floats are ordered like their bit patterns. The result is built from its highest bit down, each bit
    decided by counting the values below: about 30 passes through memory. A sort takes as many and moves the values.
    """
    size = jnp.finfo(values.dtype).bits
    unsigned = jnp.dtype(f"uint{size}")
    bits = jax.lax.bitcast_convert_type(values, unsigned)

    def set_bit(i, prefix):
        candidate = prefix | (jnp.ones((), unsigned) << (size - 2 - i).astype(unsigned))  # Below the sign bit.
        below = (bits < candidate).sum(-1, keepdims=True)
        return jnp.where(below <= rank, candidate, prefix)

    result = jax.lax.fori_loop(0, size - 1, set_bit, jnp.zeros((len(values), 1), unsigned))
    return jax.lax.bitcast_convert_type(result, values.dtype)


def consistency(
    logits: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    valid: jax.Array,
    class_weights: tuple[float, ...] = (),
) -> jax.Array:
    """Returns the weighted cross-entropy to pseudo-labels, summed over valid pixels and divided by their number.

    docs/method.md, Eq. 4. Logits [B, H, W, K]; labels [B, H, W]; `weight` float [B, H, W] is 0 for pixels that are not
    selected; `valid` bool [B, H, W] is False where the image is padded; `class_weights` [K] multiply the terms by
    class, () by 1. Returns a scalar, 0 if no pixel is valid.
    """
    if class_weights:
        weight = weight * jnp.asarray(class_weights, weight.dtype)[labels]
    losses = pixel_cross_entropy(logits, labels, valid & (weight > 0))
    return (losses * weight).sum() / jnp.maximum(valid.sum(), 1)


@jax.custom_vjp
def contrast(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the mean squared difference of two logit maps [B, H, W, K] standardized over the classes (Eq. 5).

    Standardized logits have zero mean and unit (unbiased) variance over the classes. Those of a pixel whose logits are
    all equal are 0, and so is their gradient, which is otherwise that of Eq. 5a.
    """
    return _contrast_forward(a, b)[0]


class _Standard(NamedTuple):
    """Mean and scale over the classes, [B, H, W, 1] each, with which the logits of each pixel are standardized."""

    mean: jax.Array
    scale: jax.Array  # The inverse of the standard deviation; 0 if the logits are equal.

    def apply(self, logits: jax.Array) -> jax.Array:
        """Returns the standardized logits [B, H, W, K]."""
        return (logits - self.mean) * self.scale


def _standard(logits: jax.Array) -> _Standard:
    mean = logits.mean(-1, keepdims=True)
    variance = jnp.square(logits - mean).sum(-1, keepdims=True) / max(logits.shape[-1] - 1, 1)
    scale = jnp.where(variance > 0, jax.lax.rsqrt(jnp.where(variance > 0, variance, 1)), 0)
    return _Standard(*(checkpoint_name(each, _PIXELS) for each in (mean, scale)))


def _contrast_forward(a, b):
    by_a, by_b = _standard(a), _standard(b)
    # The sum of squared differences, not 2 (K - 1) (1 - rho): for nearly equal logits that would be rounding alone.
    distance = jnp.square(by_a.apply(a) - by_b.apply(b)).sum(-1, keepdims=True)
    return distance.sum() / a.size, (a, b, by_a, by_b, checkpoint_name(distance, _PIXELS))


def _contrast_backward(saved, gradient):
    """Eq. 5a as a_bar - b_bar - (1 - rho) a_bar, which keeps the digits of nearly equal logits too."""
    a, b, by_a, by_b, distance = saved
    varied = (by_a.scale > 0) & (by_b.scale > 0)
    excess = jnp.where(varied, distance / (2 * max(a.shape[-1] - 1, 1)), 1)  # 1 - rho
    standard_a, standard_b = by_a.apply(a), by_b.apply(b)
    difference, factor = standard_a - standard_b, 2 * gradient / a.size
    return (
        factor * by_a.scale * (difference - excess * standard_a),
        factor * by_b.scale * (-difference - excess * standard_b),
    )


contrast.defvjp(_contrast_forward, _contrast_backward)
