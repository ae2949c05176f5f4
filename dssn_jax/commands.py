"""The command line: modes and flags, parsed without JAX so that --help and typos are answered at once.

`run` executes one command line in this process; `cli` is the program (`main.py`, `dssn-jax`).
"""

import functools
import importlib.machinery
import importlib.util
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import checks, defaults
from configs.checks import ConfigError, shorten
from configs.kinds import show
from input_pipeline.errors import UserError

_string = flags.DEFINE_string
_bool = flags.DEFINE_bool
_count = functools.partial(flags.DEFINE_integer, lower_bound=0)


def _enum(*values: str):
    return functools.partial(flags.DEFINE_enum, enum_values=values)


# Name -> how the flag is defined, help text. Defaults are those of the functions that the modes call.
_FLAGS = {
    "workdir": (_string, "Work directory of the run; for report: one or several, separated by commas."),
    "checkpoint": (_string, "Checkpoint to read from --workdir: best (default), latest or a step."),
    "network": (
        _enum("student", "teacher"),
        "Network to read from a work directory, or for convert from a file of two (default: teacher if there is one; "
        "for convert: student).",
    ),
    "from": (
        _string,
        "predict: an image, a folder of images or a list (.txt). convert: a file of weights or a work directory.",
    ),
    "to": (
        _string,
        "Output. predict, records, split: a folder. check, report, export: a file. convert: a work directory or a "
        "file of weights (.pth, .safetensors).",
    ),
    "subsets": (_string, "Sizes of the labeled subsets, fractions or counts, separated by commas: 1_8,1_4 or 30."),
    "stratify": (_bool, "Put rare classes into small subsets too (default: true)."),
    "confidence": (_bool, "Also write the probability of the predicted class."),
    "images": (_count, "Validation images to search for examples (default: 200; 0: no examples)."),
    "size": (_string, "HEIGHTxWIDTH of the exported network's images (default: the training crop)."),
    "teacher": (
        _string,
        "File of the teacher's weights, when converting to a work directory (default: those in --from, or else the "
        "student's).",
    ),
    "part": (_enum("network", "encoder"), "Weights to convert to a file (default: network)."),
    "form": (
        _enum("original", "huggingface", "timm", "unimatch_v2"),
        "Names of the tensors in the converted file (default: original). huggingface and timm are for encoders of "
        "DINOv2 and DINOv3; unimatch_v2 is a .pth of student and teacher.",
    ),
    "coordinator": (_string, "HOST:PORT of process 0, for several processes outside a known cluster."),
    "processes": (_count, "Number of processes of the run."),
    "process": (_count, "Index of this process, from 0."),
}
_PATHS = ("workdir", "from", "to", "teacher")
_COMMON_FLAGS = ("mode", "coordinator", "processes", "process")  # Every mode takes them.


class Mode(NamedTuple):
    """A value of --mode: its help text, the function that runs it and the flags that it takes."""

    help: str
    entry: str  # "module:function", imported when the mode runs.
    inputs: tuple[str, ...]  # Required flags, passed by position.
    required: tuple[str, ...] = ()  # Required flags, passed by keyword.
    optional: tuple[str, ...] = ()  # Flags that are passed by keyword if given.
    lists: tuple[str, ...] = ()  # Flags whose value is a comma-separated list.

    @property
    def flags(self) -> tuple[str, ...]:
        return self.inputs + self.required + self.optional


