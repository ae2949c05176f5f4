"""Forms of the state dicts of DINOv2 and DINOv3: Meta's, which is the original, Hugging Face transformers' and timm's.

Our modules carry the original's names (`dssn_jax.weights.names`). A form of others is a table of names, with `*` for a
part of a name and `**` for the rest, and a pair of functions for what no renaming expresses: projections in one matrix
or in several, and what one side computes or leaves out. Facts of the forms: docs/weights.md.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dssn_jax.weights import efficientnet_lite

Tensors = Mapping[str, np.ndarray]
Table = tuple[tuple[str, str], ...]  # (their name, the original's); the first that fits applies.

ORIGINAL = "original"
DINOV3_NOTICE = (
    "weights of DINOv3: they, and what is converted or fine-tuned from them, stay under Meta's DINOv3 License"
)


class Form(NamedTuple):
    """A form other than the original, for one family of encoders. Names are those of an encoder file."""

    name: str
    family: str
    recognizes: Callable[[Tensors], bool]  # Whether a file is in this form.
    read: Callable[[Tensors], dict]  # To the original's names.
    write: Callable[[Tensors], dict]


def family(tensors: Tensors) -> str:
    """Returns "dinov2" or "dinov3" for an encoder under the original's names, or "" for any other."""
    if "storage_tokens" in tensors:
        return "dinov3"
    return "dinov2" if {"pos_embed", "cls_token", "blocks.0.ls1.gamma"} <= {*tensors} else ""


def names_of(family_name: str) -> tuple[str, ...]:
    """Returns the forms in which an encoder of a family can be written, the original first."""
    return (ORIGINAL, *dict.fromkeys(form.name for form in FORMS if form.family == family_name))


