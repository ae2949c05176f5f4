"""Converts weights between PyTorch files (.pth, .safetensors) and work directories: `--mode=convert`."""

import functools
import json
import os
import pathlib
import re
import shutil
import time
import uuid

import jax
from etils import epath
from ml_collections import ConfigDict

from configs import defaults
from configs.checks import ConfigError, check_choice
from dssn_jax import sharding
from dssn_jax.learner import learner as learner_lib
from dssn_jax.learner import state as state_lib
from dssn_jax.learner.learner import Learner
from dssn_jax.validate import validate_model, validate_training
from dssn_jax.weights import files, names, pretrained
from dssn_jax.weights.files import StateDictError
from dssn_jax.weights.pretrained import Weights
from dssn_jax.workdir import recorder, restore
from dssn_jax.workdir.checkpoint import Checkpointer, new_scores
from dssn_jax.workdir.recorder import logger

PARTS = ("network", "encoder")


def convert(
    source: str,
    to: str,
    *,
    config=None,
    checkpoint: str = "best",
    network: str = "student",
    teacher: str | None = None,
    part: str = "network",
) -> None:
    """Converts weights between files and work directories; writes all of `to` or nothing.

    Args:
      source: a file of an encoder or of a full network, or a work directory.
      to: the new file (.pth, .pt, .safetensors) or work directory (no suffix).
      config: describes the network; required for a work directory. For files the default is to identify the network
        from its tensors.
      checkpoint: best, latest or a step, if `source` is a work directory.
      network: student or teacher, if `source` is a work directory.
      teacher: weights of the teacher, if `to` is a work directory; default: those of the student. Parameters that the
        config freezes are always the student's.
      part: network, or encoder: its tensors alone, under the names of an encoder file; if `to` is a file.

    Raises StateDictError, CheckpointError, WorkdirError or ConfigError for what cannot be converted.
    """
    started = time.monotonic()
    target = pathlib.Path(to).expanduser().absolute()
    to_file = target.suffix in files.SUFFIXES
    _check_target(target, to_file)
    _check_options(source, to_file, config, network, teacher, part)
    try:
        if to_file:
            _write_file(pretrained.read(source, checkpoint=checkpoint, network=network), target, config, part)
        else:
            _write_workdir(source, target, config, {"checkpoint": checkpoint, "network": network}, teacher)
    except OSError as error:
        raise StateDictError(f"{to}: cannot be written: {error}") from None
    logger.info("wrote %s in %.1f s", to, time.monotonic() - started)


def _check_target(target: pathlib.Path, is_file: bool) -> None:
    if not is_file and re.fullmatch(r"\.[A-Za-z]\w*", target.suffix):
        raise StateDictError(f"{target}: expected {', '.join(files.SUFFIXES)} or, for a work directory, no suffix")
    if target.exists() and (is_file or not target.is_dir() or any(target.iterdir())):
        raise StateDictError(f"{target}: exists already; nothing was written")
    if is_file:
        files.check_writable(target)


def _check_options(source: str, to_file: bool, config, network: str, teacher: str | None, part: str) -> None:
    check_choice("part", part, PARTS)
    if to_file and teacher:
        raise ConfigError("--teacher is for converting to a work directory; a file holds one network")
    if not to_file and part != "network":
        raise ConfigError("a work directory holds a full network; --part=encoder is for converting to a file")
    if not to_file and config is None:
        raise ConfigError("converting to a work directory needs --config, which defines the network and the classes")
    if network != "student" and not epath.Path(source).expanduser().is_dir():
        raise ConfigError(f"--network={network} is for work directories; {source} holds one network")
    if not to_file:
        validate_training(config, device_count=1)
    elif config is not None:
        validate_model(config)
    if teacher and config.method.teacher != "ema":
        raise ConfigError(f"--teacher is given, but the method {config.method.name!r} has no EMA teacher")


