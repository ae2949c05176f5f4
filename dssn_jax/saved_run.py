"""What a work directory holds, read back without the command line that made it: the configuration, the networks."""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from configs import defaults
from dssn_jax import checkpoint, methods, models, optimizer, train_state
from dssn_jax import config as configuration

CONFIG = "config.json"


class WorkdirError(ValueError):
    """A folder that is not the work directory of a run, or is damaged: the message names it and what is expected."""


class SavedNetworks(NamedTuple):
    """The networks of a checkpoint."""

    config: Any
    step: int
    model: models.DeepLabV3Plus
    variables: dict[str, dict]  # Of student, and of teacher if the method has one; for `model.apply`.


def read_json(workdir: str | pathlib.Path, name: str) -> dict:
    """Returns the content of a JSON file of `workdir`; raises WorkdirError."""
    path = pathlib.Path(workdir) / name
    if not pathlib.Path(workdir).is_dir():
        raise WorkdirError(f"{workdir}: no such folder; expected the work directory of a training run")
    if not path.is_file():
        raise WorkdirError(f"{workdir}: no {name} in it; expected the work directory of a training run")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise WorkdirError(f"{path}: damaged, not JSON: {error}") from None
    if not isinstance(content, dict):
        raise WorkdirError(f"{path}: holds a {type(content).__name__}; expected a JSON object")
    return content


def read_config(workdir: str | pathlib.Path):
    """Returns the configuration of a run; keys that are newer than the run have their defaults.

    Raises WorkdirError.
    """
    saved = read_json(workdir, CONFIG)
    config = defaults.get_config()
    try:
        config.update(saved)  # Lists become the tuples that they were.
    except (TypeError, ValueError) as error:
        raise WorkdirError(f"{pathlib.Path(workdir) / CONFIG}: not a configuration of this program: {error}") from None
    return config


def restore_networks(workdir: str | pathlib.Path, which: str) -> SavedNetworks:
    """Restores the networks of a checkpoint ("latest", "best" or a step) on one device; the data are not needed.

    Raises WorkdirError, CheckpointError or ConfigError.
    """
    config = read_config(workdir)
    configuration.validate(config, device_count=1)
    model = models.build(config.model, len(config.data.classes))
    transformation, _ = optimizer.from_config(config.optimizer, steps=1)  # The state's arrays do not depend on steps.
    teacher = methods.from_config(config, steps_per_epoch=1).has_teacher
    start = functools.partial(train_state.initialise, model, transformation, teacher=teacher)
    where = SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(start, jax.random.PRNGKey(config.seed)),
    )
    saved = checkpoint.Checkpointer(workdir, read_only=True)
    try:
        step = saved.resolve(which)
        state, _ = saved.restore(step, like, config)
    finally:
        saved.close()
    return SavedNetworks(config, step, model, state.networks())
