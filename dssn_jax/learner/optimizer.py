"""SGD with two learning-rate groups and the poly schedule: method.md, "Optimizer"."""

import jax
import optax


def poly(lr: float, steps: int, power: float = 0.9) -> optax.Schedule:
    """lr * (1 - step / steps) ** power, the learning rate of the backbone."""
    return optax.polynomial_schedule(lr, 0.0, power, steps)


def sgd(
    schedule: optax.Schedule, lr_multi: float, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD as `torch.optim.SGD`: decay on every parameter, then momentum, then the learning rate of the group.

    The backbone has the rate of `schedule`, everything else `lr_multi` times that.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum),
        optax.masked(optax.scale(lr_multi), _outside_backbone),
        optax.scale_by_learning_rate(schedule),
    )


def from_config(optimizer, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer of `config.optimizer` for a run of `steps`, and its schedule."""
    schedule = poly(optimizer.lr, steps, optimizer.power)
    return sgd(schedule, optimizer.lr_multi, optimizer.momentum, optimizer.weight_decay), schedule


def _outside_backbone(params: dict) -> dict:
    return {name: jax.tree.map(lambda _, outside=name != "backbone": outside, part) for name, part in params.items()}
