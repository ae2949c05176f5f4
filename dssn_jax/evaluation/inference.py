"""Class scores and class maps of images: whole, in sliding windows, mirrored and at several scales.

Images come in padded batches: each image is the part inside its `Extent`, and its result is that of the image alone.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from configs.checks import ConfigError
from dssn_jax.models.extent import Extent, zero_outside
from dssn_jax.models.network import Network
from dssn_jax.models.resize import resize


@dataclasses.dataclass(frozen=True)
class Inference:
    """A network and how its predictions are combined; `from_config` fills it from `config.eval`."""

    network: Network
    window: int = 0  # Side of sliding windows, in pixels; 0: the whole image at once.
    flip: bool = False  # Adds the mirrored image.
    scales: tuple[float, ...] = (1.0,)  # Scales at which the image is predicted.

    def predict(self, variables: dict, images: jax.Array, extent: Extent) -> tuple[jax.Array, jax.Array]:
        """Maps normalized images [B, H, W, 3] to class maps int32 [B, H, W] and the probabilities of these classes.

        Class maps are 0 outside `extent`, where probabilities are undefined.
        """
        scores = self.scores(variables, images, extent)
        class_maps = zero_outside(scores.argmax(-1).astype(jnp.int32)[..., None], extent)[..., 0]
        probabilities = jax.nn.softmax(scores) if self._is_single_pass else scores / scores.sum(-1, keepdims=True)
        return class_maps, probabilities.max(-1)

    def scores(self, variables: dict, images: jax.Array, extent: Extent) -> jax.Array:
        """Returns the logits of a single pass, or the summed probabilities of several: [B, H, W, K], >= float32."""
        if self._is_single_pass:
            return self._logits(variables, images, extent)
        total = 0.0
        for scale in self.scales:
            scaled, scaled_extent = self._scaled(images, extent, scale)
            probabilities = self._probabilities(variables, scaled, scaled_extent)
            if self.flip:
                mirrored = self._probabilities(variables, _mirrored(scaled, scaled_extent), scaled_extent)
                probabilities += _mirrored(mirrored, scaled_extent)
            total += probabilities if scale == 1 else resize(probabilities, *images.shape[1:3], scaled_extent, extent)
        return total

    @property
    def _is_single_pass(self) -> bool:
        return not (self.window or self.flip or self.scales != (1.0,))

    def _probabilities(self, variables: dict, images: jax.Array, extent: Extent) -> jax.Array:
        """Returns class probabilities [B, H, W, K], summed over sliding windows if there are any."""
        if self.window:
            return self._sliding_window(variables, images, extent)
        return jax.nn.softmax(self._logits(variables, images, extent))

    def _logits(self, variables: dict, images: jax.Array, extent: Extent) -> jax.Array:
        """Returns logits [B, H, W, K]; networks that do not support padding see each image stretched to H x W."""
        if self.network.supports_padding:
            return self.network.apply(variables, images, extent=extent)
        size, batch = images.shape[1:3], len(images)
        full = Extent(*(jnp.full(batch, side, jnp.int32) for side in size))
        logits = self.network.apply(variables, resize(images, *size, extent, full))
        return resize(logits, *size, full, extent)

    def _sliding_window(self, variables: dict, images: jax.Array, extent: Extent) -> jax.Array:
        """Sums class probabilities of windows that start every int(window * 2 / 3) pixels (docs/method.md, Eq. 13).

        Those at the right and bottom edges are cut short, as in the original; they are windows of a smaller extent.
        """
        (batch, height, width), window = images.shape[:3], self.window
        stride = int(window * 2 / 3)
        starts = jnp.array([(y, x) for y in range(0, height, stride) for x in range(0, width, stride)], jnp.int32)
        padded = jnp.pad(images, [(0, 0), (0, window), (0, window), (0, 0)])
        total = jnp.zeros((*padded.shape[:3], self.network.num_classes), self.network.image_dtype)

        def body(total: jax.Array, start: jax.Array):
            corner = (jnp.int32(0), *start, jnp.int32(0))
            cut = jax.lax.dynamic_slice(padded, corner, (batch, window, window, images.shape[-1]))
            inside = Extent(*(jnp.clip(size - first, 0, window) for size, first in zip(extent, start, strict=True)))
            probabilities = zero_outside(jax.nn.softmax(self._logits(variables, cut, inside)), inside)
            before = jax.lax.dynamic_slice(total, corner, probabilities.shape)
            return jax.lax.dynamic_update_slice(total, before + probabilities, corner), None

        total, _ = jax.lax.scan(body, total, starts)  # A loop, so that the network is compiled once.
        return total[:, :height, :width]

    def _scaled(self, images: jax.Array, extent: Extent, scale: float) -> tuple[jax.Array, Extent]:
        """Resizes each image (bilinear, aligned corners) to `scale` times its size, rounded, at least one pixel."""
        if scale == 1:
            return images, extent
        new_extent = Extent(*(jnp.maximum(jnp.round(size * scale).astype(jnp.int32), size > 0) for size in extent))
        multiple = self.network.size_multiple
        height, width = (math.ceil(size * scale / multiple) * multiple for size in images.shape[1:3])
        return resize(images, height, width, extent, new_extent), new_extent


def from_config(config, network: Network) -> Inference:
    """Returns the inference of a validated config; raises ConfigError if `network` cannot take its windows."""
    window = eval_crop(config) if config.eval.mode == "sliding_window" else 0
    if window % network.size_multiple:
        raise ConfigError(
            f"the sliding window (config.eval.crop, or config.data.crop) is {window}; {config.model.encoder} needs a "
            f"multiple of {network.size_multiple}"
        )
    return Inference(network, window, config.eval.flip, tuple(config.eval.scales))


def eval_crop(config) -> int:
    """Returns the side of sliding windows and center crops, in pixels; raises ConfigError if none is configured."""
    crop = config.eval.crop or config.data.crop
    if not crop:
        raise ConfigError(f"config.eval.crop and config.data.crop are 0; config.eval.mode={config.eval.mode} needs one")
    return crop


def _mirrored(x: jax.Array, extent: Extent) -> jax.Array:
    """Mirrors the part of each image [B, H, W, C] inside `extent` from left to right."""
    columns = jnp.arange(x.shape[2])
    width = extent.width[:, None]
    index = jnp.where(columns < width, width - 1 - columns, columns)
    return jnp.take_along_axis(x, index[:, None, :, None], 2)
