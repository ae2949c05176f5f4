"""Loss terms: method.md, "Loss, averaged over valid pixels". Logits [B, H, W, K] are at least float32."""

import jax
import jax.numpy as jnp
import optax


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
    limit = jnp.maximum(jnp.sort(probabilities, -1)[:, rank : rank + 1], threshold)
    keep_all = flat_valid.sum(-1, keepdims=True) < min_kept
    kept = flat_valid & (keep_all | (probabilities <= limit))
    return (jnp.where(kept, flat_losses, 0).sum(-1) / jnp.maximum(kept.sum(-1), 1)).mean()


def consistency(logits: jax.Array, labels: jax.Array, selected: jax.Array, valid: jax.Array) -> jax.Array:
    """Cross-entropy to pseudo-labels [B, H, W] over the selected valid pixels, divided by the number of valid ones."""
    return pixel_cross_entropy(logits, labels, selected & valid).sum() / jnp.maximum(valid.sum(), 1)


def contrast(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared difference of two logit maps [B, H, W, K], each standardised over the class axis."""
    return jnp.square(_standardise(a) - _standardise(b)).mean()


def _standardise(logits: jax.Array) -> jax.Array:
    """Zero mean and unit (unbiased) deviation over the classes; equal logits give 0, with a finite gradient."""
    centred = logits - logits.mean(-1, keepdims=True)
    variance = jnp.square(centred).sum(-1, keepdims=True) / max(logits.shape[-1] - 1, 1)
    return jnp.where(variance > 0, centred * jax.lax.rsqrt(jnp.where(variance > 0, variance, 1)), 0)
