"""From a batch of uint8 images to the views that the networks see: normalized, with the CutMix partner pasted in."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from input_pipeline.batch import Batch


class Views(NamedTuple):
    """Inputs of one training step: float images [N, H, W, 3], labels and masks; a method leaves others empty."""

    image_x: jax.Array  # Labeled images, L of them.
    label_x: jax.Array  # Integers [L, H, W].
    image_u: jax.Array | None = None  # Weak views of U unlabeled images.
    # Weak views of their CutMix partners, for pseudo-labels; None if unlabeled images are the partners of each other
    # (`swap_pairs`), or if partners are labeled.
    image_m: jax.Array | None = None
    valid_u: jax.Array | None = None  # bool [U, H, W], False where padded.
    valid_m: jax.Array | None = None  # bool [U, H, W], False where partners are padded or their labels ignored.
    strong: tuple[jax.Array, ...] = ()  # Strong views, mixed.
    boxes: tuple[jax.Array, ...] = ()  # Where partners are pasted in the strong views, as masks bool [U, H, W].
    label_m: jax.Array | None = None  # Class ids of labeled partners, integers [U, H, W].


def normalize(images: jax.Array, data, dtype=jnp.float32) -> jax.Array:
    """Maps uint8 RGB [..., 3] to (image / 255 - mean) / std in `dtype`; mean and std are those of `config.data`."""
    return (images.astype(dtype) / 255 - jnp.asarray(data.mean, dtype)) / jnp.asarray(data.std, dtype)


def denormalize(images: jax.Array, data) -> jax.Array:
    """Inverts `normalize`: float [..., 3] to uint8 RGB."""
    levels = 255 * (images * jnp.asarray(data.std, images.dtype) + jnp.asarray(data.mean, images.dtype))
    return jnp.clip(jnp.round(levels), 0, 255).astype(jnp.uint8)


def box_mask(box: jax.Array, height: int, width: int) -> jax.Array:
    """Maps boxes int32 [U, 4] as (y0, x0, y1, x1) to bool [U, height, width], True inside; empty boxes give no True."""
    y0, x0, y1, x1 = (box[:, i, None, None] for i in range(4))
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


def class_mask(labels: jax.Array, classes: jax.Array) -> jax.Array:
    """Returns where `labels`, integers [U, H, W], are of the `classes` of their image, bool [U, K]: bool [U, H, W]."""
    ids = jnp.arange(classes.shape[1], dtype=labels.dtype)
    return ((labels[..., None] == ids) & classes[:, None, None]).any(-1)


def mix(image: jax.Array, partner: jax.Array, box: jax.Array) -> jax.Array:
    """Pastes `partner` into `image`, both [U, H, W] or [U, H, W, C], where `box` bool [U, H, W] is True (Eq. 11)."""
    return jnp.where(box[..., None] if image.ndim == 4 else box, partner, image)


def swap_pairs(rows: jax.Array) -> jax.Array:
    """Swaps rows 2i and 2i + 1 of [U, ...], U being even.

    If the rows of each device are even in number, none moves between devices.
    """
    return rows.reshape(-1, 2, *rows.shape[1:])[:, ::-1].reshape(rows.shape)


def _pasted(batch: Batch, view: int, size: tuple[int, int]) -> jax.Array:
    """Returns where the partners are pasted in a strong view: in its box, and where they have its classes (Eq. 22)."""
    mask = box_mask(batch.boxes[:, view], *size)
    return mask if batch.classes is None else mask | class_mask(batch.label_m, batch.classes[:, view])


def from_batch(batch: Batch, strong: jax.Array | None, data, dtype) -> Views:
    """Returns the views of a batch in `dtype`.

    `strong` uint8 [U, V, P, H, W, 3] has V strong views of each unlabeled image and, if the batch has CutMix partners,
    of its partner, as `strong_augment.strong_views` draws them; `data` is `config.data`.
    """

    def to_float(images: jax.Array | None) -> jax.Array | None:
        return None if images is None else normalize(images, data, dtype)

    views = Views(to_float(batch.image_x), batch.label_x, to_float(batch.image_u), valid_u=batch.valid_u)
    if strong is None:
        return views
    if batch.label_m is not None:
        views = views._replace(label_m=batch.label_m, valid_m=batch.label_m != data.ignore)
    elif batch.image_m is None:
        views = views._replace(valid_m=swap_pairs(batch.valid_u))
    else:
        views = views._replace(image_m=to_float(batch.image_m), valid_m=batch.valid_m)
    boxes = tuple(_pasted(batch, i, strong.shape[3:5]) for i in range(strong.shape[1]))
    mixed = []
    for i, box in enumerate(boxes):
        image = to_float(strong[:, i, 0])
        partner = swap_pairs(image) if batch.image_m is None else to_float(strong[:, i, 1])
        mixed.append(mix(image, partner, box))
    return views._replace(strong=tuple(mixed), boxes=boxes)
