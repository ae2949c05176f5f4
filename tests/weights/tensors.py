"""Made-up weights of small networks, under PyTorch's names."""

import functools

import numpy as np

from dssn_jax import models
from dssn_jax.models import resnet
from dssn_jax.weights import names, pretrained

BOTTLENECK = "resnet14"  # A small ResNet with the blocks of ResNet-50, for tests alone; see `register_bottleneck`.
BOTTLENECK_STAGES = (1, 1, 1, 1)


def register_bottleneck(monkeypatch) -> None:
    """Registers the encoder BOTTLENECK, here and in the twin in PyTorch."""
    from tests.reference import torch_twin

    build = functools.partial(resnet.from_config, stage_sizes=BOTTLENECK_STAGES)
    monkeypatch.setitem(models.ENCODERS, BOTTLENECK, models.Encoder(build, resnet.VARIANTS))
    monkeypatch.setitem(torch_twin.RESNET_STAGES, BOTTLENECK, BOTTLENECK_STAGES)


def made_up(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns random float32 tensors of these names and shapes, scaled so that features stay of size 1."""
    rng = np.random.default_rng(0)

    def tensor(name, shape):
        if name.endswith("running_var"):
            return np.exp(0.1 * rng.normal(size=shape))
        if len(shape) == 4:
            return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        return (0.5 if name.endswith("weight") else 0.0) + 0.1 * rng.normal(size=shape)

    return {name: np.asarray(tensor(name, shape), np.float32) for name, shape in shapes.items()}


def made_up_like(twin) -> dict[str, np.ndarray]:
    """Returns made-up tensors for a module of PyTorch, without the batch counters."""
    return made_up({name: tuple(value.shape) for name, value in twin.state_dict().items() if value.ndim})


def network_tensors(config) -> dict[str, np.ndarray]:
    """Returns made-up tensors of the network of a configuration."""
    return made_up(names.shapes(pretrained.abstract_variables(config.model, len(config.data.classes))))


def encoder_tensors(config) -> dict[str, np.ndarray]:
    """Returns made-up tensors of its encoder and, as encoder files have it, of a classifier that the network lacks."""
    tensors = names.encoder_part(network_tensors(config))
    own = {name.removeprefix("backbone."): value for name, value in tensors.items()}
    return {**own, "fc.weight": np.zeros((9, 128), np.float32), "fc.bias": np.zeros(9, np.float32)}
