"""Names and layouts of PyTorch state dicts, derived from the paths of our variables.

Modules carry PyTorch's names, so a few rules map every variable. `encoder/` becomes the prefix `backbone.` and
`decoder/` none, as in the original's checkpoints; a module `layer1_0` is `layer1.0`; `RULES` map the rest.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

ENCODER_PREFIX = "backbone."
_PREFIXES = {"encoder": ENCODER_PREFIX, "decoder": ""}
UNUSED = "unused"  # The collection of weights that files hold and networks do not use, such as `mask_token`.
_COUNTER = "num_batches_tracked"  # PyTorch's batch norm counts its batches; with a fixed momentum nothing reads it.


class Rule(NamedTuple):
    """Maps the end of a variable's path, such as "attn/kernel", to PyTorch's name and layout."""

    pattern: str  # Regular expression for the last parts of a path, joined by "/".
    replacement: str  # PyTorch's name for them, a template for `re.sub`.
    axes: Mapping[int, tuple[int, ...]] = {}  # Number of axes -> their order in PyTorch; default: ours.


# The first rule that matches applies; without one, a variable keeps its name and layout, as `pos_embed` does. An
# encoder or decoder with exceptions adds them at the top, each with a pattern that matches no other network.
# (H, W, I, O) -> (O, I, H, W) is right for `nn.Conv`, and for `nn.ConvTranspose` with `transpose_kernel=True`.
RULES = [
    Rule("kernel", "weight", {2: (1, 0), 4: (3, 2, 0, 1)}),
    Rule("scale|embedding", "weight"),
    Rule("mean", "running_mean"),
    Rule("var", "running_var"),
]


def torch_name(path: tuple[str, ...]) -> str:
    """Returns the state-dict name of the variable at `path`.

    >>> torch_name(("encoder", "layer1_0", "downsample_1", "var"))
    'backbone.layer1.0.downsample.1.running_var'
    """
    return _convert(path, 0)[0]


def to_state_dict(variables: dict) -> dict[str, np.ndarray]:
    """Returns variables {"params", ...} as a state dict in PyTorch's names and layouts."""
    state_dict = {}
    for path, leaf in _leaves(variables):
        name, axes = _convert(path, leaf.ndim)
        state_dict[name] = np.asarray(leaf).transpose(axes)
    return state_dict


def from_state_dict(state_dict: Mapping[str, np.ndarray], like: dict) -> dict:
    """Fills variables shaped `like` (arrays or `jax.ShapeDtypeStruct`s) from a state dict, in the dtypes of `like`.

    Raises KeyError for a missing name and ValueError for a different shape; both name the tensor.
    """

    def fill(path: tuple[str, ...], leaf) -> jax.Array:
        name, axes = _convert(path[1:], leaf.ndim)
        value, shape = np.asarray(state_dict[name]), _permuted(leaf.shape, axes)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, the model needs {shape}")
        # A copy: the array must not share its memory with a mapped file.
        return jnp.array(value.transpose(np.argsort(axes)), leaf.dtype)

    return flax.traverse_util.path_aware_map(fill, like)


def shapes(like: dict) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the state dict of variables shaped `like` (arrays or `jax.ShapeDtypeStruct`s)."""
    named = ((leaf, *_convert(path, leaf.ndim)) for path, leaf in _leaves(like))
    return {name: _permuted(leaf.shape, axes) for leaf, name, axes in named}


def with_unused(state_dict: Mapping[str, np.ndarray], like: dict) -> dict[str, np.ndarray]:
    """Adds zeros for weights of the collection UNUSED of `like` that a state dict lacks: not every file holds them."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes({UNUSED: like.get(UNUSED, {})}).items()}
    return {**zeros, **state_dict}


