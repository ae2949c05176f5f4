"""Class scores and class maps from a network: whole images, sliding windows, flips and scales.

Images come in padded batches: each is the part inside its `Extent`, and its result is that of the image alone.
method.md, "Evaluation".
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dssn_jax.models import DeepLabV3Plus
from dssn_jax.models.extent import Extent, zero_outside
from dssn_jax.models.resize import resize

MODES = ("original", "sliding_window", "center_crop")  # The center crop is taken where images are read.


@dataclasses.dataclass(frozen=True)
class Inference:
    """How class scores are made; filled from `config.eval` by `from_config`."""

    window: int = 0  # Side of the sliding windows, pixels; 0: the whole image at once.
    flip: bool = False  # Adds the mirrored image.
    scales: tuple[float, ...] = (1.0,)  # Sizes at which the image is seen, as parts of its own.

    def predict(self, model: DeepLabV3Plus, variables: dict, images: jax.Array, extent: Extent) -> jax.Array:
        """Class maps int32 [B, H, W] of normalized images [B, H, W, 3]; 0 outside of `extent`."""
        return self.predict_with_confidence(model, variables, images, extent)[0]

    def predict_with_confidence(
        self, model: DeepLabV3Plus, variables: dict, images: jax.Array, extent: Extent
    ) -> tuple[jax.Array, jax.Array]:
        """Class maps as `predict` gives them, and the probability of the predicted class, [B, H, W]."""
        scores = self.scores(model, variables, images, extent)
        class_maps = zero_outside(scores.argmax(-1).astype(jnp.int32)[..., None], extent)[..., 0]
        return class_maps, self._normalized(scores).max(-1)

    def probabilities(self, model: DeepLabV3Plus, variables: dict, images: jax.Array, extent: Extent) -> jax.Array:
        """Class probabilities [B, H, W, K], in at least float32, of normalized images [B, H, W, 3]."""
        return self._normalized(self.scores(model, variables, images, extent))

    def scores(self, model: DeepLabV3Plus, variables: dict, images: jax.Array, extent: Extent) -> jax.Array:
        """Logits of one pass over the image, or summed probabilities of several: [B, H, W, K], at least float32."""
        if self._single:
            return model.apply(variables, images, extent=extent)
        total = 0.0
        for scale in self.scales:
            seen, seen_extent = _scaled(images, extent, scale)
            passes = self._pass(model, variables, seen, seen_extent)
            if self.flip:
                mirrored = self._pass(model, variables, _mirrored(seen, seen_extent), seen_extent)
                passes += _mirrored(mirrored, seen_extent)
            total += passes if scale == 1 else resize(passes, *images.shape[1:3], seen_extent, extent)
        return total

    def _normalized(self, scores: jax.Array) -> jax.Array:
        return jax.nn.softmax(scores) if self._single else scores / scores.sum(-1, keepdims=True)

    @property
    def _single(self) -> bool:
        return not (self.window or self.flip or self.scales != (1.0,))

    def _pass(self, model: DeepLabV3Plus, variables: dict, images: jax.Array, extent: Extent) -> jax.Array:
        if self.window:
            return _sliding_window(model, variables, images, extent, self.window)
        return jax.nn.softmax(model.apply(variables, images, extent=extent))


def from_config(config) -> Inference:
    """Returns the inference of a validated config."""
    window = (config.eval.crop or config.data.crop) if config.eval.mode == "sliding_window" else 0
    return Inference(window, config.eval.flip, tuple(config.eval.scales))


def _sliding_window(model: DeepLabV3Plus, variables: dict, images: jax.Array, extent: Extent, window: int) -> jax.Array:
    """Summed class probabilities [B, H, W, K] of windows of side `window` that start every int(window * 2 / 3) pixels.

    Those at the right and bottom edges are cut short, as the original does; they are windows of a smaller extent.
    """
    batch, height, width = images.shape[:3]
    stride = int(window * 2 / 3)
    starts = jnp.array([(y, x) for y in range(0, height, stride) for x in range(0, width, stride)], jnp.int32)
    padded = jnp.pad(images, [(0, 0), (0, window), (0, window), (0, 0)])
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    total = jnp.zeros((*padded.shape[:3], model.num_classes), dtype)

    def add(total: jax.Array, start: jax.Array):
        corner = (jnp.int32(0), *start, jnp.int32(0))
        cut = jax.lax.dynamic_slice(padded, corner, (batch, window, window, images.shape[-1]))
        inside = Extent(*(jnp.clip(size - at, 0, window) for size, at in zip(extent, start, strict=True)))
        probabilities = zero_outside(jax.nn.softmax(model.apply(variables, cut, extent=inside)), inside)
        before = jax.lax.dynamic_slice(total, corner, probabilities.shape)
        return jax.lax.dynamic_update_slice(total, before + probabilities, corner), None

    total, _ = jax.lax.scan(add, total, starts)  # A loop: its body, the network, is compiled once.
    return total[:, :height, :width]


def _scaled(images: jax.Array, extent: Extent, scale: float) -> tuple[jax.Array, Extent]:
    """Resizes each image (bilinear, aligned corners) to `scale` times its size, rounded, at least one pixel."""
    if scale == 1:
        return images, extent
    new_extent = Extent(*(jnp.maximum(jnp.round(size * scale).astype(jnp.int32), size > 0) for size in extent))
    height, width = (math.ceil(size * scale) for size in images.shape[1:3])
    return resize(images, height, width, extent, new_extent), new_extent


def _mirrored(x: jax.Array, extent: Extent) -> jax.Array:
    """Mirrors the part of each picture [B, H, W, C] inside `extent` from left to right."""
    columns = jnp.arange(x.shape[2])
    width = extent.width[:, None]
    index = jnp.where(columns < width, width - 1 - columns, columns)
    return jnp.take_along_axis(x, index[:, None, :, None], 2)
