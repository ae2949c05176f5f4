"""What a work directory holds, read back without the command line that made it: the configuration, the networks."""

import json
from typing import Any, NamedTuple

import jax
from etils import epath

from configs import checks, defaults
from dssn_jax import auto_config as automatic
from dssn_jax import models, sharding
from dssn_jax import validate as configuration
from dssn_jax.learner import learner as experiment
from dssn_jax.workdir import checkpoint
from input_pipeline.errors import UserError

CONFIG = "config.json"


class WorkdirError(UserError):
    """A folder that is not the work directory of a run, or is damaged: the message names it and what is expected."""


class SavedNetworks(NamedTuple):
    """The networks of a checkpoint."""

    config: Any
    step: int
    model: models.DeepLabV3Plus
    variables: dict[str, dict]  # Of student, and of teacher if the method has one; for `model.apply`.


def read_json(workdir: epath.PathLike, name: str) -> dict:
    """Returns the content of a JSON file of `workdir`; raises WorkdirError."""
    path = epath.Path(workdir) / name
    if not epath.Path(workdir).is_dir():
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


def read_config(workdir: epath.PathLike):
    """Returns the configuration of a run; keys that are newer than the run have their defaults.

    Raises WorkdirError.
    """
    try:
        return complete(read_json(workdir, CONFIG))
    except (TypeError, ValueError) as error:
        raise WorkdirError(f"{epath.Path(workdir) / CONFIG}: not a configuration of this program: {error}") from None


def continued(config, workdir: epath.PathLike):
    """Returns `config` with what was chosen for it by the run in `workdir`, if there is one: it keeps its choices.

    Raises WorkdirError.
    """
    if not automatic.pending(config) or not checkpoint.exists(workdir):
        return config
    return automatic.adopt(config, read_config(workdir))


def complete(saved: dict):
    """Returns the configuration of one that was saved as JSON; keys that are newer than it have their defaults."""
    config = defaults.get_config()
    config.update(saved)  # Lists become the tuples that they were.
    return config


def choose_network(workdir: epath.PathLike, networks: dict[str, dict], network: str | None) -> str:
    """Returns the name of the network asked for, or of the teacher if there is one; raises ConfigError."""
    network = network or list(networks)[-1]
    checks.check_choice(f"network of {workdir}", network, networks)
    return network


def restore_networks(
    workdir: epath.PathLike, which: str, config=None, mesh: jax.sharding.Mesh | None = None
) -> SavedNetworks:
    """Restores the networks of a checkpoint ("latest", "best" or a step); the data are not needed.

    They are those of `config` (default: that of the work directory), on every device of `mesh` (default: on one).

    Raises WorkdirError, CheckpointError or ConfigError.
    """
    config = read_config(workdir) if config is None else continued(config, workdir)
    mesh = sharding.make_mesh(jax.local_devices()[:1]) if mesh is None else mesh
    configuration.validate(config, mesh.size)
    saved = checkpoint.Checkpointer(workdir, read_only=True)
    try:
        step = saved.resolve(which)
        state, _ = saved.restore(step, experiment.abstract_state(config, mesh), config)
    finally:
        saved.close()
    return SavedNetworks(config, step, models.build(config.model, len(config.data.classes)), state.networks())