def to_original(tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns an encoder's tensors under the original's names, from any form; what is computed is dropped.

    Tensors that their form does not have keep their names. Raises ValueError for a tensor that DINOv3 does not have
    or has another value of.
    """
    if efficientnet_lite.recognizes(tensors):
        return efficientnet_lite.read(tensors)
    for form in FORMS:
        if form.recognizes(tensors):
            tensors = form.read(tensors)
            break
    return _without_computed(tensors) if family(tensors) == "dinov3" else dict(tensors)


def from_original(tensors: Tensors, form: str, head_size: int) -> dict[str, np.ndarray]:
    """Returns an encoder of DINOv2 or DINOv3 in a form of `names_of`, the inverse of `to_original`.

    Args:
      tensors: under the original's names, without what is computed.
      form: name of the form.
      head_size: channels of an attention head; only the original form of DINOv3 depends on it.
    """
    kind = family(tensors)
    if form == ORIGINAL:
        return _with_computed(tensors, head_size) if kind == "dinov3" else dict(tensors)
    return next(each for each in FORMS if (each.name, each.family) == (form, kind)).write(tensors)


# Tensors in Meta's DINOv3 files that are computed, not trained.


def periods(count: int) -> np.ndarray:
    """Returns the stored periods of DINOv3's rotary position embedding: 100 ** (j / count), rounded to bfloat16.

    Siméoni et al., arXiv 2508.10104. `count` is a quarter of the head size.
    """
    exact = np.float32(100) ** (np.arange(count, dtype=np.float32) / np.float32(count))
    return exact.astype(ml_dtypes.bfloat16).astype(np.float32)


def bias_mask(width: int) -> np.ndarray:
    """Returns the factors of the bias of queries, keys and values in DINOv3: keys have none."""
    return np.repeat(np.float32([1, 0, 1]), width)


def _with_computed(tensors: Tensors, head_size: int) -> dict[str, np.ndarray]:
    added = {"rope_embed.periods": periods(head_size // 4)}
    for name, value in tensors.items():
        if name.endswith("attn.qkv.bias"):
            added[f"{name}_mask"] = bias_mask(len(value) // 3)
    return {**tensors, **added}


def _without_computed(tensors: Tensors) -> dict[str, np.ndarray]:
    kept = {}
    for name, value in tensors.items():
        if name == "rope_embed.periods":
            if value.ndim != 1 or not np.allclose(value, periods(len(value)), rtol=0.01):
                raise ValueError(f"{name} is not that of DINOv3, whose periods are 100 ** (j / {value.size})")
        elif name.endswith("attn.qkv.bias_mask"):
            if value.ndim != 1 or len(value) % 3 or not np.array_equal(value, bias_mask(len(value) // 3)):
                raise ValueError(f"{name} is not that of DINOv3, which masks the bias of the keys alone")
        else:
            kept[name] = value
    return kept


# Steps of the forms.


def _renamed(tensors: Tensors, table: Table) -> dict[str, np.ndarray]:
    """Returns tensors under other names; those that fit no line of the table keep theirs."""
    patterns = [(re.compile(_pattern(source)), target) for source, target in table]

    def rename(name: str) -> str:
        matches = ((pattern.fullmatch(name), target) for pattern, target in patterns)
        match, target = next(((match, target) for match, target in matches if match), (None, ""))
        return name if match is None else _filled(target, match.groups())

    return {rename(name): value for name, value in tensors.items()}


def _filled(template: str, parts: Iterable[str]) -> str:
    """Returns a template with each of its `*` and `**` replaced by the next of `parts`."""
    remaining = iter(parts)
    return re.sub(r"\*+", lambda _: next(remaining), template)


def _pattern(template: str) -> str:
    escaped = re.escape(template).replace(r"\*\*", "(.+)")
    return escaped.replace(r"\*", r"([^.]+)")


def _reversed(table: Table) -> Table:
    return tuple((ours, theirs) for theirs, ours in table)


def _joined(tensors: Tensors, parts: Iterable[str], whole: str) -> dict[str, np.ndarray]:
    """Joins, wherever all are there, tensors such as `*.attn.q.*`, `*.attn.k.*`, ... along their first axis."""
    result, (first, *others) = dict(tensors), parts
    for name in tensors:
        if f".{first}." not in name:
            continue
        names = [name, *(name.replace(f".{first}.", f".{other}.") for other in others)]
        if all(each in result for each in names):
            result[name.replace(f".{first}.", f".{whole}.")] = np.concatenate([result.pop(each) for each in names])
    return result


def _split(tensors: Tensors, parts: Iterable[str], whole: str) -> dict[str, np.ndarray]:
    """Undoes `_joined` for tensors whose name ends with `whole`, such as `attn.qkv.bias` or `attn.qkv.*`."""
    result, pattern = {}, re.compile(rf"(blocks\.\d+\.){_pattern(whole)}")
    for name, value in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            result[name] = value
            continue
        suffix = name.rpartition(".")[2]
        for part, piece in zip(parts, np.split(value, 3), strict=True):
            result[f"{match[1]}{part}.{suffix}"] = piece
    return result


def _with_key_bias(tensors: Tensors) -> dict[str, np.ndarray]:
    """Adds zeros for the bias of the keys, which DINOv3 does not have, beside that of the queries."""
    result = dict(tensors)
    for name, value in tensors.items():
        if name.endswith(".attn.k.bias") and np.any(value):
            raise ValueError(f"{name} is not 0; DINOv3 has no bias of the keys")
        if name.endswith(".attn.q.bias"):
            result.setdefault(name.replace(".q.", ".k."), np.zeros_like(value))
    return result


def _without(tensors: Tensors, *patterns: str) -> dict[str, np.ndarray]:
    return {
        name: value for name, value in tensors.items() if not any(re.fullmatch(pattern, name) for pattern in patterns)
    }


_QKV = ("attn.q", "attn.k", "attn.v")
_KEY_BIAS = r"blocks\.\d+\.attn\.k\.bias"


# Hugging Face transformers. Names in files come first; models in memory differ in the later lines.


def _layers(prefix: str, *lines: tuple[str, str]) -> Table:
    """Returns a table of the parts of a block; whatever else a block has keeps its name in it, to be refused."""
    table = tuple((f"{prefix}.*.{theirs}", f"blocks.*.{ours}") for theirs, ours in lines)
    return (*table, (f"{prefix}.*.**", "blocks.*.**"))


_PARTS = (
    ("norm1.*", "norm1.*"), ("norm2.*", "norm2.*"),
    ("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"),
)  # fmt: skip
_DINOV2_LAYERS = _layers(
    "encoder.layer", *_PARTS,
    ("attention.attention.query.*", "attn.q.*"), ("attention.attention.key.*", "attn.k.*"),
    ("attention.attention.value.*", "attn.v.*"), ("attention.output.dense.*", "attn.proj.*"),
    ("attention.q_proj.*", "attn.q.*"), ("attention.k_proj.*", "attn.k.*"), ("attention.v_proj.*", "attn.v.*"),
    ("attention.o_proj.*", "attn.proj.*"),
    ("mlp.fc1.*", "mlp.fc1.*"), ("mlp.fc2.*", "mlp.fc2.*"),
    ("mlp.weights_in.*", "mlp.w12.*"), ("mlp.weights_out.*", "mlp.w3.*"),
    ("mlp.gate_proj.*", "mlp.gate.*"), ("mlp.up_proj.*", "mlp.up.*"), ("mlp.down_proj.*", "mlp.w3.*"),
)  # fmt: skip
_HUGGINGFACE_DINOV2 = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.*", "patch_embed.proj.*"),
    ("layernorm.*", "norm.*"),
    *_DINOV2_LAYERS,
)
_ATTENTION = (
    ("attention.q_proj.*", "attn.q.*"), ("attention.k_proj.*", "attn.k.*"), ("attention.v_proj.*", "attn.v.*"),
    ("attention.o_proj.*", "attn.proj.*"),
)  # fmt: skip
_MLP = (("mlp.up_proj.*", "mlp.fc1.*"), ("mlp.down_proj.*", "mlp.fc2.*"))
_GATED = (("mlp.gate_proj.*", "mlp.w1.*"), ("mlp.up_proj.*", "mlp.w2.*"), ("mlp.down_proj.*", "mlp.w3.*"))


def _huggingface_dinov3(prefix: str, gated: bool) -> Table:
    return (
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.mask_token", "mask_token"),
        ("embeddings.register_tokens", "storage_tokens"),
        ("embeddings.patch_embeddings.*", "patch_embed.proj.*"),
        *_layers(prefix, *_PARTS, *_ATTENTION, *(_GATED if gated else _MLP)),
    )


def _read_huggingface_dinov2(tensors: Tensors) -> dict[str, np.ndarray]:
    tensors = _renamed(_bare(tensors), _HUGGINGFACE_DINOV2)
    return _joined(_joined(tensors, _QKV, "attn.qkv"), ("mlp.gate", "mlp.up"), "mlp.w12")


def _write_huggingface_dinov2(tensors: Tensors) -> dict[str, np.ndarray]:
    return _renamed(_split(tensors, _QKV, "attn.qkv.*"), _reversed(_HUGGINGFACE_DINOV2))


def _read_huggingface_dinov3(tensors: Tensors) -> dict[str, np.ndarray]:
    tensors = _bare(tensors)
    prefix = "model.layer" if "model.layer.0.norm1.weight" in tensors else "layer"
    gated = f"{prefix}.0.mlp.gate_proj.weight" in tensors
    tensors = _with_key_bias(_renamed(tensors, _huggingface_dinov3(prefix, gated)))
    return _reshaped(_joined(tensors, _QKV, "attn.qkv"), "mask_token", 2)


def _write_huggingface_dinov3(tensors: Tensors) -> dict[str, np.ndarray]:
    tensors = _without(_split(tensors, _QKV, "attn.qkv.*"), _KEY_BIAS)
    gated = "blocks.0.mlp.w1.weight" in tensors
    return _renamed(_reshaped(tensors, "mask_token", 3), _reversed(_huggingface_dinov3("layer", gated)))


def _reshaped(tensors: Tensors, name: str, ndim: int) -> dict[str, np.ndarray]:
    """Returns tensors of which `name`, if there, has leading axes of length 1 added or removed to be of `ndim` axes."""
    value = tensors.get(name)
    if value is None or not 1 <= value.ndim <= 3 or value.shape[:-1] != (1,) * (value.ndim - 1):
        return dict(tensors)
    return {**tensors, name: value.reshape((1,) * (ndim - 1) + value.shape[-1:])}


_BASE = r"(?:\w+\.)?"  # Prefix of the encoder's names in a model with a head, such as `dinov2.`.


def _bare(tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns tensors without that prefix."""
    prefix = next(name for name in tensors if name.endswith("embeddings.cls_token"))
    prefix = prefix.removesuffix("embeddings.cls_token")
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _has(pattern: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(re.fullmatch(pattern, name) for name in tensors)


def _in_huggingface(patches: str) -> Callable[[Tensors], bool]:
    has = _has(rf"{_BASE}embeddings\.{patches}\.weight"), _has(rf"{_BASE}embeddings\.cls_token")
    return lambda tensors: all(each(tensors) for each in has)


# timm.

_TIMM_DINOV2 = (("reg_token", "register_tokens"),)
_PACKED = (("blocks.*.mlp.fc1.*", "blocks.*.mlp.w12.*"), ("blocks.*.mlp.fc2.*", "blocks.*.mlp.w3.*"))
_TIMM_DINOV3 = (
    ("reg_token", "storage_tokens"),
    ("blocks.*.gamma_1", "blocks.*.ls1.gamma"),
    ("blocks.*.gamma_2", "blocks.*.ls2.gamma"),
    ("blocks.*.attn.q_bias", "blocks.*.attn.q.bias"),
    ("blocks.*.attn.v_bias", "blocks.*.attn.v.bias"),
)
_TIMM_GATED = (
    ("blocks.*.mlp.fc1_g.*", "blocks.*.mlp.w1.*"),
    ("blocks.*.mlp.fc1_x.*", "blocks.*.mlp.w2.*"),
    ("blocks.*.mlp.fc2.*", "blocks.*.mlp.w3.*"),
)
_WIDTH_WITHOUT_BIAS = 4096  # Only the 7B of DINOv3 has no bias of queries and values.


def _is_packed(tensors: Tensors) -> bool:
    """Returns whether an MLP is a gated one whose first matrix holds both, the gate and what it gates."""
    first, second = (tensors.get(f"blocks.0.mlp.fc{number}.weight") for number in (1, 2))
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        return False
    return len(first) == 2 * second.shape[1]


def _read_timm_dinov2(tensors: Tensors) -> dict[str, np.ndarray]:
    """With registers, timm's position embedding has no part for the class token: that is in the token itself."""
    table = _TIMM_DINOV2 + (_PACKED if _is_packed(tensors) else ())
    positions = tensors.get("pos_embed")
    if "reg_token" in tensors and positions is not None and positions.ndim == 3:
        positions = np.concatenate([np.zeros_like(positions[:, :1]), positions], 1)
        tensors = {**tensors, "pos_embed": positions}
    return _renamed(tensors, table)


def _write_timm_dinov2(tensors: Tensors) -> dict[str, np.ndarray]:
    tensors = _without(tensors, "mask_token")
    if "register_tokens" in tensors:
        positions = tensors["pos_embed"]
        tensors |= {"cls_token": tensors["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    table = _TIMM_DINOV2 + (_PACKED if "blocks.0.mlp.w12.weight" in tensors else ())
    return _renamed(tensors, _reversed(table))


def _read_timm_dinov3(tensors: Tensors) -> dict[str, np.ndarray]:
    """Most of timm's models have no bias of queries, keys and values, where the files of Meta hold zeros."""
    table = _TIMM_DINOV3 + (_TIMM_GATED if "blocks.0.mlp.fc1_g.weight" in tensors else ())
    has_bias = any(name.endswith((".q_bias", ".v_bias")) for name in tensors)
    tensors = _joined(_with_key_bias(_renamed(tensors, table)), _QKV, "attn.qkv")
    zeros = {
        name.replace(".weight", ".bias"): np.zeros(len(value), value.dtype)
        for name, value in tensors.items()
        if name.endswith(".attn.qkv.weight") and value.shape[1:] != (_WIDTH_WITHOUT_BIAS,)
    }
    return tensors if has_bias else {**zeros, **tensors}


def _write_timm_dinov3(tensors: Tensors) -> dict[str, np.ndarray]:
    """Writes the bias of queries and values for timm's models `*_qkvb`, or none if all are zero, for its others."""
    table = _TIMM_DINOV3 + (_TIMM_GATED if "blocks.0.mlp.w1.weight" in tensors else ())
    tensors = _without(_split(tensors, _QKV, "attn.qkv.bias"), "mask_token", _KEY_BIAS)
    biases = [name for name in tensors if name.endswith((".attn.q.bias", ".attn.v.bias"))]
    if not any(np.any(tensors[name]) for name in biases):
        tensors = {name: value for name, value in tensors.items() if name not in biases}
    return _renamed(tensors, _reversed(table))


FORMS = (
    Form(
        "huggingface", "dinov2", _in_huggingface(r"patch_embeddings\.projection"),
        _read_huggingface_dinov2, _write_huggingface_dinov2,
    ),
    Form(
        "huggingface", "dinov3", _in_huggingface("patch_embeddings"),
        _read_huggingface_dinov3, _write_huggingface_dinov3,
    ),
    Form("timm", "dinov3", _has(r"blocks\.0\.gamma_1"), _read_timm_dinov3, _write_timm_dinov3),
    Form(
        "timm", "dinov2", lambda tensors: "reg_token" in tensors or _is_packed(tensors),
        _read_timm_dinov2, _write_timm_dinov2,
    ),
)  # fmt: skip
