"""Loss terms: method.md, "Loss, averaged over valid pixels". Logits [B, H, W, K] are at least float32."""

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

_SELECTION = "selection"
# For `jax.checkpoint` of a loss: which pixels are chosen is kept for the backward pass, not found again.
KEEP_SELECTIONS = jax.checkpoint_policies.save_only_these_names(_SELECTION)


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
    """Cross-entropy of each pixel [B, H, W], 0 where not `valid` bool [B, H, W]; `labels` there may be anything."""
    labels = jnp.where(valid, labels, 0).astype(jnp.int32)
    return jnp.where(valid, optax.softmax_cross_entropy_with_integer_labels(logits, labels), 0)


def cross_entropy(logits: jax.Array, labels: jax.Array, ignore: int = 255) -> jax.Array:
    """Mean cross-entropy over the pixels whose label [B, H, W] is not `ignore`; 0 if there is none."""
    valid = labels != ignore
    return pixel_cross_entropy(logits, labels, valid).sum() / jnp.maximum(valid.sum(), 1)


def ohem_cross_entropy(
    logits: jax.Array, labels: jax.Array, threshold: float, min_kept: int, group: int, ignore: int = 255
) -> jax.Array:
    """Cross-entropy of hard pixels (online hard example mining), per group of images, averaged over the groups.

    Args:
      logits: [B, H, W, K].
      labels: [B, H, W], `ignore` where there is no label.
      threshold: pixels whose true class has at most this probability are kept,
      min_kept: but at least this many of a group: the threshold rises to the min_kept-th smallest probability, ignored
        pixels counting as 1. A group with fewer valid pixels keeps them all.
      group: consecutive images whose pixels are compared; divides B.
      ignore: the value of pixels without a label. A group without any valid pixel counts as 0.
    """
    valid = (labels != ignore).reshape(-1, group, *labels.shape[1:])
    losses = pixel_cross_entropy(logits, labels, labels != ignore).reshape(valid.shape)
    flat_valid = valid.reshape(len(valid), -1)
    flat_losses = losses.reshape(flat_valid.shape)
    # The true class's probability is exp(-loss); ignored pixels have loss 0 and so count as 1.
    probabilities = jnp.exp(-jax.lax.stop_gradient(flat_losses))
    rank = min(min_kept, probabilities.shape[1]) - 1
    limit = jnp.maximum(kth_smallest(probabilities, rank), threshold)
    keep_all = flat_valid.sum(-1, keepdims=True) < min_kept
    kept = checkpoint_name(flat_valid & (keep_all | (probabilities <= limit)), _SELECTION)
    return (jnp.where(kept, flat_losses, 0).sum(-1) / jnp.maximum(kept.sum(-1), 1)).mean()


def kth_smallest(values: jax.Array, rank: int) -> jax.Array:
    """The value of `rank` (0: the smallest) in each row of `values` [G, N] in [0, 1]: [G, 1], exactly.

    Floats of one sign are ordered as their bits are. The bits of the answer are found from the highest on, each by
    counting the values below it: some 30 passes over memory where a sort makes as many and moves the values.
    """
    size = jnp.finfo(values.dtype).bits
    unsigned = jnp.dtype(f"uint{size}")
    bits = jax.lax.bitcast_convert_type(values, unsigned)

    def find_bit(i, found):
        higher = found | (jnp.ones((), unsigned) << (size - 2 - i).astype(unsigned))  # Below the sign.
        below = (bits < higher).sum(-1, keepdims=True)
        return jnp.where(below <= rank, higher, found)

    found = jax.lax.fori_loop(0, size - 1, find_bit, jnp.zeros((len(values), 1), unsigned))
    return jax.lax.bitcast_convert_type(found, values.dtype)


def consistency(logits: jax.Array, labels: jax.Array, selected: jax.Array, valid: jax.Array) -> jax.Array:
    """Cross-entropy to pseudo-labels [B, H, W] over the selected valid pixels, divided by the number of valid ones."""
    return pixel_cross_entropy(logits, labels, selected & valid).sum() / jnp.maximum(valid.sum(), 1)


def contrast(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared difference of two logit maps [B, H, W, K], each standardized over the class axis."""
    return jnp.square(_standardize(a) - _standardize(b)).mean()


def _standardize(logits: jax.Array) -> jax.Array:
    """Zero mean and unit (unbiased) deviation over the classes; equal logits give 0, with a finite gradient."""
    centered = logits - logits.mean(-1, keepdims=True)
    variance = jnp.square(centered).sum(-1, keepdims=True) / max(logits.shape[-1] - 1, 1)
    return jnp.where(variance > 0, centered * jax.lax.rsqrt(jnp.where(variance > 0, variance, 1)), 0)