MODES = {
    "check": Mode(
        "check a whole data set and list every problem",
        "dssn_jax.prepare.prepare:check", ("config",), optional=("to",),
    ),
    "split": Mode(
        "write lists of labeled, unlabeled and validation images",
        "dssn_jax.prepare.prepare:split", ("config", "subsets"), optional=("stratify", "to"), lists=("subsets",),
    ),
    "records": Mode(
        "pack the files of a data set into ArrayRecord shards",
        "dssn_jax.prepare.prepare:pack", ("config", "to"),
    ),
    "train": Mode(
        "train, or resume a stopped run (the default)",
        "dssn_jax.training.loop:train", ("config", "workdir"),
    ),
    "eval": Mode(
        "score a checkpoint on the validation images",
        "dssn_jax.evaluation.evaluate:evaluate", ("workdir",), ("config",), ("checkpoint",),
    ),
    "predict": Mode(
        "write the predicted class maps of images",
        "dssn_jax.evaluation.predict:predict", ("workdir", "from"), ("to",),
        ("config", "checkpoint", "network", "confidence"),
    ),
    "report": Mode(
        "write an HTML page about one or several runs",
        "dssn_jax.report.page:report", ("workdir",), optional=("to", "images"), lists=("workdir",),
    ),
    "export": Mode(
        "write a network as a file that JAX alone can run",
        "dssn_jax.evaluation.export:export", ("workdir",), optional=("to", "checkpoint", "network", "size"),
    ),
    "convert": Mode(
        "convert weights from PyTorch to a work directory, or back",
        "dssn_jax.weights.convert:convert", ("from", "to"),
        optional=("config", "checkpoint", "network", "teacher", "part", "form"),
    ),
}  # fmt: skip


def define_flags(arguments: Sequence[str]) -> flags.FlagValues:
    """Returns the flags, not yet parsed; overrides --config.KEY become flags if they are in `arguments`."""
    values = flags.FlagValues()
    flags.DEFINE_string("mode", "train", "What to do; see above.", flag_values=values)
    config_flags.DEFINE_config_file(
        "config", None, "Config file, with arguments after a colon: configs/pascal.py:split=183,method=dssn. "
        "--config.KEY=VALUE overrides a key of configs/defaults.py.", values, sys_argv=list(arguments),
    )  # fmt: skip
    values["config"].parser = _ConfigFile()
    for name, (define, text) in _FLAGS.items():
        define(name, None, help=text, flag_values=values)
    return values


class _ConfigFile(flags.ArgumentParser):
    """Parser of FILE:ARGUMENT; whatever goes wrong in the file, which is a program, becomes a ConfigError."""

    def parse(self, argument: str) -> ConfigDict:
        path, *rest = argument.split(":", 1)
        if not os.path.isfile(path):
            raise ConfigError(checks.unreadable_config_file(path))
        spec = importlib.util.spec_from_loader("config_file", importlib.machinery.SourceFileLoader("config_file", path))
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise ConfigError(f"{path} is no config file: it has no function get_config")
            config = module.get_config(*rest)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            where = f", line {lines[-1]}" if lines else ""
            raise ConfigError(f"config file {path}{where}: {type(error).__name__}: {shorten(error)}") from None
        if not isinstance(config, ConfigDict):
            raise ConfigError(f"config file {path}: get_config returns {show(config)}; expected a ConfigDict")
        try:
            checks.check_values(config)
        except ConfigError as error:
            raise ConfigError(f"config file {path}: {error}") from None
        return config.lock()


def help_text() -> str:
    """Returns the text of --help: modes with the flags that each takes, then all flags."""
    lines = ["usage: python main.py --mode=MODE --FLAG=VALUE ...", "", "modes:"]
    for name, mode in MODES.items():
        taken = [f"--{flag}" for flag in mode.inputs + mode.required] + [f"[--{flag}]" for flag in mode.optional]
        lines += [f"  {name:9s} {mode.help}", f"  {'':9s} {' '.join(taken)}"]
    lines += ["", "flags:"]
    values = define_flags(())
    for name in ("mode", "config", *_FLAGS):
        text = textwrap.indent(textwrap.fill(values[name].help, 94), " " * 6)
        lines += [f"  --[no]{name}" if values[name].boolean else f"  --{name}", text]
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> tuple[Mode, flags.FlagValues]:
    """Parses a command line (without the program's name); raises ConfigError for the first mistake in it."""
    checks.check_keys(
        [re.sub(r"^--?(no)?config\.", "--config.", argument) for argument in arguments], defaults.get_config()
    )
    values = define_flags(arguments)
    try:
        _, *rest = values(["main.py", *arguments])
    except UserError:
        raise
    except flags.Error as error:
        raise ConfigError(shorten(error)) from None
    except Exception as error:  # An override that Python, ml_collections or absl cannot parse.
        raise ConfigError(f"command line: {type(error).__name__}: {shorten(error)}") from None
    if rest:
        raise ConfigError(f"unexpected argument {show(rest[0])}; expected --FLAG=VALUE")
    checks.check_choice("--mode", values["mode"].value, MODES)
    _check_flags(values)
    if values["config"].value is not None:
        checks.check_values(values["config"].value)
    return MODES[values["mode"].value], values


