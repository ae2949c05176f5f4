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
import numpy as np
from ml_collections import ConfigDict

from configs import defaults
from configs.checks import ConfigError, check_choice
from dssn_jax import models, sharding
from dssn_jax.learner import learner as learner_lib
from dssn_jax.learner import state as state_lib
from dssn_jax.learner.learner import Learner
from dssn_jax.validate import validate_model, validate_training
from dssn_jax.weights import files, forms, names, pretrained
from dssn_jax.weights.files import StateDictError
from dssn_jax.weights.pretrained import Weights
from dssn_jax.workdir import records
from dssn_jax.workdir.checkpoint import Checkpointer, new_scores
from dssn_jax.workdir.logs import logger

PARTS = ("network", "encoder")
UNIMATCH_V2 = "unimatch_v2"  # The form of a file with two networks: a checkpoint of UniMatch V2.
FORMS = (forms.ORIGINAL, "huggingface", "timm", UNIMATCH_V2)
_DDP_PREFIX = "module."  # PyTorch's `DistributedDataParallel` puts it before every name.


def convert(
    source: str,
    to: str,
    *,
    config=None,
    checkpoint: str = "best",
    network: str = "student",
    teacher: str | None = None,
    part: str = "network",
    form: str | None = None,
) -> None:
    """Converts weights between files and work directories; writes all of `to` or nothing.

    Args:
      source: a file of an encoder, of a full network or of two (a checkpoint of UniMatch V2), or a work directory.
      to: the new file (.pth, .pt, .safetensors) or work directory (no suffix).
      config: describes the network; required for a work directory. For files the default is to identify the network
        from its tensors.
      checkpoint: best, latest or a step, if `source` is a work directory.
      network: student or teacher, if `source` has both.
      teacher: weights of the teacher, if `to` is a work directory; default: those in `source`, or else the student's.
        Parameters that the config freezes are always the student's.
      part: network, or encoder: its tensors alone, under the names of an encoder file; if `to` is a file.
      form: one of FORMS, of the tensors' names, if `to` is a file; default: original. unimatch_v2 holds the networks of
        `source`, student and teacher.

    Raises StateDictError, CheckpointError, WorkdirError or ConfigError for what cannot be converted.
    """
    started = time.monotonic()
    target = pathlib.Path(to).expanduser().absolute()
    to_file = target.suffix in files.SUFFIXES
    _check_target(target, to_file)
    form = _checked_form(form, target, to_file, network, part)
    _check_options(to_file, config, teacher, part)
    selection = {"checkpoint": checkpoint, "network": network}
    try:
        if form == UNIMATCH_V2:
            _write_checkpoint(pretrained.read_networks(source, checkpoint=checkpoint), target, config)
        elif to_file:
            _write_file(pretrained.read(source, **selection), target, config, part, form)
        else:
            _write_workdir(source, target, config, selection, teacher)
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


def _checked_form(form: str | None, target: pathlib.Path, to_file: bool, network: str, part: str) -> str:
    """Returns the form, original by default; raises ConfigError if `target` or other options exclude it."""
    if form is None:
        return forms.ORIGINAL
    check_choice("form", form, FORMS)
    if not to_file:
        raise ConfigError("--form is for converting to a file")
    if form == UNIMATCH_V2 and (network, part) != ("student", "network"):
        raise ConfigError(
            f"--form={form} holds whole networks, student and teacher; it takes no --network and no --part"
        )
    if form == UNIMATCH_V2 and target.suffix not in files.TORCH_SUFFIXES:
        raise ConfigError(
            f"--form={form} holds two networks, for which .safetensors has no place; expected --to=FILE.pth"
        )
    return form


def _check_options(to_file: bool, config, teacher: str | None, part: str) -> None:
    check_choice("part", part, PARTS)
    if to_file and teacher:
        raise ConfigError("--teacher is for converting to a work directory")
    if not to_file and part != "network":
        raise ConfigError("a work directory holds a full network; --part=encoder is for converting to a file")
    if not to_file and config is None:
        raise ConfigError("converting to a work directory needs --config, which defines the network and the classes")
    if not to_file:
        validate_training(config, device_count=1)
    elif config is not None:
        validate_model(config)
    if teacher and config.method.teacher != "ema":
        raise ConfigError(f"--teacher is given, but the method {config.method.name!r} has no EMA teacher")


