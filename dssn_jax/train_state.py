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


def initialise(
    model: DeepLabV3Plus, optimizer: optax.GradientTransformation, key: jax.Array, teacher: bool
) -> TrainState:
    """Returns the state at step 0; its random weights, and the randomness of the run, come from `key`."""
    init_key, rng = jax.random.split(key)
    image = jnp.zeros((1, 33, 33, 3), model.dtype)  # Parameters do not depend on the image size.
    return create(model.init(init_key, image), optimizer, rng, teacher)
