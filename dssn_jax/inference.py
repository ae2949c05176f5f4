"""Class maps from a network: whole images, sliding windows, centre crops. method.md, "Evaluation"."""

import jax
import jax.numpy as jnp

from dssn_jax.models import DeepLabV3Plus

MODES = ("original", "sliding_window", "center_crop")


def predict(
    model: DeepLabV3Plus, variables: dict, images: jax.Array, mode: str = "original", crop: int = 0
) -> jax.Array:
    """Class maps int32 [B, H, W] of normalised images [B, H, W, 3]; mode center_crop sees the images as they are.

    Sliding windows of side `crop` start every int(crop * 2 / 3) pixels; those at the right and bottom edges are cut
    short; class probabilities of overlapping windows are summed.
    """
    if mode != "sliding_window":
        return model.apply(variables, images).argmax(-1).astype(jnp.int32)
    height, width = images.shape[1:3]
    stride = int(crop * 2 / 3)
    total = jnp.zeros((*images.shape[:3], model.num_classes), jnp.promote_types(model.dtype, jnp.float32))
    for y in range(0, height, stride):
        for x in range(0, width, stride):
            window = (slice(None), slice(y, min(y + crop, height)), slice(x, min(x + crop, width)))
            total = total.at[window].add(jax.nn.softmax(model.apply(variables, images[window])))
    return total.argmax(-1).astype(jnp.int32)
