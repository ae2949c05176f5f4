"""The state of training, and how it starts."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from dssn_jax.models import DeepLabV3Plus


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes; what a checkpoint holds."""

    step: jax.Array  # int32 []: steps taken.
    params: Any
    batch_stats: Any
    teacher_params: Any  # None when the method has no teacher.
    teacher_batch_stats: Any
    opt_state: optax.OptState
    rng: jax.Array  # uint32 [2]: the key of the run; a step's randomness is folded from it and `step`.

    @property
    def student(self) -> dict:
        """Variables for `model.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def teacher(self) -> dict | None:
        """Variables of the EMA network for `model.apply`, or None."""
        if self.teacher_params is None:
            return None
        return {"params": self.teacher_params, "batch_stats": self.teacher_batch_stats}

    def networks(self) -> dict[str, dict]:
        """The variables of the networks that there are: student, and teacher if the method has one."""
        networks = {"student": self.student, "teacher": self.teacher}
        return {name: variables for name, variables in networks.items() if variables is not None}


def create(variables: dict, optimizer: optax.GradientTransformation, rng: jax.Array, teacher: bool) -> TrainState:
    """Returns the state at step 0; the teacher starts as a copy of the student `variables`."""
    params, batch_stats = variables["params"], variables["batch_stats"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        teacher_params=jax.tree.map(jnp.copy, params) if teacher else None,
        teacher_batch_stats=jax.tree.map(jnp.copy, batch_stats) if teacher else None,
        opt_state=optimizer.init(params),
        rng=rng,
    )


def with_weights(state: TrainState, variables: dict) -> TrainState:
    """Gives the student, and the teacher as its copy, the weights and statistics of `variables`.

    These hold {"params", "batch_stats"} of some of the network's parts, such as {"backbone"}; other parts stay.
    """
    params, batch_stats = variables["params"], variables["batch_stats"]
    state = state.replace(params={**state.params, **params}, batch_stats={**state.batch_stats, **batch_stats})
    if state.teacher is None:
        return state
    return state.replace(
        teacher_params={**state.teacher_params, **jax.tree.map(jnp.copy, params)},
        teacher_batch_stats={**state.teacher_batch_stats, **jax.tree.map(jnp.copy, batch_stats)},
    )


def keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of the initial weights and of the run."""
    init_key, rng = jax.random.split(jax.random.PRNGKey(seed))
    return init_key, rng


def initialize(
    model: DeepLabV3Plus,
    optimizer: optax.GradientTransformation,
    teacher: bool,
    keys: tuple[jax.Array, jax.Array],
) -> TrainState:
    """Returns the state at step 0 with random weights of the first of `keys`; the second is that of the run."""
    init_key, rng = keys
    image = jnp.zeros((1, 33, 33, 3), model.dtype)  # Parameters do not depend on the image size.
    return create(model.init(init_key, image), optimizer, rng, teacher)
