"""Builds from a configuration: network, method, optimizer and the training step, for the devices of a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dssn_jax import compiler, models, sharding
from dssn_jax.learner import optimizer, state, step
from dssn_jax.learner.optimizer import Optimizer
from dssn_jax.learner.state import TrainState
from dssn_jax.methods import method, strong_augment, views
from dssn_jax.methods.method import Method
from dssn_jax.methods.objective import Objective
from dssn_jax.methods.strong_augment import StrongAugment
from dssn_jax.methods.views import Views
from dssn_jax.models.batch_norm import Batches
from dssn_jax.models.network import Network
from input_pipeline.batch import Batch
from input_pipeline.pipeline import RunLength


@dataclasses.dataclass(frozen=True)
class Learner:
    """A network and how it is trained. Made by `build`, without data; everything that steps or predicts uses it."""

    config: Any
    mesh: jax.sharding.Mesh
    network: Network
    method: Method
    optimizer: Optimizer
    strong_augment: StrongAugment

    @property
    def train_step(self) -> step.TrainStep:
        """The step as a pure function of views, without augmentation or devices."""
        batches = Batches(devices=self.mesh.size, tiles=sharding.platform(self.mesh) == "tpu")
        return step.TrainStep(Objective(self.network, self.method, batches), self.optimizer)

    def init_state(self, weights: dict | None = None) -> TrainState:
        """Returns the state at step 0 on every device: random weights, except where `weights` has variables."""
        init = jax.jit(self._init, out_shardings=sharding.replicated(self.mesh))
        initial = init(state.run_keys(self.config.seed))
        return initial if weights is None else state.with_weights(initial, sharding.replicate(weights, self.mesh))

    def abstract_state(self) -> TrainState:
        """Returns the shapes, dtypes and shardings of the state, without computing it."""
        shapes = jax.eval_shape(self._init, state.run_keys(self.config.seed))
        replicated = sharding.replicated(self.mesh)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), shapes)

    def make_train_step(self) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
        """Returns the jitted step (state, batch) -> (state, metrics), whose state argument is donated."""
        take, micro_batches = self.train_step, self.config.train.accumulation

        def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
            drawn = batch, self._strong_views(batch, state.rng, state.step)
            if micro_batches == 1:
                new_state, metrics = take(state, self._to_views(drawn))
            else:
                drawn = sharding.split_micro_batches(drawn, micro_batches, self.mesh)
                new_state, metrics = take.accumulate(state, drawn, self._to_views)
            return new_state, metrics | {"lr": self.optimizer.schedule(state.step)}

        replicated, split = sharding.replicated(self.mesh), sharding.batch_sharded(self.mesh)
        shardings = {"in_shardings": (replicated, split), "out_shardings": replicated}
        return jax.jit(train_step, **shardings, donate_argnums=0, compiler_options=compiler.options(self.mesh))

    def views(self, batch: Batch, rng: jax.Array, step: jax.Array) -> Views:
        """Returns what the step number `step` of the run with key `rng` sees of a batch."""
        return self._to_views((batch, self._strong_views(batch, rng, step)))

    def normalize(self, images: jax.Array) -> jax.Array:
        """Maps uint8 RGB [..., 3] to what the network takes."""
        return views.normalize(images, self.config.data, self.network.image_dtype)

    def _strong_views(self, batch: Batch, rng: jax.Array, number: jax.Array) -> jax.Array | None:
        return strong_augment.strong_views(batch, self.strong_augment, step.stream_key(rng, number, step.VIEWS))

    def _to_views(self, drawn: tuple[Batch, jax.Array | None]) -> Views:
        return views.from_batch(*drawn, self.config.data, self.network.image_dtype)

    def _init(self, keys: tuple[jax.Array, jax.Array]) -> TrainState:
        init_key, rng = keys
        return self.train_step.init(init_variables(self.network, init_key), rng)


def init_variables(network: Network, key: jax.Array) -> dict:
    """Returns random variables; their shapes do not depend on the size of the image."""
    return network.init(key, jnp.zeros((1, network.input_size, network.input_size, 3), network.dtype))


def build(config, mesh: jax.sharding.Mesh | None = None, length: RunLength = RunLength(1, 1)) -> Learner:  # noqa: B008
    """Builds the learner of a validated configuration in which every value is set.

    Args:
      config: the whole configuration.
      mesh: devices; None: all.
      length: steps of the run and of an epoch, which the schedules follow; only training needs the real ones.

    Raises:
      ConfigError: an expression of `config.optimizer` matches no parameter.
    """
    network = models.build(config.model, len(config.data.classes))
    shapes = jax.eval_shape(lambda key: init_variables(network, key), jax.random.PRNGKey(0))
    optimizer.check(config.optimizer, shapes["params"])
    return Learner(
        config=config,
        mesh=sharding.make_mesh() if mesh is None else mesh,
        network=network,
        method=method.from_config(config, length.steps_per_epoch),
        optimizer=optimizer.from_config(config.optimizer, length.steps),
        strong_augment=strong_augment.from_config(config.views),
    )
