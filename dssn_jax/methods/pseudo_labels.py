"""Which pixels of a pseudo-label map are trained on. Selections are static: method.md, "Loss"."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ClassAware:
    """Class-aware selection (CPLG of DSSN): per image and class, the pixels near the class's largest probability."""

    ratio: float = 0.96
    floor: float = 0.92

    def __call__(self, probabilities: jax.Array) -> jax.Array:
        """Probabilities [B, H, W, K] -> selected pixels bool [B, H, W].

        gamma_c = ratio * m_c if m_c > floor else m_c, with m_c the largest p_c of the image (ignored pixels included);
        a pixel is selected if p_c > gamma_c for some c.
        """
        largest = probabilities.max((1, 2), keepdims=True)
        gamma = jnp.where(largest > self.floor, self.ratio * largest, largest)
        return (probabilities > gamma).any(-1)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Pixels whose largest probability is at least `threshold` (FixMatch, UniMatch); 0 selects every pixel."""

    threshold: float

    def __call__(self, probabilities: jax.Array) -> jax.Array:
        """Probabilities [B, H, W, K] -> selected pixels bool [B, H, W]."""
        return probabilities.max(-1) >= self.threshold


SELECTIONS = ("class_aware", "threshold")


def from_config(method) -> ClassAware | Threshold:
    """Returns the selection of `config.method`."""
    if method.selection == "class_aware":
        return ClassAware(method.class_aware_ratio, method.class_aware_floor)
    return Threshold(method.threshold)


def pseudo_label(logits: jax.Array, selection) -> tuple[jax.Array, jax.Array]:
    """Logits [B, H, W, K] -> labels int32 [B, H, W] and selected pixels bool [B, H, W]; no gradient flows through."""
    logits = jax.lax.stop_gradient(logits)
    return logits.argmax(-1).astype(jnp.int32), selection(jax.nn.softmax(logits))
