"""Weights to start from: files of an encoder or of a full network, and work directories of runs.

Tensors get the names of a full network in PyTorch (`backbone.*`, `head.*`, ...) and are compared with the model by name
and shape before any variable is filled.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from configs import defaults, encoders
from dssn_jax import models
from dssn_jax.learner.learner import init_variables
from dssn_jax.weights import files, forms, names
from dssn_jax.weights.files import StateDictError
from dssn_jax.workdir.checkpoint import Checkpointer
from dssn_jax.workdir.logs import logger
from dssn_jax.workdir.restore import restore
from input_pipeline.errors import UserError, first_names

# Decoder -> its last layer, in a state dict.
_CLASSIFIERS = {"deeplabv3plus": "classifier", "dpt": "head.scratch.output_conv.2", "linear": "conv_seg"}


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
    """Reads the weights of one network; see `read_networks`. Raises StateDictError if the source does not have it."""
    return pick(read_networks(path, checkpoint=checkpoint), path, network)


def pick(networks: dict[str, Weights], path: epath.PathLike, network: str) -> Weights:
    """Returns one of the networks read from `path`; raises StateDictError if it is not among them."""
    if network not in networks:
        kind = "file" if networks["student"].config is None else "run"
        raise StateDictError(f"{path}: the {kind} has no {network}; it has {', '.join(networks)}")
    return networks[network]


def read_networks(path: epath.PathLike, *, checkpoint: str | None = None) -> dict[str, Weights]:
    """Reads the networks in a file, or in a checkpoint of a work directory: student and perhaps teacher.

    Args:
      path: a file of an encoder or of a full network, or of two as UniMatch V2 writes it, or a work directory.
      checkpoint: of a work directory: best, latest, a step, or None (best, or latest if nothing was evaluated yet).

    Raises StateDictError, CheckpointError, WorkdirError or ConfigError for weights that cannot be read.
    """
    path = epath.Path(path).expanduser()
    networks = _read_run(path, checkpoint) if path.is_dir() else _read_file(path)
    if forms.family(encoder_tensors(networks["student"])) == "dinov3":
        logger.info("%s: %s", path, forms.DINOV3_NOTICE)
    return networks


def load(config, like: dict) -> LoadedWeights:
    """Returns the weights of `config.model.pretrained` as variables shaped `like` (those of the network of `config`).

    Weights of an encoder alone fill the encoder's variables, other weights all of them. Raises StateDictError if a
    tensor is missing or has another shape.
    """
    path = config.model.pretrained
    try:
        weights = read(path)
    except UserError as error:
        named = str(error) if path in str(error) else f"config.model.pretrained={path!r}: {error}"
        raise type(error)(named) from None
    return fill(weights, like, config)


def fill(weights: Weights, like: dict, config) -> LoadedWeights:
    """Returns `weights` as variables shaped `like`; see `load`."""
    if not weights.is_full_network:
        like = names.encoder_variables(like)
    weights = weights._replace(tensors=names.with_unused(weights.tensors, like))
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
            if not _has_patches_of(keys, tensors):
                break
            like = names.encoder_variables(abstract_variables(_model(keys), num_classes=2))
            comparison = names.compare(names.with_unused(tensors, like), names.shapes(like))
            if comparison.fits:
                return keys
            if 2 * len(comparison.matched) < len(tensors):  # Variants of an encoder share most tensors.
                break
    return None


def decoder_of(weights: Weights) -> str | None:
    """Returns the `config.model.decoder` of a full network's weights; None if it is not known."""
    return next((name for name, layer in _CLASSIFIERS.items() if f"{layer}.bias" in weights.tensors), None)


def num_classes(weights: Weights) -> int:
    """Returns the number of classes of a full network's weights; 2 if there is no classifier."""
    decoder = decoder_of(weights)
    return 2 if decoder is None else len(weights.tensors[f"{_CLASSIFIERS[decoder]}.bias"])


def abstract_variables(model, num_classes: int) -> dict:
    """Returns the shapes and dtypes of the variables of the network of a `config.model`."""
    network = models.build(model, num_classes)
    return jax.eval_shape(lambda key: init_variables(network, key), jax.random.PRNGKey(0))


def encoder_tensors(weights: Weights) -> dict[str, np.ndarray]:
    """Returns the tensors of the encoder of `weights` under the names of an encoder file."""
    part = names.encoder_part(weights.tensors)
    return {name.removeprefix(names.ENCODER_PREFIX): value for name, value in part.items()}


def _model(keys: dict):
    """Returns a `config.model` with the encoder that `keys` name, and a decoder that fits every encoder."""
    model = defaults.get_config().model
    model.update({"decoder": "linear", **keys})
    return model