def _write_file(weights: Weights, target: pathlib.Path, config, part: str) -> None:
    expected = names.shapes(pretrained.abstract_variables(*_network_of(weights, config)))
    if part == "encoder":
        weights = weights._replace(tensors=names.encoder_part(weights.tensors))
    if not weights.is_full_network:
        expected = names.encoder_part(expected)
    logger.info("%s: %s", weights, pretrained.counts(pretrained.check(weights, expected)))
    tensors = {name: weights.tensors[name] for name in expected}
    if not weights.is_full_network:
        tensors = {name.removeprefix(names.ENCODER_PREFIX): value for name, value in tensors.items()}
    metadata = {key: " ".join(map(repr, value)) for key, value in weights.normalization._asdict().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write(target, names.with_counters(tensors), metadata)


def _network_of(weights: Weights, config) -> tuple[ConfigDict, int]:
    """Returns (config.model, number of classes) of `weights`, from `config`, their run or their tensors."""
    config = weights.config if config is None else config
    if config is not None:
        return config.model, len(config.data.classes)
    keys = pretrained.identify(weights)
    if keys is None:
        raise StateDictError(f"{weights.path}: its tensors fit no known encoder; --config=... defines the network")
    model = defaults.get_config().model
    model.update(keys)
    if "fuse.0.weight" in weights.tensors:
        model.decoder_channels = len(weights.tensors["fuse.0.weight"])
    return model, pretrained.num_classes(weights)


def _write_workdir(source: str, target: pathlib.Path, config, selection: dict, teacher: str | None) -> None:
    """Writes a work directory at step 0, as training from these weights would; `selection` are arguments of `read`."""
    learner = learner_lib.build(config, sharding.make_mesh(jax.local_devices()[:1]))
    like = learner.abstract_state().networks()
    student, metadata = _load(source, like["student"], learner, **selection)
    teacher_variables = None
    if teacher:
        teacher_variables, _ = _load(teacher, like["teacher"], learner, checkpoint=selection["checkpoint"])
    elif learner.method.has_ema:
        logger.warning("no --teacher is given: the teacher is a copy of the student")
    init = jax.jit(functools.partial(_init_state, learner), donate_argnums=(0, 1))  # Donated: no second copies.
    state = init(student, teacher_variables, state_lib.run_keys(config.seed)[1])
    # The only checkpoint is the best one until training evaluates another.
    scores = new_scores(config.eval.metric) | {"best_step": 0}
    origin = {"from": str(source), "teacher": teacher and str(teacher), **metadata}
    _save(target, state, {"config": json.loads(config.to_json()), "scores": scores, "converted": origin})


def _init_state(learner: Learner, student: dict, teacher: dict | None, rng: jax.Array) -> state_lib.TrainState:
    """Returns the state at step 0 of a run with these networks; without `teacher`, it is a copy of the student."""
    state = learner.train_step.init(student, rng)
    if teacher is None:
        return state
    return state.replace(teacher=state_lib.copy_of(teacher, like=state.teacher))


def _load(path: str, like: dict, learner: Learner, **selection: str) -> tuple[dict, dict]:
    """Returns variables of a full network and their metadata; the tensors, often a mapped file, are released."""
    weights = pretrained.read(path, **selection)
    if not weights.is_full_network:
        raise StateDictError(
            f"{path}: an encoder alone; a work directory needs a full network. To train from the encoder: --mode=train "
            f"--config.model.pretrained={path}"
        )
    loaded = pretrained.fill(weights, like, learner.config)
    logger.info("%s", loaded.report)
    return loaded.variables, weights.metadata


def _save(target: pathlib.Path, state: state_lib.TrainState, meta: dict) -> None:
    """Writes a work directory with one checkpoint under a temporary name, then renames it."""
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    part.mkdir(parents=True)
    try:
        saved = Checkpointer(part)
        saved.save(0, state, meta)
        saved.wait()
        saved.close()
        recorder.write_json(part / restore.CONFIG, meta["config"])
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
