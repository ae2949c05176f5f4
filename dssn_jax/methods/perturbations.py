"""Perturbations of feature maps: what makes a stream's features differ from those of its view.

A perturbation maps (features, key, index) to features of the same shapes: `features` are the encoder's maps
[B, h, w, C] of one stream, `key` is shared by all streams of a step, `index` is the stream's number in the method
(`Method.number`): 2i and 2i + 1 are two streams of one kind of view.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ChannelDropout:
    """Zeroes whole channels with probability `rate` and scales the others by 1 / (1 - rate), as `nn.Dropout2d`."""

    rate: float = 0.5

    def __call__(self, features: tuple[jax.Array, ...], key: jax.Array, index: int) -> tuple[jax.Array, ...]:
        if self.rate == 0:
            return features
        keys = jax.random.split(jax.random.fold_in(key, index), len(features))
        return tuple(self._drop(x, key) for x, key in zip(features, keys, strict=True))

    def _drop(self, x: jax.Array, key: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(key, 1 - self.rate, (x.shape[0], 1, 1, x.shape[-1]))
        return jnp.where(keep, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros((), x.dtype))


@dataclasses.dataclass(frozen=True)
class ComplementaryDropout:
    """Complementary channel dropout in pairs of streams (Yang et al., UniMatch V2, TPAMI 2025).

    A channel is kept, and doubled, in exactly one stream of the pair; half of the images, rounded down, are not
    perturbed. Streams 2i and 2i + 1 form a pair. Feature maps with the same number of channels share their mask.
    """

    def __call__(self, features: tuple[jax.Array, ...], key: jax.Array, index: int) -> tuple[jax.Array, ...]:
        pair, side = divmod(index, 2)
        key = jax.random.fold_in(key, pair)
        batch = len(features[0])
        untouched = jax.random.permutation(jax.random.fold_in(key, 0), batch) < batch // 2

        def scale(x: jax.Array) -> jax.Array:
            first = jax.random.bernoulli(jax.random.fold_in(key, x.shape[-1]), 0.5, (batch, x.shape[-1]))
            kept = first if side == 0 else ~first
            factor = jnp.where(untouched[:, None], 1, 2 * kept).astype(x.dtype)
            return x * factor[:, None, None, :]

        return tuple(scale(x) for x in features)


# Name in config.method.{strong,feature}_perturb -> constructor from config.method; None: features stay as they are.
PERTURBATIONS = {
    "none": lambda method: None,
    "dropout": lambda method: ChannelDropout(method.feature_dropout),
    "complementary": lambda method: ComplementaryDropout(),
}