def with_counters(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the `num_batches_tracked` (int64, 0) that `load_state_dict(strict=True)` expects."""
    means = [name for name in state_dict if name.endswith(".running_mean")]
    counters = {name.removesuffix("running_mean") + _COUNTER: np.zeros((), np.int64) for name in means}
    return {**state_dict, **counters}


def encoder_part(entries: Mapping) -> dict:
    """Returns the entries of a state dict, or of `shapes`, that belong to the encoder; names are kept."""
    return {name: value for name, value in entries.items() if name.startswith(ENCODER_PREFIX)}


def encoder_variables(variables: dict) -> dict:
    """Returns the variables {"params", ...} of a network that belong to the encoder, with their paths."""
    return {collection: {"encoder": tree["encoder"]} for collection, tree in variables.items() if "encoder" in tree}


def standardize(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of a file under the names of a full network.

    Drops the prefix `module.` (of `DistributedDataParallel`) and the batch counters. Tensors of an encoder alone, such
    as `conv1.weight`, get the prefix `backbone.`.
    """
    tensors = {name.removeprefix("module."): value for name, value in tensors.items() if not name.endswith(_COUNTER)}
    if not encoder_part(tensors):
        tensors = {ENCODER_PREFIX + name: value for name, value in tensors.items()}
    return tensors


def defect(value: np.ndarray, is_variance: bool = False) -> str:
    """Returns why an array cannot be weights, such as "has dtype int8; expected floating-point numbers", or ""."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"has dtype {value.dtype}; expected floating-point numbers"
    least, most = (float(value.min()), float(value.max())) if value.size else (0.0, 0.0)
    if not max(-least, most) <= float(np.finfo(np.float32).max):  # Not a number is neither.
        return "holds a number that is not finite"
    return f"holds {least:g}; expected variances of at least 0" if is_variance and least < 0 else ""


def defects(state_dict: Mapping[str, np.ndarray]) -> list[str]:
    """Returns NAME and `defect` of each tensor that cannot be weights."""
    reasons = {name: defect(value, name.endswith(".running_var")) for name, value in state_dict.items()}
    return [f"{name} {reason}" for name, reason in reasons.items() if reason]


class Comparison(NamedTuple):
    """Result of comparing the tensors of a file with a model: names, in order."""

    matched: list[str]
    missing: list[str]  # In the model only.
    wrong_shape: list[str]  # In both, with different shapes.
    unexpected: list[str]  # In a module that in the model has no such variable: the file holds another network.
    unused: list[str]  # In modules that the model does not have, such as `fc.*`.

    @property
    def fits(self) -> bool:
        """Whether the file fills every variable of the model; unused tensors do not matter."""
        return not (self.missing or self.wrong_shape or self.unexpected)


def compare(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> Comparison:
    """Compares tensors with the names and shapes (see `shapes`) that a model needs."""
    shared = [name for name in expected if name in tensors]
    others = [name for name in tensors if name not in expected]
    modules = {_module(name) for name in expected}
    return Comparison(
        matched=[name for name in shared if tensors[name].shape == expected[name]],
        missing=[name for name in expected if name not in tensors],
        wrong_shape=[name for name in shared if tensors[name].shape != expected[name]],
        unexpected=[name for name in others if _module(name) in modules],
        unused=[name for name in others if _module(name) not in modules],
    )


def _module(name: str) -> str:
    """Returns `backbone.layer3` for `backbone.layer3.6.conv1.weight`, `fuse` for `fuse.0.weight`.

    Variables of the encoder itself, such as `backbone.cls_token`, are in its module `backbone`.
    """
    first, *others = name.split(".")
    return f"{first}.{others[0]}" if name.startswith(ENCODER_PREFIX) and len(others) > 1 else first


def _leaves(variables: dict) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yields (path, leaf) for each variable of each collection; paths do not name the collection."""
    for collection in variables.values():
        yield from flax.traverse_util.flatten_dict(collection).items()


def _convert(path: tuple[str, ...], ndim: int) -> tuple[str, tuple[int, ...]]:
    """Returns the state-dict name of the variable at `path`, and the order of its `ndim` axes in PyTorch."""
    prefix, path = (_PREFIXES[path[0]], path[1:]) if path[0] in _PREFIXES else ("", path)
    name, axes = "/".join(path), tuple(range(ndim))
    for rule in RULES:
        name, matches = re.subn(rf"(?<![^/])(?:{rule.pattern})$", rule.replacement, name)
        if matches:
            axes = rule.axes.get(ndim, axes)
            break
    return prefix + re.sub(r"_(\d+)/", r".\1.", name).replace("/", "."), axes


def _permuted(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in axes)
