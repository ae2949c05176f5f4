"""Weights to start from: files of an encoder or of a full network, and work directories of runs.

Tensors get the names of a full network in PyTorch (`backbone.*`, `head.*`, ...) and are compared with the model by name
and shape before any variable is filled.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from configs import defaults
from dssn_jax import models
from dssn_jax.learner.learner import init_variables
from dssn_jax.weights import files, names
from dssn_jax.weights.files import StateDictError
from dssn_jax.workdir.restore import restore
from input_pipeline.errors import first_names


class Normalization(NamedTuple):
    """Normalization of the images that weights were trained on: RGB in [0, 1], minus `mean`, divided by `std`."""

    mean: tuple[float, ...] = defaults.IMAGENET_MEAN
    std: tuple[float, ...] = defaults.IMAGENET_STD

    def __str__(self) -> str:
        return f"mean {self.mean} and std {self.std}"


class Weights(NamedTuple):
    """Tensors of a full network, or of its encoder alone, under PyTorch's names and in PyTorch's layout."""

    path: epath.Path
    tensors: dict[str, np.ndarray]
    normalization: Normalization
    metadata: dict  # From the source: epoch, previous_best, step.
    config: ConfigDict | None = None  # Configuration of the run, if the source is a work directory.

    @property
    def is_full_network(self) -> bool:
        """Whether there are tensors outside the encoder."""
        return len(names.encoder_part(self.tensors)) < len(self.tensors)

    def __str__(self) -> str:
        """Returns source and metadata, such as "runs/best.pth (full network, epoch 42, previous_best 78.2)"."""
        kind = "full network" if self.is_full_network else "encoder"
        numbers = (f"{key} {value:g}" for key, value in self.metadata.items() if isinstance(value, int | float))
        return f"{self.path} ({', '.join([kind, *numbers])})"


class LoadedWeights(NamedTuple):
    """Weights as variables of a model."""

    variables: dict  # {"params", ...} of the full network, or of {"encoder"} alone.
    report: str  # For the log: source, and number of matched, unused and missing tensors.


def read(path: epath.PathLike, *, checkpoint: str | None = None, network: str = "student") -> Weights:
    """Reads weights from a file, or from a checkpoint of a work directory.

    Args:
      path: a file of an encoder or of a full network, or a work directory.
      checkpoint: of a work directory: best, latest, a step, or None (best, or latest if nothing was evaluated yet).
      network: of a work directory: student or teacher.

    Raises StateDictError, CheckpointError, WorkdirError or ConfigError for weights that cannot be read.
    """
    path = epath.Path(path).expanduser()
    if path.is_dir():
        return _read_run(path, checkpoint, network)
    tensors, metadata = files.read(path)
    return Weights(path, names.standardize(tensors), _normalization(metadata), metadata)


def load(config, like: dict) -> LoadedWeights:
    """Returns the weights of `config.model.pretrained` as variables shaped `like` (those of the network of `config`).

    Weights of an encoder alone fill the encoder's variables, other weights all of them. Raises StateDictError if a
    tensor is missing or has another shape.
    """
    return fill(read(config.model.pretrained), like, config)


def fill(weights: Weights, like: dict, config) -> LoadedWeights:
    """Returns `weights` as variables shaped `like`; see `load`."""
    if not weights.is_full_network:
        like = {collection: {"encoder": tree["encoder"]} for collection, tree in like.items() if "encoder" in tree}
    report = f"{weights}: {counts(check(weights, names.shapes(like)))}"
    if not weights.is_full_network:
        report += "; the rest of the network keeps its random weights"
    configured = Normalization(tuple(config.data.mean), tuple(config.data.std))
    if not np.allclose(weights.normalization, configured):
        report += f"; WARNING: they expect RGB in [0, 1] with {weights.normalization}, config.data has {configured}"
    return LoadedWeights(names.from_state_dict(weights.tensors, like), report)


def check(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> names.Comparison:
    """Compares weights with the names and shapes that a model needs.

    Raises StateDictError if they do not fit, or are not finite floating-point numbers.
    """
    comparison = names.compare(weights.tensors, expected)
    if comparison.fits:
        wrong = names.defects({name: weights.tensors[name] for name in comparison.matched})
        if wrong:
            raise StateDictError(f"{weights.path}: {first_names(wrong)}")
        return comparison
    problems = []
    if comparison.missing:
        problems.append(f"missing {first_names(comparison.missing, show=lambda name: f'{name} {expected[name]}')}")
    for name in comparison.wrong_shape[:3]:
        problems.append(f"{name} has shape {weights.tensors[name].shape}, expected {expected[name]}")
    if comparison.unexpected:
        problems.append(f"{first_names(comparison.unexpected)} not known to the model")
    raise StateDictError(
        f"{weights.path} does not fit the model: {'; '.join(problems)}{_hint(weights, comparison, expected)}"
    )


def counts(comparison: names.Comparison) -> str:
    """Returns how many tensors of a fitting file are used, and which are not."""
    unused = f" ({first_names(comparison.unused)})" if comparison.unused else ""
    return f"{len(comparison.matched)} tensors matched, {len(comparison.unused)} unused{unused}, 0 missing"


def identify(weights: Weights) -> dict | None:
    """Returns the keys of `config.model` that name the encoder of `weights`, such as {"encoder": ..., "stem": ...}.

    The encoder is the first registered one whose names and shapes fit; None if there is none.
    """
    tensors = names.encoder_part(weights.tensors)
    for encoder in models.ENCODERS:
        for variant in models.variants(encoder):
            keys = {"encoder": encoder, **variant}
            comparison = names.compare(tensors, _encoder_shapes(keys))
            if comparison.fits:
                return keys
            if 2 * len(comparison.matched) < len(tensors):  # Variants of an encoder share most tensors.
                break
    return None


def num_classes(weights: Weights) -> int:
    """Returns the number of classes of a full network's weights; 2 if there is no classifier."""
    return len(weights.tensors.get("classifier.bias", (0, 0)))


