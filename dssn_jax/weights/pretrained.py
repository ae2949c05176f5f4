"""Weights to start from: files of a backbone or of a whole network, and work directories of runs.

All are brought under the names of the original's whole network (`backbone.*`, `head.*`, ...), and compared with the
model by name and shape before anything is filled.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from configs import defaults
from dssn_jax import models, sharding
from dssn_jax import validate as configuration
from dssn_jax.learner import learner as experiment
from dssn_jax.models import resnet
from dssn_jax.weights import files as state_dict_files
from dssn_jax.weights import names as state_dicts
from dssn_jax.weights.files import StateDictError
from dssn_jax.workdir import checkpoint

_SHOWN = 3  # Names in a message.
_IMAGE = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)  # Variables do not depend on its size.


class Images(NamedTuple):
    """What images the weights were trained on: RGB in [0, 1], minus `mean`, divided by `std`."""

    mean: tuple[float, ...] = defaults.IMAGENET_MEAN
    std: tuple[float, ...] = defaults.IMAGENET_STD


class Weights(NamedTuple):
    """Tensors of a network, or of its backbone alone, under the original's names and in PyTorch's layout."""

    path: epath.Path
    tensors: dict[str, np.ndarray]
    images: Images
    notes: dict  # What else the source tells: epoch, previous_best, step.
    config: ConfigDict | None = None  # Of the run, if they are of one.

    @property
    def whole(self) -> bool:
        """Whether they are more than a backbone."""
        return not all(name.startswith("backbone.") for name in self.tensors)


class Fitted(NamedTuple):
    """Weights as variables of a model."""

    variables: dict  # {"params", "batch_stats"}, of the whole network or of {"backbone"} alone.
    report: str  # Says how many tensors were matched, unused and missing.


def read(path: epath.PathLike, network: str = "student", which: str | None = None) -> Weights:
    """Reads weights from a file, or from a checkpoint of a work directory.

    Of a work directory, `network` is student or teacher and `which` the checkpoint: best, latest or a step (None: best
    if anything was evaluated, else latest). Files have one network.

    Raises StateDictError, CheckpointError or ConfigError for what cannot be read.
    """
    path = epath.Path(path).expanduser()
    if path.is_dir():
        return _of_run(path, network, which)
    tensors, notes = state_dict_files.read(path)
    return Weights(path, state_dicts.standardize(tensors), _images(notes), notes)


def load(config, like: dict) -> Fitted:
    """Returns the weights of `config.model.pretrained` as variables shaped `like` (those of the model of `config`).

    Raises StateDictError if a tensor that is needed is missing or has another shape; for weights of a backbone alone
    those of the backbone are needed, else all.
    """
    return fit(read(config.model.pretrained), like, config)


def fit(weights: Weights, like: dict, config) -> Fitted:
    """Returns `weights` as variables shaped `like`; see `load`."""
    if not weights.whole:
        like = {collection: {"backbone": like[collection]["backbone"]} for collection in ("params", "batch_stats")}
    comparison = check(weights, state_dicts.shapes(like))
    report = f"{describe(weights)}: {counts(comparison)}"
    if not weights.whole:
        report += "; the rest of the network keeps its random weights"
    if not _same(weights.images, config.data):
        configured = Images(tuple(config.data.mean), tuple(config.data.std))
        report += (
            f"; WARNING: they expect RGB in [0, 1] with {_show(weights.images)}, config.data has {_show(configured)}"
        )
    return Fitted(state_dicts.from_state_dict(weights.tensors, like), report)


def check(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> state_dicts.Comparison:
    """Compares weights with the names and shapes that are needed; raises StateDictError where they do not fit."""
    comparison = state_dicts.compare(weights.tensors, expected)
    if comparison.fits:
        return comparison
    problems = []
    if comparison.missing:
        problems.append(f"missing {_listed(comparison.missing, lambda name: f'{name} {expected[name]}')}")
    for name in comparison.misshapen[:_SHOWN]:
        problems.append(f"{name} has shape {weights.tensors[name].shape}, expected {expected[name]}")
    if comparison.foreign:
        problems.append(f"{_listed(comparison.foreign)} not known to the model")
    raise StateDictError(
        f"{weights.path} does not fit the model: {'; '.join(problems)}{_hint(weights, comparison, expected)}"
    )


def describe(weights: Weights) -> str:
    """Names the weights and their source: "runs/best.pth (whole network, epoch 42, previous_best 78.2)"."""
    kind = "whole network" if weights.whole else "backbone"
    notes = (f"{key} {value:g}" for key, value in weights.notes.items() if isinstance(value, int | float))
    return f"{weights.path} ({', '.join([kind, *notes])})"


def identify(weights: Weights) -> ConfigDict | None:
    """Returns the `config.model` of the network that the tensors fit, told from names and shapes; None if none fits."""
    tensors = {name: value for name, value in weights.tensors.items() if name.startswith("backbone.")}
    for name, stem, shortcut in itertools.product(models.BACKBONES, resnet.STEMS, resnet.SHORTCUTS):
        if not _seems(name, stem, shortcut, tensors):
            continue
        found = defaults.get_config().model
        found.update({"backbone": name, "stem": stem, "shortcut": shortcut})
        if "fuse.0.weight" in weights.tensors:
            found.decoder_channels = weights.tensors["fuse.0.weight"].shape[0]
        if state_dicts.compare(tensors, state_dicts.shapes(_abstract_backbone(found))).fits:
            return found
    return None


def _seems(name: str, stem: str, shortcut: str, tensors: dict) -> bool:
    """Whether tensors may be of this backbone: two names tell most variants apart, before any network is built."""
    if not models.has_stems(name):
        return (stem, shortcut) == (resnet.STEMS[0], resnet.SHORTCUTS[0])
    seven = "backbone.conv1.weight" in tensors
    average = "backbone.layer2.0.downsample.2.weight" in tensors
    return (stem == "7x7") == seven and (shortcut == "average") == average


def num_classes(weights: Weights) -> int:
    """The number of classes of a whole network's weights; 2 where there is no classifier."""
    return len(weights.tensors.get("classifier.bias", (0, 0)))


