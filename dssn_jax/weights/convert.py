"""Weights of PyTorch in and out: `--mode=convert`.

From a file (.pth, .safetensors) or a work directory, to a file, or to a work directory that evaluation and training
take.
"""

import json
import os
import pathlib
import re
import shutil
import time

from etils import epath

from configs.checks import ConfigError
from dssn_jax import validate as configuration
from dssn_jax.evaluation import scores
from dssn_jax.learner import optimizer
from dssn_jax.learner import state as train_state
from dssn_jax.weights import files as state_dict_files
from dssn_jax.weights import pretrained
from dssn_jax.weights.files import StateDictError
from dssn_jax.weights.names import from_state_dict, shapes, to_state_dict, torch_name, with_counters
from dssn_jax.weights.pretrained import Weights
from dssn_jax.workdir import checkpoint, recorder
from dssn_jax.workdir.recorder import logger

# The names themselves are mapped in `dssn_jax.state_dicts`.
__all__ = ["convert", "from_state_dict", "to_state_dict", "torch_name"]


def convert(
    source: str,
    target: str,
    config=None,
    teacher: str | None = None,
    network: str = "student",
    which: str = "best",
    part: str = "network",
) -> None:
    """Converts weights between files and work directories; writes the whole `target` or nothing.

    Args:
      source: a file of a backbone or of a whole network, or a work directory.
      target: a new file (.pth, .pt, .safetensors) or the new work directory (no suffix).
      config: says the network, and is needed for a work directory. For files the network is told from the tensors.
      teacher: for a work directory: a file of the teacher's network. Without it the teacher is a copy of the student.
      network: student or teacher, of a source that is a work directory.
      which: best, latest or a step, of a source that is a work directory.
      part: network, or backbone: its tensors alone, under the names of a backbone's file.

    Raises StateDictError, CheckpointError or ConfigError for what cannot be converted.
    """
    started = time.monotonic()
    recorder.log_to(None)
    destination = pathlib.Path(target).expanduser().absolute()
    to_file = destination.suffix in state_dict_files.SUFFIXES
    _check_target(destination, to_file)
    if to_file and teacher:
        raise ConfigError("--teacher is for converting to a work directory; a file holds one network")
    if not to_file and part != "network":
        raise ConfigError("a work directory holds a whole network; --part=backbone is for converting to a file")
    if config is not None:
        configuration.validate(config, device_count=1)
    if network != "student" and not epath.Path(source).expanduser().is_dir():
        raise ConfigError(f"--network={network} is for work directories; {source} holds one network")
    try:
        if to_file:
            _to_file(pretrained.read(source, network, which), destination, config, part)
        else:
            _to_workdir(source, network, which, teacher, destination, config)
    except OSError as error:
        raise StateDictError(f"{target}: cannot be written: {error}") from None
    logger.info("wrote %s in %.1f s", target, time.monotonic() - started)


def _check_target(target: pathlib.Path, is_file: bool) -> None:
    if not is_file and re.fullmatch(r"\.[A-Za-z]\w*", target.suffix):
        raise StateDictError(
            f"{target}: expected {', '.join(state_dict_files.SUFFIXES)} or, for a work directory, no suffix"
        )
    if target.exists() and (is_file or not target.is_dir() or any(target.iterdir())):
        raise StateDictError(f"{target}: exists already; nothing was written")
    if is_file:
        state_dict_files.check_writable(target)


def _to_file(weights: Weights, target: pathlib.Path, config, part: str) -> None:
    expected = shapes(pretrained.abstract_variables(*_network_of(weights, config)))
    if part == "backbone" or not weights.whole:
        expected = {name: shape for name, shape in expected.items() if name.startswith("backbone.")}
    tensors = weights.tensors
    if part == "backbone":
        tensors = {name: value for name, value in tensors.items() if name.startswith("backbone.")}
    comparison = pretrained.check(weights._replace(tensors=tensors), expected)
    logger.info("%s: %s", pretrained.describe(weights), pretrained.counts(comparison))
    kept = {name: tensors[name] for name in expected}
    if all(name.startswith("backbone.") for name in kept):
        kept = {name.removeprefix("backbone."): value for name, value in kept.items()}
    metadata = {key: " ".join(map(repr, value)) for key, value in weights.images._asdict().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    state_dict_files.write(target, with_counters(kept), metadata)


def _network_of(weights: Weights, config):
    """Returns (config.model, number of classes) of weights: as configured, as of their run, or as they look."""
    config = weights.config if config is None else config
    if config is not None:
        return config.model, len(config.data.classes)
    model = pretrained.identify(weights)
    if model is None:
        raise StateDictError(f"{weights.path}: its tensors fit no network that is known here; --config=... says which")
    return model, pretrained.num_classes(weights)


def _to_workdir(source: str, network: str, which: str, teacher: str | None, target: pathlib.Path, config) -> None:
    if config is None:
        raise ConfigError("converting to a work directory needs --config, which says the network and the classes")
    has_teacher = config.method.teacher == "teacher"
    if teacher and not has_teacher:
        raise ConfigError(f"--teacher is given, but the method {config.method.name!r} has no teacher")
    student_variables, notes = _whole_network(pretrained.read(source, network, which), config)
    teacher_variables = student_variables if has_teacher else None
    if teacher:
        teacher_variables, _ = _whole_network(pretrained.read(teacher, which=which), config)
    elif has_teacher:
        logger.warning("no --teacher is given: the teacher is a copy of the student")
    origin = {"from": str(source), "teacher": teacher and str(teacher), **notes}
    _save(target, _state(student_variables, teacher_variables, config), json.loads(config.to_json()), origin)


def _whole_network(weights: Weights, config) -> tuple[dict, dict]:
    """Returns the variables of the network of `config`, and the notes; the tensors, often a mapped file, are let go."""
    if not weights.whole:
        raise StateDictError(
            f"{weights.path}: a backbone alone; a work directory needs a whole network. To train from the backbone: "
            f"--mode=train --config.model.pretrained={weights.path}"
        )
    like = pretrained.abstract_variables(config.model, len(config.data.classes))
    fitted = pretrained.fit(weights, like, config)
    logger.info("%s", fitted.report)
    return fitted.variables, weights.notes


def _state(student: dict, teacher: dict | None, config) -> train_state.TrainState:
    """The state at step 0: fresh momentum."""
    transformation, _ = optimizer.from_config(config.optimizer, steps=1)
    _, rng = train_state.keys(config.seed)
    state = train_state.create(student, transformation, rng, teacher=False)
    if teacher is None:
        return state
    return state.replace(teacher_params=teacher["params"], teacher_batch_stats=teacher["batch_stats"])


def _save(target: pathlib.Path, state: train_state.TrainState, config: dict, origin: dict) -> None:
    """Writes a work directory with one checkpoint, beside its place, and moves it there."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        saved = checkpoint.Checkpointer(part)
        # The only checkpoint is the best one until training evaluates another.
        meta = {"config": config, "scores": {**scores.new(), "best_step": 0}, "converted": origin}
        saved.save(0, state, meta)
        saved.close()
        recorder.write_json(part / "config.json", config)
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
