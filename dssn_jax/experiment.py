"""What a configuration builds: data sources, network, method, optimiser, on the devices that there are."""

import functools
from typing import Any, NamedTuple

import jax
import optax

import input_pipeline
from dssn_jax import augment, methods, models, optimizer, sharding, train_state, train_step
from dssn_jax import config as configuration


class Experiment(NamedTuple):
    """The parts of a run; made by `build`, alike for training and evaluation."""

    config: Any
    sources: input_pipeline.Sources
    mesh: jax.sharding.Mesh
    model: models.DeepLabV3Plus
    method: methods.Method
    optimizer: optax.GradientTransformation
    recipe: augment.Recipe | None  # Of strong views made on the device; None: the host makes them.
    schedule: optax.Schedule  # Step -> learning rate of the backbone.
    steps_per_epoch: int
    steps: int

    def initial_state(self) -> train_state.TrainState:
        """The state at step 0, on every device."""
        return jax.jit(self._initialise, out_shardings=sharding.replicated(self.mesh))()

    def abstract_state(self) -> train_state.TrainState:
        """Shapes, dtypes and shardings of the state, without computing it."""
        where = sharding.replicated(self.mesh)
        shapes = jax.eval_shape(self._initialise)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)

    def compile_step(self):
        """The training step, see `train_step.compile_step`."""
        return train_step.compile_step(
            self.model, self.method, self.optimizer, self.schedule, self.config.data, self.recipe, self.mesh
        )

    @property
    def _initialise(self):
        return functools.partial(
            train_state.initialise, self.model, self.optimizer, self.config.seed, self.method.has_teacher
        )


def build(config) -> Experiment:
    """Checks `config`, opens its data and builds its parts.

    Raises `dssn_jax.config.ConfigError` or `input_pipeline.DataError` for what cannot be run.
    """
    configuration.validate(config, jax.device_count())
    sources = input_pipeline.open_sources(config)
    steps_per_epoch = input_pipeline.steps_per_epoch(sources, config)
    steps = config.train.steps or config.train.epochs * steps_per_epoch
    transformation, schedule = optimizer.from_config(config.optimizer, steps)
    return Experiment(
        config=config,
        sources=sources,
        mesh=sharding.make_mesh(),
        model=models.build(config.model, len(config.data.classes)),
        method=methods.from_config(config, steps_per_epoch),
        optimizer=transformation,
        recipe=augment.from_config(config.views),
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
    )
