"""The inference network as one file that JAX alone runs: a StableHLO artifact of `jax.export`; `--mode=export`."""

import re

import jax
import jax.export  # Not imported by `import jax`.
import jax.numpy as jnp
from etils import epath

from configs.checks import ConfigError, check_output_file
from dssn_jax.methods import views
from dssn_jax.workdir import files, recorder
from dssn_jax.workdir import restore as saved_run
from dssn_jax.workdir.recorder import logger

PLATFORMS = ("cpu", "cuda", "tpu")


def export(workdir: str, which: str, network: str | None, size: str | None, to: str | None) -> epath.Path:
    """Writes a network of a checkpoint as an artifact, and beside it as JSON what one must know to use it.

    The artifact maps uint8 RGB images [b, H, W, 3], b any number, to (class ids uint8 [b, H, W], their probabilities
    float32 [b, H, W]). It holds the parameters and the normalization, and runs on `PLATFORMS`.

    Args:
      workdir: of the run.
      which: checkpoint: "latest", "best" or a step.
      network: "student" | "teacher"; None: the teacher if there is one.
      size: "HxW" pixels; None: the training crop.
      to: the file; None: workdir/NETWORK_STEP.stablehlo.

    Returns:
      The path of the artifact.

    Raises:
      WorkdirError, CheckpointError or ConfigError, before anything is written.
    """
    height_width = _parse_size(size)
    saved = saved_run.restore_networks(workdir, which)
    network = saved_run.choose_network(workdir, saved.variables, network)
    height, width = height_width or (saved.config.data.crop,) * 2
    path = epath.Path(to or epath.Path(workdir) / f"{network}_{saved.step}.stablehlo")
    check_output_file(path)
    recorder.log_to(None)
    logger.info("exporting the %s of step %d of %s for images of %dx%d", network, saved.step, workdir, height, width)
    exported = lower(saved.model, saved.variables[network], saved.config.data, height, width)
    facts = {
        "name": saved.config.name,
        "network": network,
        "step": saved.step,
        "classes": list(saved.config.data.classes),
        "input": f"uint8 RGB [b, {height}, {width}, 3]",
        "output": f"class ids uint8 [b, {height}, {width}], their probabilities float32 [b, {height}, {width}]",
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
    }
    recorder.write_json(path.with_name(path.name + ".json"), facts)
    with files.whole(path) as part:
        part.write_bytes(exported.serialize())
    logger.info("wrote %s (%.1f MB) and %s.json", path, path.stat().length / 1e6, path)
    return path


def lower(model, variables: dict, data, height: int, width: int) -> jax.export.Exported:
    """Lowers `model` with `variables` for images of one size and any batch; see `export`. `data` is config.data."""
    # As NumPy arrays the variables become constants of the program.
    variables = jax.device_get(variables)
    dtype = jnp.promote_types(model.dtype, jnp.float32)

    def segment(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(variables, views.normalize(images, data.mean, data.std, dtype))
        probability = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, -1))
        return logits.argmax(-1).astype(jnp.uint8), probability.astype(jnp.float32)

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)
    return jax.export.export(jax.jit(segment), platforms=PLATFORMS)(images)


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ConfigError(f"--size={text!r} is not HEIGHTxWIDTH, such as 512x1024")
    return int(found[1]), int(found[2])
