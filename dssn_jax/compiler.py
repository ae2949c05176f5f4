"""Options of XLA's compiler for programs that convolve the images of a batch."""

import functools

import jax
import jax.numpy as jnp

from dssn_jax import sharding

# With fewer than eight images per device the compiler for TPUs moves stretches of the pixels to the axis of the images.
# Norms and residual sums do not follow: maps are copied back and forth between convolutions, and stored in float32.
_TPU = {"xla_tpu_run_space_to_batch": "false", "xla_tpu_run_space_to_batch_on_new_platforms": "false"}


@functools.cache
def options(mesh: jax.sharding.Mesh) -> dict[str, str] | None:
    """Returns `compiler_options` of `jax.jit` for programs on the devices of `mesh`; None for the compiler's own.

    A compiler that does not know them, such as that of another release, is left to itself.
    """
    if sharding.platform(mesh) != "tpu":
        return None
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    try:
        jax.jit(jnp.negative, compiler_options=_TPU).lower(number).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return _TPU
