"""What a configuration builds: data sources, network, method, optimiser, on the devices that there are."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

import input_pipeline
from dssn_jax import config as configuration
from dssn_jax import methods, models, optimizer, sharding, train_state


class Experiment(NamedTuple):
    """The parts of a run; made by `build`, alike for training and evaluation."""

    config: Any
    sources: input_pipeline.Sources
    mesh: jax.sharding.Mesh
    model: models.DeepLabV3Plus
    method: methods.Method
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule  # Step -> learning rate of the backbone.
    steps_per_epoch: int
    steps: int

    def initial_state(self) -> train_state.TrainState:
        """The state at step 0, on every device."""
        key = jax.random.PRNGKey(self.config.seed)
        return jax.jit(self._initialise, out_shardings=sharding.replicated(self.mesh))(key)

    def abstract_state(self) -> train_state.TrainState:
        """Shapes, dtypes and shardings of the state, without computing it."""
        where = sharding.replicated(self.mesh)
        shapes = jax.eval_shape(self._initialise, jax.random.PRNGKey(self.config.seed))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)

    def _initialise(self, key: jax.Array) -> train_state.TrainState:
        return train_state.initialise(self.model, self.optimizer, key, self.method.has_teacher)


def build(config, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Checks `config`, opens its data and builds its parts, for `devices` (default: all).

    Raises `dssn_jax.config.ConfigError` or `input_pipeline.DataError` for what cannot be run.
    """
    configuration.validate(config, len(devices or jax.devices()))
    sources = input_pipeline.open_sources(config)
    steps_per_epoch = input_pipeline.steps_per_epoch(sources, config)
    steps = config.train.steps or config.train.epochs * steps_per_epoch
    transformation, schedule = optimizer.from_config(config.optimizer, steps)
    return Experiment(
        config=config,
        sources=sources,
        mesh=sharding.make_mesh(devices),
        model=models.build(config.model, len(config.data.classes)),
        method=methods.from_config(config, steps_per_epoch),
        optimizer=transformation,
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
    )
