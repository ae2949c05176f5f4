"""Class scores and class maps of images: whole, in sliding windows, mirrored and at several scales.

Images come in padded batches: each image is the part inside its `Extent`, and its result is that of the image alone.
Batches for networks that do not support padding have no padding: each image fills its row.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from configs.checks import ConfigError, check_multiple
from dssn_jax.models.extent import Extent, zero_outside
from dssn_jax.models.network import Network
from dssn_jax.models.resize import resize


@dataclasses.dataclass(frozen=True)
class Inference:
    """A network and how its predictions are combined; `from_config` fills it from `config.eval`."""

    network: Network
    window: int = 0  # Side of sliding windows, in pixels; 0: the whole image at once.
    windows: str = "cut"  # At the right and bottom edges: "cut" short, or moved "inside", where they are whole.
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
            return self.logits(variables, images, extent)
        total = 0.0
        for scale in self.scales:
            scaled, scaled_extent = self._scaled(images, extent, scale)
            probabilities = self._probabilities(variables, scaled, scaled_extent)
            if self.flip:
                mirrored = self._probabilities(variables, _mirrored(scaled, scaled_extent), scaled_extent)
                probabilities += _mirrored(mirrored, scaled_extent)
            total += probabilities if scale == 1 else resize(probabilities, *images.shape[1:3], scaled_extent, extent)
        return total

    def logits(self, variables: dict, images: jax.Array, extent: Extent | None = None) -> jax.Array:
        """Maps normalized images [B, H, W, 3] of any size to logits [B, H, W, K], >= float32.

        For a network that needs multiples of a patch, images are resized to the nearest ones and the logits back,
        bilinearly with aligned corners, as UniMatch V2 does. Without `extent`, images fill their rows.
        """
        network, size = self.network, images.shape[1:3]
        extent = extent if network.supports_padding else None
        taken = tuple(int(self._taken(side)[-1]) for side in size)
        if taken == size and (extent is None or network.size_multiple == 1):
            return network.apply(variables, images, extent=extent)
        taken_extent = None if extent is None else self._taken_extent(size, extent)
        logits = network.apply(variables, resize(images, *taken, extent, taken_extent), extent=taken_extent)
        return resize(logits, *size, taken_extent, extent)

    @property
    def _is_single_pass(self) -> bool:
        return not (self.window or self.flip or self.scales != (1.0,))

    def _probabilities(self, variables: dict, images: jax.Array, extent: Extent) -> jax.Array:
        """Returns class probabilities [B, H, W, K], summed over sliding windows if there are any."""
        if self.window:
            return self._sliding_window(variables, images, extent)
        return jax.nn.softmax(self.logits(variables, images, extent))

    def _sliding_window(self, variables: dict, images: jax.Array, extent: Extent) -> jax.Array:
        """Sums class probabilities of windows (docs/method.md, Eq. 13), of which each image has its own."""
        (height, width), window = images.shape[1:3], self.window
        if self.windows == "cut":  # A window may begin anywhere inside the image.
            images = jnp.pad(images, [(0, 0), (0, window), (0, window), (0, 0)])
        total = jnp.zeros((*images.shape[:3], self.network.num_classes), self.network.image_dtype)
        sides = [min(window, side) for side in images.shape[1:3]]
        numbers = [jnp.arange(self._window_count(side), dtype=jnp.int32) for side in (height, width)]

        def body(total: jax.Array, number: jax.Array):
            rows, columns = (self._window_span(size, each) for size, each in zip(extent, number, strict=True))
            corners, inside = jnp.stack([rows[0], columns[0]], 1), Extent(rows[1], columns[1])
            cut = _slices(images, corners, sides)
            probabilities = zero_outside(jax.nn.softmax(self.logits(variables, cut, inside)), inside)
            return _add_slices(total, probabilities, corners), None

        grid = jnp.stack(jnp.meshgrid(*numbers, indexing="ij"), -1).reshape(-1, 2)
        total, _ = jax.lax.scan(body, total, grid)  # A loop, so that the network is compiled once.
        return total[:, :height, :width]

    @property
    def _stride(self) -> int:
        """Distance between the starts of windows, in pixels."""
        return int(self.window * 2 / 3)

    def _window_count(self, side: int) -> int:
        """Returns the number of windows along a side of `side` pixels, the most in a batch padded to it."""
        if self.windows == "cut":
            return math.ceil(side / self._stride)
        return 1 + math.ceil(max(side - self.window, 0) / self._stride)

    def _window_span(self, sides: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns where window `number` begins along sides int32 [B], and its length; 0 if there are fewer windows."""
        start = jnp.broadcast_to(number * self._stride, sides.shape)
        if self.windows == "cut":
            return start, jnp.clip(sides - start, 0, self.window)
        last = jnp.maximum(sides - self.window, 0)
        length = jnp.where(start - self._stride < last, jnp.minimum(sides, self.window), 0)
        return jnp.minimum(start, last), length

    def _scaled(self, images: jax.Array, extent: Extent, scale: float) -> tuple[jax.Array, Extent]:
        """Resizes each image (bilinear, aligned corners) to `scale` times its size, rounded as `_taken` does."""
        if scale == 1:
            return images, extent
        size = images.shape[1:3]
        new_extent = self._taken_extent(size, extent, scale)
        return resize(images, *(int(self._taken(side, scale)[-1]) for side in size), extent, new_extent), new_extent

    def _taken(self, most: int, scale: float = 1.0) -> np.ndarray:
        """Returns the sides int32 [most + 1] at which the network takes images with sides of 0 to `most` pixels.

        They are multiples of its patch: `scale` times the side, rounded to pixels, then int(side / patch + 0.5) times
        the patch, at least one. A table, because traced sizes must be rounded as static ones are.
        """
        multiple, sides = self.network.size_multiple, np.arange(most + 1, dtype=np.float32)
        scaled = np.round(sides * np.float32(scale)).astype(np.int32)
        return np.maximum((2 * scaled + multiple) // (2 * multiple), 1) * multiple

    def _taken_extent(self, size: tuple[int, int], extent: Extent, scale: float = 1.0) -> Extent:
        """Returns the sizes at which the network takes the images of `extent` in a batch of `size`."""
        tables = (jnp.asarray(self._taken(side, scale)) for side in size)
        return Extent(*(table[sides] for table, sides in zip(tables, extent, strict=True)))


def from_config(config, network: Network) -> Inference:
    """Returns the inference of a validated config; raises ConfigError if `network` cannot take its windows."""
    window = eval_crop(config) if config.eval.mode == "sliding_window" else 0
    encoder = config.model.encoder
    key = "the sliding window (config.eval.crop, or config.data.crop)"
    check_multiple(key, window, network.size_multiple, encoder)
    if window and config.eval.windows == "cut" and not network.supports_padding:
        raise ConfigError(
            f"config.eval.windows is 'cut', which makes windows of many sizes; {encoder} supports no padding and needs "
            "'inside'"
        )
    return Inference(network, window, config.eval.windows, config.eval.flip, tuple(config.eval.scales))


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


def _slices(x: jax.Array, corners: jax.Array, sides: list[int]) -> jax.Array:
    """Cuts a part of `sides` pixels out of each image [B, H, W, C], from its corner int32 [B, 2] on."""
    return jax.vmap(lambda image, corner: _slice(image, corner, (*sides, x.shape[-1])))(x, corners)


def _slice(image: jax.Array, corner: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(image, (*corner, jnp.int32(0)), shape)


@jax.vmap
def _add_slices(image: jax.Array, part: jax.Array, corner: jax.Array) -> jax.Array:
    """Adds parts [B, h, w, C] to images [B, H, W, C] at the corners int32 [B, 2]."""
    added = _slice(image, corner, part.shape) + part
    return jax.lax.dynamic_update_slice(image, added, (*corner, jnp.int32(0)))
