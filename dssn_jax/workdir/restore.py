"""Reads a work directory back without the command line that made it: its configuration and its networks."""

import contextlib
import json
from typing import Any, NamedTuple

import jax
from etils import epath

from configs import checks
from dssn_jax import auto_config
from dssn_jax.learner import learner as learner_lib
from dssn_jax.learner.state import TrainState, deployed
from dssn_jax.methods import method
from dssn_jax.validate import validate_model
from dssn_jax.workdir import records
from dssn_jax.workdir.checkpoint import FOLDER, Checkpointer, CheckpointError, exists
from dssn_jax.workdir.logs import logger


class Restored(NamedTuple):
    """The networks of a checkpoint, with the learner that applies them."""

    learner: Any  # `dssn_jax.learner.learner.Learner`; its config has the optimizer of the checkpoint.
    step: int
    networks: dict[str, dict]  # Variables for `learner.network.apply`: student and, with EMA, teacher.
    state: TrainState


def restore(
    workdir: epath.PathLike, checkpoint: str | None = "best", *, config=None, mesh: jax.sharding.Mesh | None = None
) -> Restored:
    """Restores the networks of a checkpoint, replicated over `mesh`; needs no data and any number of devices.

    Args:
      workdir: of the run.
      checkpoint: "latest", "best", a step, or None (best, or latest if nothing was evaluated yet).
      config: describes the networks; None: the configuration in the checkpoint.
      mesh: None: all devices.

    Raises:
      WorkdirError, CheckpointError or ConfigError.
    """
    with contextlib.closing(Checkpointer(workdir, read_only=True)) as saved:
        step = saved.resolve(checkpoint)
        trained = records.with_defaults(saved.meta(step)["config"])
        if config is None:
            _check_run(workdir, step, trained)
        config = trained if config is None else inherit_choices(config, workdir)
        validate_model(config)
        # Networks do not depend on optimizer and selection, but their states lie beside them.
        config.optimizer, config.method.selection = trained.optimizer, trained.method.selection
        method.check(config)
        learner = learner_lib.build(config, mesh)
        state, _ = saved.restore(step, learner.abstract_state(), config)
    _compare(workdir, trained, config)
    return Restored(learner, step, state.networks(), state)


def check_run(workdir: epath.PathLike) -> None:
    """Raises WorkdirError if the latest checkpoint, if there is one that can be read, is of another run."""
    if not exists(workdir):
        return
    with contextlib.suppress(CheckpointError), contextlib.closing(Checkpointer(workdir, read_only=True)) as saved:
        step = saved.resolve("latest")
        _check_run(workdir, step, records.with_defaults(saved.meta(step)["config"]))


def _check_run(workdir: epath.PathLike, step: int, trained) -> None:
    """Raises WorkdirError if the checkpoint of `step` has taken the place of one of this run."""
    if not (epath.Path(workdir) / records.CONFIG).exists():
        return
    try:
        _compare(workdir, trained, records.read_config(workdir))
    except checks.ConfigError as error:
        folder = epath.Path(workdir) / FOLDER / str(step)
        raise records.WorkdirError(f"{folder} is of another run than {records.CONFIG} beside it: {error}") from None


def _compare(workdir: epath.PathLike, trained, config) -> None:
    """Raises ConfigError for another normalization than in training, and warns of other keys that change scores."""
    trained, config = json.loads(trained.to_json()), json.loads(config.to_json())

    def changed(*keys: str) -> list[str]:
        data = [{key: each["data"][key] for key in keys} for each in (trained, config)]
        return checks.differences(*data, section="config.data")

    if changes := changed("mean", "std"):
        raise checks.ConfigError(f"{workdir} was trained with another normalization: {'; '.join(changes)}")
    changes = changed("ignore", "ignore_values", "label_map")
    ignore = ("model.pretrained", "model.remat")
    changes += checks.differences(trained["model"], config["model"], ignore, "config.model")
    for change in changes:
        logger.warning("not as in the training of %s: %s", workdir, change)


def inherit_choices(config, workdir: epath.PathLike):
    """Returns a copy of `config` whose unset keys have the values that the run in `workdir`, if any, chose for them.

    Raises WorkdirError.
    """
    if not auto_config.unset_keys(config) or not exists(workdir):
        return config.copy_and_resolve_references()
    return auto_config.copy_choices(config, records.read_config(workdir))


def pick_network(networks, name: str | None = None) -> str:
    """Returns `name`, checked against the names of `networks`, or by default that of the deployed network.

    Raises ConfigError.
    """
    name = name or deployed(networks)
    checks.check_choice("network", name, networks)
    return name