def _write_file(weights: Weights, target: pathlib.Path, config, part: str, form: str) -> None:
    if part == "encoder":
        weights = weights._replace(tensors=names.encoder_part(weights.tensors))
    if weights.is_full_network and form != forms.ORIGINAL:
        raise ConfigError(f"--form={form} is a form of encoders; {weights.path} is a full network: add --part=encoder")
    tensors = _complete(weights, *_network_of(weights, config), form)
    metadata = {key: " ".join(map(repr, value)) for key, value in weights.normalization._asdict().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write(target, tensors, metadata)


def _write_checkpoint(networks: dict[str, Weights], target: pathlib.Path, config) -> None:
    """Writes a file as UniMatch V2 saves it: `model`, `model_ema` if there is a teacher, and known numbers."""
    content = {}
    for network, weights in networks.items():
        if not weights.is_full_network:
            raise StateDictError(f"{weights.path}: an encoder alone; --form={UNIMATCH_V2} needs a full network")
        tensors = _complete(weights, *_network_of(weights, config), forms.ORIGINAL)
        content[network] = {_DDP_PREFIX + name: value for name, value in tensors.items()}
    metadata = networks["student"].metadata
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_checkpoint(target, content, {name: metadata[name] for name in files.NUMBERS if name in metadata})


def _complete(weights: Weights, model: ConfigDict, num_classes: int, form: str) -> dict[str, np.ndarray]:
    """Returns the content of a file in `form` with the weights of a full network, or of an encoder alone.

    Raises StateDictError if the weights do not fit `model`, and ConfigError if its encoder has no such form.
    """
    like = pretrained.abstract_variables(model, num_classes)
    if not weights.is_full_network:
        like = names.encoder_variables(like)
    weights, expected = weights._replace(tensors=names.with_unused(weights.tensors, like)), names.shapes(like)
    logger.info("%s: %s", weights, pretrained.counts(pretrained.check(weights, expected)))
    weights = weights._replace(tensors={name: weights.tensors[name] for name in expected})
    encoder = pretrained.encoder_tensors(weights)
    known = forms.names_of(forms.family(encoder))
    if form not in known:
        raise ConfigError(f"--form={form} is not known for {model.encoder}; known: {', '.join(known)}")
    if forms.family(encoder):
        built = models.build(model, num_classes).encoder
        encoder = forms.from_original(encoder, form, built.width // built.heads)
    if not weights.is_full_network:
        return names.with_counters(encoder)
    others = {name: value for name, value in weights.tensors.items() if not name.startswith(names.ENCODER_PREFIX)}
    return names.with_counters({**{names.ENCODER_PREFIX + name: value for name, value in encoder.items()}, **others})


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
    model.decoder = pretrained.decoder_of(weights) or ("deeplabv3plus" if weights.is_full_network else "linear")
    if "fuse.0.weight" in weights.tensors:
        model.decoder_channels = len(weights.tensors["fuse.0.weight"])
    return model, pretrained.num_classes(weights)


def _write_workdir(source: str, target: pathlib.Path, config, selection: dict, teacher: str | None) -> None:
    """Writes a work directory at step 0, as training from these weights would; `selection` are arguments of `read`."""
    learner = learner_lib.build(config, sharding.make_mesh(jax.local_devices()[:1]))
    like = learner.abstract_state().networks()
    weights = _student_and_teacher(source, selection, teacher, learner)
    metadata = weights["student"].metadata
    # Popped: the tensors, often a mapped file, are released.
    student, teacher_variables = (
        _load(weights.pop(name), like[name], learner) if name in weights else None for name in ("student", "teacher")
    )
    init = jax.jit(functools.partial(_init_state, learner), donate_argnums=(0, 1))  # Donated: no second copies.
    state = init(student, teacher_variables, state_lib.run_keys(config.seed)[1])
    # The only checkpoint is the best one until training evaluates another.
    scores = new_scores(config.eval.metric) | {"best_step": 0}
    origin = {"from": str(source), "teacher": teacher and str(teacher), **metadata}
    _save(target, state, {"config": json.loads(config.to_json()), "scores": scores, "converted": origin})


def _student_and_teacher(source: str, selection: dict, teacher: str | None, learner: Learner) -> dict[str, Weights]:
    """Returns the weights of the student and, if the method has one and there are weights for it, of the teacher."""
    networks = pretrained.read_networks(source, checkpoint=selection["checkpoint"])
    own = {"student": pretrained.pick(networks, source, selection["network"])}
    if teacher:
        own["teacher"] = pretrained.read(teacher, checkpoint=selection["checkpoint"])
    elif selection["network"] == "student" and "teacher" in networks:
        own["teacher"] = networks["teacher"]
    if not learner.method.has_ema and own.pop("teacher", None):
        logger.warning("%s: its teacher is left out: the method %s has none", source, learner.config.method.name)
    elif learner.method.has_ema and "teacher" not in own:
        logger.warning("no --teacher is given: the teacher is a copy of the student")
    return own


def _init_state(learner: Learner, student: dict, teacher: dict | None, rng: jax.Array) -> state_lib.TrainState:
    """Returns the state at step 0 of a run with these networks; without `teacher`, it is a copy of the student."""
    state = learner.train_step.init(student, rng)
    if teacher is None:
        return state
    return state.replace(teacher=state_lib.copy_of(teacher, like=state.teacher))


def _load(weights: Weights, like: dict, learner: Learner) -> dict:
    """Returns variables of a full network."""
    if not weights.is_full_network:
        raise StateDictError(
            f"{weights.path}: an encoder alone; a work directory needs a full network. To train from the encoder: "
            f"--mode=train --config.model.pretrained={weights.path}"
        )
    loaded = pretrained.fill(weights, like, learner.config)
    logger.info("%s", loaded.report)
    return loaded.variables


def _save(target: pathlib.Path, state: state_lib.TrainState, meta: dict) -> None:
    """Writes a work directory with one checkpoint under a temporary name, then renames it."""
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    part.mkdir(parents=True)
    try:
        saved = Checkpointer(part)
        saved.save(0, state, meta)
        saved.wait()
        saved.close()
        records.write_json(part / records.CONFIG, meta["config"])
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
