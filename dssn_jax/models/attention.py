"""Attention of all tokens to all tokens, without the matrix of scores in memory longer than needed."""

import functools

import jax
import jax.numpy as jnp

# Most scores (heads x queries x keys) of an image that are computed at once; 512 MiB in float32. Crops have fewer; in
# whole large images, which have more, queries are taken in parts.
_MOST_SCORES = 2**27


def attend(query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None, form: str) -> jax.Array:
    """Returns softmax(query key^T / sqrt(d)) value, [B, T, heads, d], for three arrays of that shape.

    `valid` [B, T] tells which keys take part; None: all. The form is a value of `config.model.attention`:

    - cudnn: NVIDIA's fused kernel, for bfloat16 and d of at most 128, a multiple of 8. Batches with `valid` use xla.
    - xla: products and a softmax in at least float32, which the backward pass computes again.
    - auto: cudnn where it can run: on NVIDIA GPUs of compute capability 8.0 (Ampere) or newer.
    """
    fused = form == "cudnn" or (form == "auto" and _has_fused_kernel(query))
    if fused and valid is None:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    images, tokens, heads, dim = query.shape
    chunks = -(-tokens * tokens * heads // _MOST_SCORES)
    if chunks == 1:
        return _attend(query, key, value, valid)
    size = -(-tokens // chunks)
    query = jnp.pad(query, ((0, 0), (0, chunks * size - tokens), (0, 0), (0, 0)))
    query = jnp.moveaxis(query.reshape(images, chunks, size, heads, dim), 1, 0)
    result = jax.lax.map(functools.partial(_attend, key=key, value=value, valid=valid), query)
    return jnp.moveaxis(result, 0, 1).reshape(images, chunks * size, heads, dim)[:, :tokens]


@jax.checkpoint
def _attend(query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None) -> jax.Array:
    mask = None if valid is None else valid[:, None, None]
    if query.dtype != jnp.float64:
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
    scores = jnp.einsum("btnd,bsnd->bnts", query, key) * query.shape[-1] ** -0.5  # JAX has its softmax in float32.
    weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf))
    return jnp.einsum("bnts,bsnd->btnd", weights, value)


def _has_fused_kernel(query: jax.Array) -> bool:
    device, dim = jax.devices()[0], query.shape[-1]
    if "cuda" not in device.client.platform_version or query.dtype != jnp.bfloat16 or dim > 128 or dim % 8:
        return False
    return float(device.compute_capability) >= 8