def abstract_variables(model, num_classes: int) -> dict:
    """Returns the shapes and dtypes of the variables of the network of a `config.model`."""
    network = models.build(model, num_classes)
    return jax.eval_shape(lambda key: init_variables(network, key), jax.random.PRNGKey(0))


def _encoder_shapes(keys: dict) -> dict[str, tuple[int, ...]]:
    """Returns the state-dict names and shapes of the encoder that keys of `config.model` name."""
    model = defaults.get_config().model
    model.update({"decoder": "linear", **keys})  # It fits every encoder.
    return names.encoder_part(names.shapes(abstract_variables(model, num_classes=2)))


def _normalization(metadata: dict) -> Normalization:
    """Returns the normalization in the metadata of a file, as `dssn_jax.weights.convert` writes it, or ImageNet's."""
    try:
        stored = Normalization(*(tuple(map(float, metadata[key].split())) for key in Normalization._fields))
    except (KeyError, ValueError, AttributeError):
        return Normalization()
    return stored if len(stored.mean) == len(stored.std) == 3 else Normalization()


def _read_run(workdir: epath.Path, checkpoint: str | None, network: str) -> Weights:
    restored = restore(workdir, checkpoint)
    if network not in restored.networks:
        raise StateDictError(f"{workdir}: the run has no {network}; it has {', '.join(restored.networks)}")
    config = restored.learner.config
    normalization = Normalization(tuple(config.data.mean), tuple(config.data.std))
    tensors = names.to_state_dict(restored.networks[network])
    return Weights(workdir, tensors, normalization, {"step": restored.step}, config)


def _hint(weights: Weights, comparison: names.Comparison, expected: Mapping[str, tuple[int, ...]]) -> str:
    """Returns what would help: another model, or the encoder alone."""
    culprits = {*comparison.missing, *comparison.wrong_shape, *comparison.unexpected}
    if culprits == {"classifier.weight", "classifier.bias"} == {*comparison.wrong_shape}:
        return (
            f"; it has {num_classes(weights)} classes, the config {expected['classifier.bias'][0]}. To take its "
            f"encoder alone: --mode=convert --part=encoder --from={weights.path} --to=FILE.safetensors"
        )
    keys = identify(weights) if names.encoder_part(dict.fromkeys(culprits)) else None
    if keys is None:
        return ""
    return f"; its encoder fits {' '.join(f'model.{key}={value}' for key, value in keys.items())}"