def _has_patches_of(keys: dict, tensors: Mapping[str, np.ndarray]) -> bool:
    """Returns whether tensors may be of the encoder that `keys` name, by the shape of the patch embedding alone.

    It spares the tracing of the largest vision transformers, which takes seconds.
    """
    network = models.build(_model(keys), 2)
    patch, width = (getattr(network.encoder, name, None) for name in ("patch", "width"))
    kernel = tensors.get(f"{names.ENCODER_PREFIX}patch_embed.proj.weight")
    if kernel is None or patch is None:
        return kernel is None and patch is None
    return kernel.shape == (width, 3, patch, patch)


def _normalization(metadata: dict, tensors: Mapping[str, np.ndarray]) -> Normalization:
    """Returns the normalization in the metadata of a file, as `convert` writes it, or that of its encoder."""
    is_lite = f"{names.ENCODER_PREFIX}conv_stem.weight" in tensors
    usual = Normalization(*encoders.normalization("efficientnet_lite" if is_lite else ""))
    try:
        stored = Normalization(*(tuple(map(float, metadata[key].split())) for key in Normalization._fields))
    except (KeyError, ValueError, AttributeError):
        return usual
    return stored if len(stored.mean) == len(stored.std) == 3 else usual


def _read_file(path: epath.Path) -> dict[str, Weights]:
    networks, metadata = files.read_networks(path)
    named = {network: _standardized(path, tensors) for network, tensors in networks.items()}
    return {
        network: Weights(path, tensors, _normalization(metadata, tensors), metadata)
        for network, tensors in named.items()
    }


def _standardized(path: epath.Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, in whichever form, under the names of a full network in the original form."""
    tensors = names.standardize(tensors)
    prefix = names.ENCODER_PREFIX
    encoder = {name.removeprefix(prefix): value for name, value in names.encoder_part(tensors).items()}
    try:
        encoder = forms.to_original(encoder)
    except ValueError as error:
        raise StateDictError(f"{path}: {error}") from None
    others = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    return {**{prefix + name: value for name, value in encoder.items()}, **others}


def _read_run(workdir: epath.Path, checkpoint: str | None) -> dict[str, Weights]:
    restored = restore(workdir, checkpoint)
    config = restored.learner.config
    normalization = Normalization(tuple(config.data.mean), tuple(config.data.std))
    metadata = {"step": restored.step}
    if restored.step == 0:  # Perhaps converted and not trained: the numbers of the source are still true.
        with contextlib.closing(Checkpointer(workdir, read_only=True)) as saved:
            converted = saved.meta(0).get("converted", {})
        metadata |= {name: converted[name] for name in files.NUMBERS if name in converted}
    return {
        name: Weights(workdir, names.to_state_dict(variables), normalization, metadata, config)
        for name, variables in restored.networks.items()
    }


def _hint(weights: Weights, comparison: names.Comparison, expected: Mapping[str, tuple[int, ...]]) -> str:
    """Returns what would help: another model, or the encoder alone."""
    culprits = {*comparison.missing, *comparison.wrong_shape, *comparison.unexpected}
    for layer in _CLASSIFIERS.values():
        if culprits == {f"{layer}.weight", f"{layer}.bias"} == {*comparison.wrong_shape}:
            return (
                f"; it has {num_classes(weights)} classes, the config {expected[f'{layer}.bias'][0]}. To take its "
                f"encoder alone: --mode=convert --part=encoder --from={weights.path} --to=FILE.safetensors"
            )
    if position := _position_hint(weights, comparison, expected):
        return position
    fitting = (identify(weights) or {}) if names.encoder_part(dict.fromkeys(culprits)) else {}
    decoder = decoder_of(weights)
    if decoder and f"{_CLASSIFIERS[decoder]}.bias" not in expected and weights.is_full_network:
        fitting = {**fitting, "decoder": decoder}
    if not fitting:
        return ""
    part = "decoder" if fitting.keys() == {"decoder"} else "encoder"
    return f"; its {part} fits {' '.join(f'model.{key}={value}' for key, value in fitting.items())}"


def _position_hint(weights: Weights, comparison: names.Comparison, expected: Mapping[str, tuple[int, ...]]) -> str:
    """Returns what would help if nothing but the grid of the position embedding differs; "" otherwise."""
    name = f"{names.ENCODER_PREFIX}pos_embed"
    culprits = {*comparison.missing, *comparison.wrong_shape, *comparison.unexpected}
    if not culprits == {*comparison.wrong_shape} == {name} or weights.tensors[name].ndim != 3:
        return ""
    sides = [math.isqrt(max(shape[1] - 1, 0)) for shape in (weights.tensors[name].shape, expected[name])]
    pixels = sides[1] * expected[f"{names.ENCODER_PREFIX}patch_embed.proj.weight"][-1]
    return (
        f"; it is of {sides[0]}x{sides[0]} patches, expected {sides[1]}x{sides[1]}: take the weights as published, for "
        f"images of {pixels} pixels"
    )
