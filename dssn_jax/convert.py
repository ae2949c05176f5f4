"""The names of the original's PyTorch state dicts, derived from ours.

Modules carry the original's names, so one rule maps every variable: `layer1_0` is `layer1.0`, a `kernel` or `scale` is
a `weight`, and batch statistics are `running_mean` and `running_var`.
"""

import re

import flax
import jax
import jax.numpy as jnp
import numpy as np

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


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
    for collection in ("params", "batch_stats"):
        for path, value in flax.traverse_util.flatten_dict(variables[collection]).items():
            value = np.asarray(value)
            state_dict[torch_name(path)] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
    return state_dict


def from_state_dict(state_dict: dict[str, np.ndarray], like: dict) -> dict:
    """Fills variables shaped `like` (arrays or `jax.ShapeDtypeStruct`s) from a state dict, in the dtypes of `like`.

    Raises KeyError for a name that is missing and ValueError for a shape that differs, naming them.
    """

    def fill(path: tuple[str, ...], leaf) -> jax.Array:
        name = torch_name(path)
        value = np.asarray(state_dict[name])
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        if value.shape != leaf.shape:
            raise ValueError(f"{name} has shape {value.shape}, the model needs {leaf.shape} (kh, kw, I, O)")
        return jnp.asarray(value, leaf.dtype)

    return {
        collection: flax.traverse_util.path_aware_map(fill, like[collection])
        for collection in ("params", "batch_stats")
    }