def abstract_variables(model, num_classes: int) -> dict:
    """Shapes and dtypes of the variables of the network of a `config.model`."""
    return jax.eval_shape(models.build(model, num_classes).init, jax.random.PRNGKey(0), _IMAGE)


def _abstract_backbone(model) -> dict:
    init = functools.partial(models.build(model, num_classes=2).backbone.init, train=False)
    variables = jax.eval_shape(init, jax.random.PRNGKey(0), _IMAGE)
    return {collection: {"backbone": tree} for collection, tree in variables.items()}


def _images(notes: dict) -> Images:
    """What a file tells of its images, as `dssn_jax.convert` writes it; ImageNet's where it does not."""
    try:
        found = Images(*(tuple(map(float, notes[key].split())) for key in Images._fields))
    except (KeyError, ValueError, AttributeError):
        return Images()
    return found if len(found.mean) == len(found.std) == 3 else Images()


def _of_run(workdir: epath.Path, network: str, which: str | None) -> Weights:
    saved = checkpoint.Checkpointer(workdir, read_only=True)
    step = saved.resolve("latest")
    if which is None:
        which = "latest" if saved.meta(step)["scores"].get("best_step") is None else "best"
    step = saved.resolve(which)
    config = ConfigDict(saved.meta(step)["config"])
    configuration.check_x64(config.model)
    state, _ = saved.restore(step, experiment.abstract_state(config, sharding.make_mesh()), config)
    saved.close()
    networks = state.networks()
    if network not in networks:
        raise StateDictError(f"{workdir}: the run has no {network}; it has {', '.join(networks)}")
    images = Images(tuple(config.data.mean), tuple(config.data.std))
    return Weights(workdir, state_dicts.to_state_dict(networks[network]), images, {"step": step}, config)


def counts(comparison: state_dicts.Comparison) -> str:
    """Says how many tensors of the file are used, and which are not."""
    unused = f" ({_listed(comparison.unused)})" if comparison.unused else ""
    return f"{len(comparison.matched)} tensors matched, {len(comparison.unused)} unused{unused}, 0 missing"


def _hint(weights: Weights, comparison: state_dicts.Comparison, expected: Mapping[str, tuple[int, ...]]) -> str:
    """Says what would help: another model, or taking the backbone alone."""
    culprits = {*comparison.missing, *comparison.misshapen, *comparison.foreign}
    if culprits == {"classifier.weight", "classifier.bias"} == {*comparison.misshapen}:
        return (
            f"; it has {num_classes(weights)} classes, the config {expected['classifier.bias'][0]}. Its backbone alone "
            f"is taken by --mode=convert --part=backbone --from={weights.path} --to=FILE.safetensors"
        )
    fitting = identify(weights) if any(name.startswith("backbone.") for name in culprits) else None
    if fitting is None:
        return ""
    keys = ("backbone", "stem", "shortcut") if models.has_stems(fitting.backbone) else ("backbone",)
    return f"; its backbone fits {' '.join(f'model.{key}={fitting[key]}' for key in keys)}"


def _listed(names: list[str], show=str) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(show(name) for name in names[:_SHOWN]) + more


def _show(images: Images) -> str:
    return f"mean {images.mean} and std {images.std}"


def _same(images: Images, data) -> bool:
    return np.allclose(images.mean, tuple(data.mean)) and np.allclose(images.std, tuple(data.std))
