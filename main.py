"""Trains, evaluates, predicts, reports, exports, converts.

python main.py --config=configs/shapes.py --workdir=/tmp/shapes
"""

import sys

from absl import app, flags
from ml_collections import config_flags

# What a mode does, and the flags that it needs. Without --config, predict reads that of the work directory.
MODES = {
    "train": ("trains, or continues a stopped run", ("config", "workdir")),
    "eval": ("scores a checkpoint", ("config", "workdir")),
    "predict": ("writes class maps of images", ("workdir", "from", "to")),
    "report": ("makes a page about runs", ("workdir",)),
    "export": ("writes a network that JAX alone runs", ("workdir",)),
    "convert": ("takes weights of PyTorch in or out", ("from", "to")),
}
UNCONFIGURED = ("report", "export")  # They read the configuration that is in the work directory.

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with arguments after a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; for --mode=report several, with commas between.")
_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "; ".join(f"{k}: {does}" for k, (does, _) in MODES.items()))
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "Of a work directory that is read: best, latest or a step.")
_NETWORK = flags.DEFINE_enum("network", None, ["student", "teacher"], "Of a work directory that is read.")
_FROM = flags.DEFINE_string("from", None, "What to predict (image, folder, list) or convert (weights, work directory).")
_TO = flags.DEFINE_string("to", None, "What predict (folder), convert, report or export (file) writes.")
_CONFIDENCE = flags.DEFINE_bool("confidence", False, "For predict: writes the probability of the class too.")
_IMAGES = flags.DEFINE_integer("images", 200, "For report: most validation images to look through; 0: no pictures.", 0)
_SIZE = flags.DEFINE_string("size", None, "For export: HEIGHTxWIDTH of the images; default: the training crop.")
_TEACHER = flags.DEFINE_string("teacher", None, "For convert to a work directory: file of the teacher.")
_PART = flags.DEFINE_enum("part", "network", ["network", "backbone"], "For convert to a file: what to write.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster tells it.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes the run has.", 1)
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.", 0)


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; a mistake in it, or in the config file, ends the program with one line."""
    from configs import defaults
    from dssn_jax.config import ConfigError, check_keys, unreadable_config_file

    try:
        check_keys(arguments, defaults.get_config())
        rest = flags.FLAGS(arguments)
        configured = getattr(_CONFIG.value, "name", None) is not None  # A file that cannot be read is noticed here.
        if configured and _MODE.value in UNCONFIGURED:
            _fail(f"--mode={_MODE.value} reads the configuration of --workdir; it takes no --config")
        for name in MODES[_MODE.value][1]:
            if flags.FLAGS[name].value is None:
                _fail(f"--mode={_MODE.value} needs --{name}")
        return rest
    except (flags.Error, ConfigError) as error:
        _fail(str(error))
    except OSError:
        _fail(unreadable_config_file(str(flags.FLAGS["config"].config_filename)))


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        _fail(f"unexpected argument {arguments[1]!r}")
    from dssn_jax import distributed, errors, recorder  # After the flags: --help need not wait for JAX.

    recorder.quiet_libraries()
    try:
        distributed.initialise(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        _run(_MODE.value, _WORKDIR.value, _CHECKPOINT.value, _NETWORK.value)
    except errors.ERRORS as error:
        _fail(str(error), getattr(error, "exit_code", 1))


def _run(mode: str, workdir: str, which: str, network: str | None) -> None:
    from dssn_jax import convert, evaluate, export, predict, report, train

    if mode == "train":
        train.train(_CONFIG.value, workdir)
    elif mode == "eval":
        evaluate.evaluate(_CONFIG.value, workdir, which)
    elif mode == "predict":
        predict.predict(_CONFIG.value, workdir, _FROM.value, _TO.value, which, network, _CONFIDENCE.value)
    elif mode == "report":
        report.report(workdir.split(","), _TO.value, _IMAGES.value)
    elif mode == "export":
        export.export(workdir, which, network, _SIZE.value, _TO.value)
    else:
        weights = {"teacher": _TEACHER.value, "network": network or "student", "which": which, "part": _PART.value}
        convert.convert(_FROM.value, _TO.value, _CONFIG.value, **weights)


def _fail(message: str, exit_code: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
