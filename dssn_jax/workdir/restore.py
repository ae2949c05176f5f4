"""Reads a work directory back without the command line that made it: its configuration and its networks."""

import contextlib
import json
from typing import Any, NamedTuple

import jax
from etils import epath

from configs import checks, defaults
from dssn_jax import auto_config
from dssn_jax.learner import learner as learner_lib
from dssn_jax.learner.state import deployed
from dssn_jax.validate import validate_model
from dssn_jax.workdir.checkpoint import Checkpointer, exists
from input_pipeline.errors import UserError

CONFIG = "config.json"


class WorkdirError(UserError):
    """A folder that is no work directory of a run, or is damaged; the message names it and what is expected."""


class Restored(NamedTuple):
    """The networks of a checkpoint, with the learner that applies them."""

    learner: Any  # `dssn_jax.learner.learner.Learner`; its config has the optimizer of the checkpoint.
    step: int
    networks: dict[str, dict]  # Variables for `learner.network.apply`: student and, with EMA, teacher.
    meta: dict  # See `dssn_jax.workdir.checkpoint`.


def restore(
    workdir: epath.PathLike, checkpoint: str | None = "best", *, config=None, mesh: jax.sharding.Mesh | None = None
) -> Restored:
    """Restores the networks of a checkpoint, replicated over `mesh`; needs no data and any number of devices.

    Args:
      workdir: of the run.
      checkpoint: "latest", "best", a step, or None (best, or latest if nothing was evaluated yet).
      config: describes the networks; None: the configuration in the work directory.
      mesh: None: all devices.

    Raises:
      WorkdirError, CheckpointError or ConfigError.
    """
    config = read_config(workdir) if config is None else inherit_choices(config, workdir)
    validate_model(config)
    with contextlib.closing(Checkpointer(workdir, read_only=True)) as saved:
        step = saved.resolve(checkpoint)
        # Networks do not depend on the optimizer, but its state lies beside them.
        config.optimizer = with_defaults(saved.meta(step)["config"]).optimizer
        learner = learner_lib.build(config, mesh)
        state, meta = saved.restore(step, learner.abstract_state(), config)
    return Restored(learner, step, state.networks(), meta)


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
    """Returns the configuration of a run, with defaults for keys that are newer than the run; raises WorkdirError."""
    try:
        return with_defaults(read_json(workdir, CONFIG))
    except (TypeError, ValueError) as error:
        raise WorkdirError(f"{epath.Path(workdir) / CONFIG}: not a configuration of this program: {error}") from None


def with_defaults(saved: dict):
    """Returns the configuration that was saved as JSON, with defaults for keys that are newer than it."""
    config = defaults.get_config()
    config.update(saved)  # Lists become tuples again.
    return config


def inherit_choices(config, workdir: epath.PathLike):
    """Returns a copy of `config` whose unset keys have the values that the run in `workdir`, if any, chose for them.

    Raises WorkdirError.
    """
    if not auto_config.unset_keys(config) or not exists(workdir):
        return config.copy_and_resolve_references()
    return auto_config.copy_choices(config, read_config(workdir))


def pick_network(networks, name: str | None = None) -> str:
    """Returns `name`, checked against the names of `networks`, or by default that of the deployed network.

    Raises ConfigError.
    """
    name = name or deployed(networks)
    checks.check_choice("network", name, networks)
    return name
