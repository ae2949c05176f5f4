"""Selections: which pixels of a pseudo-label map are trained on, and with what weight.

A selection is a frozen dataclass with `init(num_classes)`, which returns its state (a pytree, {} if it has none),
`update(state, logits)`, which takes the logits [U, h, w, K] of the unmixed weak views once per step and returns the new
state, and `__call__(probabilities, state)`, which maps [B, H, W, K] to a weight per pixel: float [B, H, W].
"""

import dataclasses

import jax
import jax.numpy as jnp


class _Stateless:
    def init(self, num_classes: int) -> dict:
        """Returns the empty state."""
        del num_classes
        return {}

    def update(self, state: dict, logits: jax.Array) -> dict:
        """Returns the state unchanged."""
        del logits
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


# Name in config.method.selection -> constructor from config.method.
SELECTIONS = {
    "class_aware": lambda method: ClassAware(method.class_aware_ratio, method.class_aware_floor),
    "threshold": lambda method: Threshold(method.threshold),
}


def pseudo_label(logits: jax.Array, selection, state: dict) -> tuple[jax.Array, jax.Array]:
    """Maps logits [B, H, W, K] to labels int32 [B, H, W] and weights float [B, H, W], without a gradient."""
    logits = jax.lax.stop_gradient(logits)
    return logits.argmax(-1).astype(jnp.int32), selection(jax.nn.softmax(logits), state)
