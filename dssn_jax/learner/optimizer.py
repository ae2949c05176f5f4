"""Optimizers with learning rates, weight decay and frozen parameters chosen by regular expressions over paths.

The path of a parameter joins the names of its modules: "encoder/layer1_0/conv1/kernel".
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax
import jax
import optax

from configs.checks import ConfigError, check_choice

Mults = Sequence[tuple[str, float]]


class Optimizer(NamedTuple):
    """A gradient transformation with its schedule, and the parameters that it leaves alone."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule  # Step -> learning rate of parameters without a factor.
    freeze: str = ""  # Regular expression of frozen parameters; "": none.

    def partition(self, params: dict) -> tuple[dict, dict]:
        """Splits nested parameters into (trainable, frozen)."""
        flat = flax.traverse_util.flatten_dict(params)
        frozen = {path for path in flat if self.freeze and re.match(self.freeze, "/".join(path))}
        split = [{path: leaf for path, leaf in flat.items() if (path in frozen) == which} for which in (False, True)]
        return tuple(map(flax.traverse_util.unflatten_dict, split))


def poly(lr: float, steps: int, power: float = 0.9) -> optax.Schedule:
    """Returns the schedule lr * (1 - step / steps) ** power (docs/method.md, Eq. 9)."""
    return optax.polynomial_schedule(lr, 0.0, power, steps)


def sgd(optimizer) -> tuple[optax.GradientTransformation, ...]:
    """`torch.optim.SGD`: weight decay joins the gradient before momentum (docs/method.md, Eq. 10)."""
    return add_decayed_weights(optimizer), optax.trace(optimizer.momentum)


def adamw(optimizer) -> tuple[optax.GradientTransformation, ...]:
    """`torch.optim.AdamW`: decoupled weight decay, scaled by the learning rate. Loshchilov and Hutter, ICLR 2019."""
    return optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps), add_decayed_weights(optimizer)


# Name in config.optimizer.name -> transformations of the gradient before the learning rate, from config.optimizer.
OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


def from_config(optimizer, steps: int) -> Optimizer:
    """Returns the optimizer of `config.optimizer` for a run of `steps`."""
    return build(optimizer, poly(optimizer.lr, steps, optimizer.power))


def build(optimizer, schedule: optax.Schedule) -> Optimizer:
    """Returns the optimizer of `config.optimizer` with the given learning rate schedule."""
    transforms = [*OPTIMIZERS[optimizer.name](optimizer)]
    if optimizer.lr_mults:
        factor = _factor(optimizer.lr_mults)
        transforms.append(optax.stateless(lambda updates, _: _map(lambda path, u: factor(path) * u, updates)))
    transforms.append(optax.scale_by_learning_rate(schedule))
    return Optimizer(optax.chain(*transforms), schedule, optimizer.freeze)


def add_decayed_weights(optimizer) -> optax.GradientTransformation:
    """Adds weight decay, times the factor of `wd_mults`, to the update."""
    if not optimizer.wd_mults:
        return optax.add_decayed_weights(optimizer.weight_decay)
    factor = _factor(optimizer.wd_mults)

    def add(updates, params):
        return _map(lambda path, u, p: u + optimizer.weight_decay * factor(path) * p, updates, params)

    return optax.stateless(add)


def check(optimizer, params: dict) -> None:
    """Raises ConfigError for an unknown optimizer, or a regular expression that matches no parameter of `params`."""
    check_choice("config.optimizer.name", optimizer.name, OPTIMIZERS)
    paths = ["/".join(path) for path in flax.traverse_util.flatten_dict(params)]
    patterns = [("freeze", optimizer.freeze)] if optimizer.freeze else []
    patterns += [(key, pattern) for key in ("lr_mults", "wd_mults") for pattern, _ in optimizer[key]]
    for key, pattern in patterns:
        try:
            matches = [path for path in paths if re.match(pattern, path)]
        except re.error as error:
            raise ConfigError(f"config.optimizer.{key}: {pattern!r} is no regular expression: {error}") from None
        if not matches:
            raise ConfigError(
                f"config.optimizer.{key}: {pattern!r} matches no parameter; paths are such as {paths[0]!r}"
            )
        if key == "freeze" and len(matches) == len(paths):
            raise ConfigError(f"config.optimizer.freeze: {pattern!r} matches every parameter: nothing is trained")


def _factor(mults: Mults) -> Callable[[tuple[str, ...]], float]:
    """Returns the function from a path to the factor of the first expression that matches it; 1 if none does."""

    def factor(path: tuple[str, ...]) -> float:
        return next((value for pattern, value in mults if re.match(pattern, "/".join(path))), 1.0)

    return factor


def _map(function: Callable, *trees):
    """Maps (path, *leaves) over trees of one structure."""

    def with_path(path, *leaves) -> jax.Array:
        return function(tuple(key.key for key in path), *leaves)

    return jax.tree_util.tree_map_with_path(with_path, *trees)
