"""One training step: gradients of the objective, update of the student, EMA of the teacher."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from dssn_jax.learner.optimizer import Optimizer
from dssn_jax.learner.state import TrainState, complete, copy_of, merge
from dssn_jax.methods.objective import Keys, Objective, loss_terms, total_loss
from dssn_jax.methods.views import Views

# Streams of device randomness. The key of a step is folded from the key of the run and the step, and never consumed
# itself: each stream folds its number into it.
VIEWS, DROPOUT, ROPE = 0, 1, 2


def stream_key(rng: jax.Array, step: jax.Array, stream: int) -> jax.Array:
    """Returns the key of a stream of randomness in a step."""
    return jax.random.fold_in(jax.random.fold_in(rng, step), stream)


class Carry(NamedTuple):
    """State that forward passes change: variables other than parameters, and the state of the method."""

    student: dict  # Collections but "params".
    teacher: dict | None
    method_state: Any


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """Takes steps with an objective and an optimizer."""

    objective: Objective
    optimizer: Optimizer

    def init(self, variables: dict, rng: jax.Array) -> TrainState:
        """Returns the state at step 0; an EMA teacher starts as a copy of the student's `variables`."""
        method, network = self.objective.method, self.objective.network
        trainable, _ = self.optimizer.partition(variables["params"])
        teacher = copy_of(variables, like={**variables, "params": trainable}) if method.has_ema else None
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            student=variables,
            teacher=teacher,
            opt_state=self.optimizer.transform.init(trainable),
            method_state=method.selection.init(network.num_classes),
            rng=rng,
        )

    def __call__(self, state: TrainState, views: Views) -> tuple[TrainState, dict[str, jax.Array]]:
        """Takes a step on `views`; returns the new state and metrics.

        These are scalars (loss terms, mask ratios, grad_norm), and pseudo_labels [K], the share of each class.
        """
        grads, metrics, carry = self.loss_and_grads(state, _carry(state), views, self._keys(state, 0))
        return self._update(state, grads, metrics, carry)

    def accumulate(
        self, state: TrainState, micro_batches, to_views: Callable[[Any], Views]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Takes a step with the mean gradient of micro-batches, a tree of arrays [count, rows, ...].

        Each micro-batch is turned into views when its turn comes. Batch norm uses its statistics, and the running
        statistics move once per micro-batch; every mean over pixels and the choice of hard pixels (OHEM) are those of
        the micro-batch.
        """
        count = len(jax.tree.leaves(micro_batches)[0])

        def body(loop_carry, numbered):
            total, carry = loop_carry
            number, batch = numbered
            grads, metrics, carry = self.loss_and_grads(state, carry, to_views(batch), self._keys(state, number))
            return (jax.tree.map(jnp.add, total, grads), carry), metrics

        trainable, _ = self.optimizer.partition(state.student["params"])
        start = jax.tree.map(jnp.zeros_like, trainable), _carry(state)
        (total, carry), metrics = jax.lax.scan(body, start, (jnp.arange(count), micro_batches))
        grads = jax.tree.map(lambda grad: grad / count, total)
        return self._update(state, grads, {name: values.mean(0) for name, values in metrics.items()}, carry)

    def loss_and_grads(
        self, state: TrainState, carry: Carry, views: Views, keys: Keys
    ) -> tuple[dict, dict[str, jax.Array], Carry]:
        """Returns the gradients of the loss by trainable parameter, metrics and the new carry."""
        method, params = self.objective.method, state.student["params"]
        student = {"params": params, **carry.student}
        teacher = None
        if state.teacher is not None:
            teacher = complete({"params": state.teacher["params"], **carry.teacher}, state.student)
        trainable, frozen = self.optimizer.partition(params)
        features = self.objective.encode(student, views) if self._shares_encoder(student, trainable) else None
        teacher_logits, teacher = self.objective.teacher_logits(student, teacher, views, state.step, features)

        def loss_fn(trainable):
            variables = {**student, "params": merge(frozen, trainable)}
            logits, variables = self.objective.student_logits(variables, views, keys, features)
            terms, ratios, method_state = loss_terms(logits, teacher_logits, views, method, carry.method_state)
            loss = total_loss(terms, method, self._warming_up(state))
            return loss, (terms | ratios, Carry(_collections(variables), _collections(teacher), method_state))

        (loss, (metrics, carry)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
        return grads, {"loss": loss, **metrics}, carry

    def _update(self, state: TrainState, grads: dict, metrics: dict, carry: Carry) -> tuple[TrainState, dict]:
        """Moves the student by the gradients and the teacher toward the student."""
        grads = jax.tree.map(_as_stored, grads)
        trainable, frozen = self.optimizer.partition(state.student["params"])
        updates, opt_state = self.optimizer.transform.update(grads, state.opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        teacher = state.teacher
        if teacher is not None:
            rate = self.objective.method.ema.rate(state.step)
            old = {"params": teacher["params"], **carry.teacher}
            teacher = update_ema(old, {"params": trainable, **carry.student}, rate)
        state = state.replace(
            step=state.step + 1,
            student={"params": merge(frozen, trainable), **carry.student},
            teacher=teacher,
            opt_state=opt_state,
            method_state=carry.method_state,
        )
        return state, {**metrics, "grad_norm": optax.tree.norm(grads)}

    def _warming_up(self, state: TrainState) -> jax.Array:
        ema = self.objective.method.ema
        return jnp.array(False) if ema is None else state.step < ema.warmup_steps

    def _shares_encoder(self, student: dict, trainable: dict) -> bool:
        """Returns whether the encoder gives student and teacher the same features: it is frozen, has no running
        statistics and draws nothing in training.
        """
        states = [tree for name, tree in student.items() if name not in ("params", "unused")]
        fixed = "encoder" not in trainable and not any("encoder" in tree for tree in states)
        return fixed and not self.objective.network.draws

    @staticmethod
    def _keys(state: TrainState, micro_batch) -> Keys:
        keys = (stream_key(state.rng, state.step, stream) for stream in (DROPOUT, ROPE))
        return Keys(*(jax.random.fold_in(key, micro_batch) for key in keys))


def update_ema(teacher: dict, student: dict, rate: jax.Array) -> dict:
    """Returns rate * teacher + (1 - rate) * student for every variable, in its dtype (docs/method.md, Eq. 8)."""

    moved = optax.incremental_update(student, teacher, 1 - rate)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, teacher)


def _as_stored(gradient: jax.Array) -> jax.Array:
    """Returns the gradient of a kernel, on a GPU in the layout of the kernel, rows first.

    Left to itself, XLA's compiler for GPUs updates a kernel in the layout of its convolution's gradient. It cannot do
    that in place, and copies the new parameters, momenta and averages afterwards.
    """
    if gradient.ndim < 2:
        return gradient
    rows_first = Layout(tuple(range(gradient.ndim)))
    return jax.lax.platform_dependent(
        gradient, cuda=lambda x: with_layout_constraint(x, rows_first), default=lambda x: x
    )


def _carry(state: TrainState) -> Carry:
    return Carry(_collections(state.student), _collections(state.teacher), state.method_state)


def _collections(variables: dict | None) -> dict | None:
    """Returns the variables without parameters."""
    if variables is None:
        return None
    return {name: tree for name, tree in variables.items() if name != "params"}