def _check_flags(values: flags.FlagValues) -> None:
    """Raises ConfigError for a flag that the mode does not take, or needs and is not given."""
    name = values["mode"].value
    mode = MODES[name]
    for flag in values:
        if values[flag].present and flag.partition(".")[0] not in mode.flags + _COMMON_FLAGS:
            takers = ", ".join(taker for taker, other in MODES.items() if flag in other.flags)
            raise ConfigError(f"--mode={name} takes no --{flag}, which is a flag of: {takers}")
    for flag in mode.inputs + mode.required:
        if values[flag].value is None:
            raise ConfigError(f"--mode={name} needs --{flag}")


def _given(mode: Mode, values: flags.FlagValues) -> dict:
    """Returns the flags of `mode` that are given, with lists split and paths checked; raises ConfigError."""
    given = {name: values[name].value for name in mode.flags if values[name].value is not None}
    given |= {name: given[name].split(",") for name in mode.lists}
    for name in given.keys() & {*_PATHS}:
        paths = given[name] if name in mode.lists else [given[name]]
        paths = [checks.check_path(f"--{name}", path) for path in paths]
        given[name] = paths if name in mode.lists else paths[0]
    checkpoint = given.get("checkpoint", "best")
    if not re.fullmatch("best|latest|[0-9]{1,18}", checkpoint):
        raise ConfigError(f"--checkpoint={shorten(checkpoint)}: expected best, latest or a step")
    return given


def run(arguments: Sequence[str]) -> int:
    """Executes a command line (without the program's name) and returns the exit code.

    Errors that the user can mend are printed to standard error as "error: MESSAGE"; others are raised.
    """
    if {"--help", "-h"} & set(arguments):
        print(help_text())
        return 0
    try:
        mode, values = parse(arguments)
        _call(mode, values, _given(mode, values))
    except (UserError, OSError) as error:  # OSError: a full disk, no permission; the message has the path.
        where = f" ({' '.join(arguments)})" if isinstance(error, OSError) and error.filename is None else ""
        print(f"error: {_printable(f'{error}{where}')}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _printable(text: str) -> str:
    """Returns `text` with control characters escaped, which could change what a terminal shows."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def _call(mode: Mode, values: flags.FlagValues, given: dict) -> None:
    """Joins the other processes, sets up logging and calls the function of `mode` with the flags `given`."""
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise ConfigError(f"JAX refuses one of its environment variables: {error}") from None
    from dssn_jax import distributed
    from dssn_jax.workdir import logs

    logs.quiet_libraries()
    flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl's global flags.
    distributed.initialize(*(values[name].value for name in ("coordinator", "processes", "process")))
    distributed.start_devices()
    inputs = [given.pop(name) for name in mode.inputs]
    module, _, function = mode.entry.partition(":")
    stop_logging = logs.log_to()
    try:
        getattr(importlib.import_module(module), function)(*inputs, **given)
    finally:
        stop_logging()


def cli() -> NoReturn:
    """Executes the command line of this process and exits."""
    sys.exit(run(sys.argv[1:]))
