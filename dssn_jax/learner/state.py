"""The state of training, and the networks in it."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes; the content of a checkpoint.

    `student` and `teacher` hold variables by collection: "params" and, for networks that have them, others such as
    "batch_stats". The teacher has no copy of frozen parameters; `networks` completes it.
    """

    step: jax.Array  # int32 []: steps taken.
    student: dict
    teacher: dict | None  # None without EMA.
    opt_state: optax.OptState
    method_state: Any  # State of the method's selection; {} for most.
    rng: jax.Array  # uint32 [2]: the key of the run. The randomness of a step is folded from it and `step`.

    def networks(self) -> dict[str, dict]:
        """Returns the variables for `Network.apply`, by name: student and, with EMA, teacher."""
        if self.teacher is None:
            return {"student": self.student}
        return {"student": self.student, "teacher": complete(self.teacher, self.student)}


def deployed(names) -> str:
    """Returns which of the networks `names` is used for prediction: the teacher if there is one."""
    return "teacher" if "teacher" in names else "student"


def complete(teacher: dict, student: dict) -> dict:
    """Returns the teacher's variables with the frozen parameters of the student."""
    return {**teacher, "params": merge(student["params"], teacher["params"])}


def merge(params: dict, others: dict) -> dict:
    """Returns nested `params` with the leaves of `others`, which may lack some, in place of its own."""
    flatten, unflatten = flax.traverse_util.flatten_dict, flax.traverse_util.unflatten_dict
    return unflatten({**flatten(params), **flatten(others)})


def with_weights(state: TrainState, variables: dict) -> TrainState:
    """Gives the student, and the teacher as its copy, the given variables.

    `variables` may hold some modules only, such as {"params": {"encoder": ...}}; other modules stay as they are.
    """
    student = {name: {**tree, **variables.get(name, {})} for name, tree in state.student.items()}
    if state.teacher is None:
        return state.replace(student=student)
    return state.replace(student=student, teacher=copy_of(student, like=state.teacher))


def copy_of(student: dict, like: dict) -> dict:
    """Returns copies of the leaves of `student` that the tree `like` has."""
    kept = flax.traverse_util.flatten_dict(like)
    leaves = {path: leaf for path, leaf in flax.traverse_util.flatten_dict(student).items() if path in kept}
    return flax.traverse_util.unflatten_dict(jax.tree.map(jnp.copy, leaves))


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of the initial weights and of the run."""
    init_key, rng = jax.random.split(jax.random.PRNGKey(seed))
    return init_key, rng
