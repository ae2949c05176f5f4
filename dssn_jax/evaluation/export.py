"""A network as one file that JAX alone can run: a StableHLO artifact of `jax.export`; `--mode=export`."""

import re

import jax
import jax.export  # Not imported by `import jax`.
import jax.numpy as jnp
from etils import epath

from configs.checks import ConfigError, check_output_file
from dssn_jax.evaluation.inference import Inference
from dssn_jax.learner.learner import Learner
from dssn_jax.weights import names
from dssn_jax.weights.files import StateDictError
from dssn_jax.workdir import files, records
from dssn_jax.workdir.logs import logger
from dssn_jax.workdir.restore import pick_network, restore
from input_pipeline.errors import first_names

MADE_BY = "dssn_jax export"  # Marks the JSON file; a later export may replace it and the artifact.
PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    workdir: epath.PathLike,
    *,
    to: epath.PathLike | None = None,
    checkpoint: str = "best",
    network: str | None = None,
    size: str | None = None,
) -> epath.Path:
    """Writes a network of a checkpoint as an artifact, and a JSON file beside it that describes its use.

    The artifact maps uint8 RGB images [b, H, W, 3], with any b, to (class ids uint8 [b, H, W], their probabilities
    float32 [b, H, W]). It holds the parameters, the normalization and, if the network needs multiples of a patch, the
    resizing to them and back, and runs on `PLATFORMS`.

    Args:
      workdir: of the run.
      to: the file; None: workdir/NETWORK_STEP.stablehlo.
      checkpoint: "best", "latest" or a step.
      network: "student" | "teacher"; None: the teacher if there is one.
      size: "HEIGHTxWIDTH" in pixels, of any network; None: the training crop.

    Returns:
      The path of the artifact.

    Raises:
      WorkdirError, CheckpointError, StateDictError or ConfigError, before anything is written.
    """
    height_width = _parse_size(size)
    learner, step, networks, _ = restore(workdir, checkpoint)
    network = pick_network(networks, network)
    height, width = height_width or (learner.config.data.crop,) * 2
    if not height:
        raise ConfigError(f"--size is not given, and config.data.crop is {height}; expected HEIGHTxWIDTH")
    defects = names.defects(names.to_state_dict(networks[network]))
    if defects:
        raise StateDictError(f"step {step} of {workdir}: {network}: {first_names(defects)}")
    path = epath.Path(to or epath.Path(workdir) / f"{network}_{step}.stablehlo")
    beside = path.with_name(path.name + ".json")
    check_output_file(beside, MADE_BY)
    if path.exists() and not beside.exists():
        raise ConfigError(
            f"--to={path}: exists already, and is no earlier export, which has a .json; expected a new file"
        )
    logger.info("exporting the %s of step %d of %s for images of %dx%d", network, step, workdir, height, width)
    exported = lower(learner, networks[network], height, width)
    description = {
        "made_by": MADE_BY,
        "name": learner.config.name,
        "network": network,
        "step": step,
        "classes": list(learner.config.data.classes),
        "input": f"uint8 RGB [b, {height}, {width}, 3]",
        "output": f"class ids uint8 [b, {height}, {width}], their probabilities float32 [b, {height}, {width}]",
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
    }
    records.write_json(beside, description)
    with files.atomic_write(path) as part:
        part.write_bytes(exported.serialize())
    logger.info("wrote %s (%.1f MB) and %s.json", path, path.stat().length / 1e6, path)
    return path


def lower(learner: Learner, variables: dict, height: int, width: int) -> jax.export.Exported:
    """Lowers the network with `variables` for images of one size and any batch size; see `export`."""
    variables = jax.device_get(variables)  # NumPy arrays become constants of the program.
    inference = Inference(learner.network)

    def segment(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = inference.logits(variables, learner.normalize(images))
        probability = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, -1))
        return logits.argmax(-1).astype(jnp.uint8), probability.astype(jnp.float32)

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)
    return jax.export.export(jax.jit(segment), platforms=PLATFORMS)(images)


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise ConfigError(f"--size={text!r} is not HEIGHTxWIDTH, such as 512x1024")
    return int(match[1]), int(match[2])
