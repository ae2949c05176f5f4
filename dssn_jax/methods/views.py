"""From the batch of uint8 images to the views that the networks see: normalized, with the CutMix partner pasted.

The batch is described in `input_pipeline.pipeline`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mixing(NamedTuple):
    """Where each strong view of an unlabeled image shows its CutMix partner: box masks bool [U, H, W], one a view."""

    boxes: tuple[jax.Array, ...]

    def __call__(self, view: int, image: jax.Array, partner: jax.Array) -> jax.Array:
        """Pastes `partner` into `image` (both [U, H, W] or [U, H, W, C]) where the box of strong view `view` is."""
        box = self.boxes[view]
        return jnp.where(box[..., None] if image.ndim == 4 else box, partner, image)


class Views(NamedTuple):
    """What one training step reads: float images [N, H, W, 3], labels, masks. Parts that a method lacks are empty."""

    image_x: jax.Array
    label_x: jax.Array  # integers [L, H, W]
    image_u: jax.Array | None = None  # The weak view.
    image_m: jax.Array | None = None  # The weak view of the CutMix partner.
    strong: tuple[jax.Array, ...] = ()  # Mixed.
    valid_u: jax.Array | None = None  # bool [U, H, W], False where padded.
    valid_m: jax.Array | None = None
    mixing: Mixing = Mixing(())


def normalize(image: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype=jnp.float32) -> jax.Array:
    """uint8 RGB [..., 3] -> (image / 255 - mean) / std, in `dtype`."""
    return (image.astype(dtype) / 255 - jnp.asarray(mean, dtype)) / jnp.asarray(std, dtype)


def box_mask(box: jax.Array, height: int, width: int) -> jax.Array:
    """Boxes int32 [U, 4] as (y0, x0, y1, x1) -> bool [U, height, width], True inside; an empty box has no inside."""
    y0, x0, y1, x1 = (box[:, i, None, None] for i in range(4))
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


def mix(image_x, label_x, image_u, image_m, strong, strong_m, valid_u, valid_m, boxes) -> Views:
    """Pastes the partner's strong views `strong_m` into `strong`: one box mask, bool [U, H, W], for each."""
    mixing = Mixing(tuple(boxes))
    mixed = tuple(mixing(view, *pair) for view, pair in enumerate(zip(strong, strong_m, strict=True)))
    return Views(image_x, label_x, image_u, image_m, mixed, valid_u, valid_m, mixing)


def from_batch(batch: dict[str, jax.Array], mean: tuple[float, ...], std: tuple[float, ...], dtype) -> Views:
    """Turns a batch of the input pipeline into views in `dtype`."""
    images = {key: normalize(value, mean, std, dtype) for key, value in batch.items() if key.startswith("image_")}
    if "image_u" not in images:
        return Views(images["image_x"], batch["label_x"])
    numbers = [i for i in (1, 2) if f"image_s{i}" in images]
    size = batch["image_u"].shape[1:3]
    return mix(
        images["image_x"],
        batch["label_x"],
        images["image_u"],
        images.get("image_m"),
        [images[f"image_s{i}"] for i in numbers],
        [images[f"image_m{i}"] for i in numbers],
        batch["valid_u"],
        batch.get("valid_m"),
        [box_mask(batch[f"box{i}"], *size) for i in numbers],
    )
