"""What a configuration builds: data sources, network, method, optimizer, on the devices that there are."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from dssn_jax import auto_config as automatic
from dssn_jax import models, sharding
from dssn_jax import validate as configuration
from dssn_jax.learner import optimizer
from dssn_jax.learner import state as train_state
from dssn_jax.learner import step as train_step
from dssn_jax.methods import method as methods
from dssn_jax.methods import strong_augment as augment
from input_pipeline.pipeline import steps_per_epoch
from input_pipeline.sources.open import Sources, open_sources


class Experiment(NamedTuple):
    """The parts of a run; made by `build`, alike for training and evaluation."""

    config: Any
    sources: Sources
    mesh: jax.sharding.Mesh
    model: models.DeepLabV3Plus
    method: methods.Method
    optimizer: optax.GradientTransformation
    recipe: augment.Recipe | None  # Of strong views made on the device; None: the host makes them.
    schedule: optax.Schedule  # Step -> learning rate of the backbone.
    steps_per_epoch: int
    steps: int
    chosen: tuple[str, ...] = ()  # Why the values are as they are that `config` was given without.

    def initial_state(self, pretrained: dict | None = None) -> train_state.TrainState:
        """The state at step 0, on every device: random weights, but where `pretrained` variables are given."""
        everywhere = sharding.replicated(self.mesh)
        initialize = jax.jit(_initializer(self.config, self.model, self.optimizer), out_shardings=everywhere)
        state = initialize(train_state.keys(self.config.seed))
        if pretrained is None:
            return state
        return train_state.with_weights(state, sharding.replicate(pretrained, self.mesh))

    def abstract_state(self) -> train_state.TrainState:
        """Shapes, dtypes and shardings of the state, without computing it."""
        return abstract_state(self.config, self.mesh)

    def compile_step(self):
        """The training step, see `train_step.compile_step`."""
        return train_step.compile_step(
            self.model,
            self.method,
            self.optimizer,
            self.schedule,
            self.config.data,
            self.recipe,
            self.mesh,
            self.config.train.accumulation,
        )


def abstract_state(config, mesh: jax.sharding.Mesh) -> train_state.TrainState:
    """Shapes, dtypes and shardings of the state of a run of `config`, whose data need not be there."""
    model = models.build(config.model, len(config.data.classes))
    transformation, _ = optimizer.from_config(config.optimizer, steps=1)  # Its state does not depend on the steps.
    shapes = jax.eval_shape(_initializer(config, model, transformation), train_state.keys(config.seed))
    where = sharding.replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)


def _initializer(config, model: models.DeepLabV3Plus, transformation: optax.GradientTransformation):
    """Returns the function that makes the state at step 0 from `train_state.keys`."""
    teacher = config.method.teacher == "teacher"
    return functools.partial(train_state.initialize, model, transformation, teacher)


def build(config, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Checks `config`, opens its data and builds its parts, for `devices` (default: all).

    The `config` of the result has a value for every key that was left to be chosen, see `dssn_jax.automatic`.

    Raises `dssn_jax.config.ConfigError` or `DataError` for what cannot be run.
    """
    devices = list(devices or jax.devices())
    configuration.validate(config, len(devices))
    sources = open_sources(config)
    config, chosen = automatic.choose(config, sources, devices)
    configuration.validate(config, len(devices))
    steps_per_epoch = steps_per_epoch(sources, config)
    steps = config.train.steps or config.train.epochs * steps_per_epoch
    transformation, schedule = optimizer.from_config(config.optimizer, steps)
    return Experiment(
        config=config,
        sources=sources,
        mesh=sharding.make_mesh(devices),
        model=models.build(config.model, len(config.data.classes)),
        method=methods.from_config(config, steps_per_epoch),
        optimizer=transformation,
        recipe=augment.from_config(config.views),
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        chosen=tuple(chosen),
    )
