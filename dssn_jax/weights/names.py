"""The names of the original's PyTorch state dicts, derived from ours.

Modules carry the original's names, so one rule maps every variable: `layer1_0` is `layer1.0`, a `kernel` or `scale` is
a `weight`, and batch statistics are `running_mean` and `running_var`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

_COLLECTIONS = ("params", "batch_stats")
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"  # PyTorch's batch norm counts its batches; with a fixed momentum nothing reads it.


def torch_name(path: tuple[str, ...]) -> str:
    """Maps a variable's path, as ("backbone", "layer1_0", "conv1", "kernel"), to its state-dict name.

    >>> torch_name(("backbone", "layer1_0", "downsample_1", "var"))
    'backbone.layer1.0.downsample.1.running_var'
    """
    modules = [re.sub(r"_(\d+)$", r".\1", module) for module in path[:-1]]
    return ".".join([*modules, _LEAVES[path[-1]]])


def to_state_dict(variables: dict) -> dict[str, np.ndarray]:
    """Turns {"params", "batch_stats"} into a PyTorch-style state dict; convolutions become (O, I, kh, kw)."""
    state_dict = {}
    for name, leaf in _named_leaves(variables):
        value = np.asarray(leaf)
        state_dict[name] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
    return state_dict


def from_state_dict(state_dict: Mapping[str, np.ndarray], like: dict) -> dict:
    """Fills variables shaped `like` (arrays or `jax.ShapeDtypeStruct`s) from a state dict, in the dtypes of `like`.

    Raises KeyError for a name that is missing and ValueError for a shape that differs, naming them.
    """

    def fill(path: tuple[str, ...], leaf) -> jax.Array:
        name = torch_name(path)
        value = np.asarray(state_dict[name])
        if value.shape != _torch_shape(leaf):
            raise ValueError(f"{name} has shape {value.shape}, the model needs {_torch_shape(leaf)}")
        # A copy: the array must not share its memory with a mapped file.
        return jnp.array(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value, leaf.dtype)

    return {collection: flax.traverse_util.path_aware_map(fill, like[collection]) for collection in _COLLECTIONS}


def shapes(like: dict) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the state dict of variables shaped `like` (arrays or `jax.ShapeDtypeStruct`s)."""
    return {name: _torch_shape(leaf) for name, leaf in _named_leaves(like)}


def with_counters(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the `num_batches_tracked` (int64, 0) that `load_state_dict(strict=True)` asks for."""
    means = [name for name in state_dict if name.endswith(".running_mean")]
    counters = {name.removesuffix("running_mean") + _COUNTER: np.zeros((), np.int64) for name in means}
    return {**state_dict, **counters}


def standardize(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gives the tensors of a file the names of the whole network.

    Drops the prefix `module.` (of `DistributedDataParallel`) and the batch counters; tensors of a backbone alone, as
    `conv1.weight`, get the prefix `backbone.`.
    """
    tensors = {name.removeprefix("module."): value for name, value in tensors.items() if not name.endswith(_COUNTER)}
    if not any(name.startswith("backbone.") for name in tensors):
        tensors = {f"backbone.{name}": value for name, value in tensors.items()}
    return tensors


class Comparison(NamedTuple):
    """How the tensors of a file fit a model: names, in order."""

    matched: list[str]
    missing: list[str]  # Of the model.
    misshapen: list[str]  # Of another shape than the model's.
    foreign: list[str]  # Inside a module of the model, but unknown to it: the file is of another network.
    unused: list[str]  # Of modules that the model does not have, as `fc.*`.

    @property
    def fits(self) -> bool:
        return not (self.missing or self.misshapen or self.foreign)


def compare(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> Comparison:
    """Compares tensors with the names and shapes (as of `shapes`) that a model needs."""
    present = [name for name in expected if name in tensors]
    others = [name for name in tensors if name not in expected]
    modules = {_module(name) for name in expected}
    return Comparison(
        matched=[name for name in present if tensors[name].shape == expected[name]],
        missing=[name for name in expected if name not in tensors],
        misshapen=[name for name in present if tensors[name].shape != expected[name]],
        foreign=[name for name in others if _module(name) in modules],
        unused=[name for name in others if _module(name) not in modules],
    )


def _module(name: str) -> str:
    """`backbone.layer3` of `backbone.layer3.6.conv1.weight`, `fuse` of `fuse.0.weight`."""
    return ".".join(name.split(".")[: 2 if name.startswith("backbone.") else 1])


def _named_leaves(variables: dict) -> Iterator[tuple[str, object]]:
    for collection in _COLLECTIONS:
        for path, leaf in flax.traverse_util.flatten_dict(variables[collection]).items():
            yield torch_name(path), leaf


def _torch_shape(leaf) -> tuple[int, ...]:
    return tuple(leaf.shape[i] for i in (3, 2, 0, 1)) if len(leaf.shape) == 4 else tuple(leaf.shape)
