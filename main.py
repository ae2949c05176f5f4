"""Trains, evaluates, reports, exports: `python main.py --config=configs/shapes.py --workdir=/tmp/shapes`."""

import logging as python_logging
import sys

from absl import app, flags, logging
from ml_collections import config_flags

MODES = {
    "train": "trains, or continues a stopped run",
    "eval": "scores a checkpoint",
    "report": "makes a page about runs",
    "export": "writes a network that JAX alone runs",
}
CONFIGURED = ("train", "eval")  # The other modes read the configuration that is in the work directory.

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with arguments after a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; for --mode=report several, with commas between.")
_MODE = flags.DEFINE_enum("mode", "train", MODES, "; ".join(f"{name}: {does}" for name, does in MODES.items()) + ".")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "For eval and export: best, latest or a step.")
_TO = flags.DEFINE_string("to", None, "File that report or export writes; default: one in the (first) work directory.")
_IMAGES = flags.DEFINE_integer("images", 200, "For report: most validation images to look through; 0: no pictures.", 0)
_NETWORK = flags.DEFINE_enum("network", None, ["student", "teacher"], "For export; default: the teacher, if any.")
_SIZE = flags.DEFINE_string("size", None, "For export: HEIGHTxWIDTH of the images; default: the training crop.")
flags.mark_flag_as_required("workdir")


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; a mistake in it, or in the config file, ends the program with one line."""
    from configs import defaults
    from dssn_jax.config import ConfigError, check_keys, suggest_config_file

    try:
        check_keys(arguments, defaults.get_config())
        rest = flags.FLAGS(arguments)
        name = getattr(_CONFIG.value, "name", None)  # A file that cannot be read is noticed here.
        if (name is not None) != (_MODE.value in CONFIGURED):
            _fail(f"--config goes with --mode={' and '.join(CONFIGURED)}; the other modes read that of --workdir")
        return rest
    except (flags.Error, ConfigError) as error:
        _fail(str(error))
    except OSError:
        path = str(flags.FLAGS["config"].config_filename)
        _fail(f"config file {path!r} cannot be read{suggest_config_file(path)}")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        _fail(f"unexpected argument {arguments[1]!r}")
    from dssn_jax.checkpoint import CheckpointError  # After the flags: --help need not wait for JAX.
    from dssn_jax.config import ConfigError
    from dssn_jax.saved_run import WorkdirError
    from dssn_jax.train import DivergedError
    from input_pipeline import DataError

    errors = (ConfigError, CheckpointError, WorkdirError, DivergedError, DataError)
    logging.set_verbosity(logging.WARNING)
    python_logging.getLogger("jax").setLevel(python_logging.ERROR)
    try:
        _run(_MODE.value)
    except errors as error:
        _fail(str(error))


def _run(mode: str) -> None:
    from dssn_jax import evaluate, export, report, train

    if mode == "train":
        train.train(_CONFIG.value, _WORKDIR.value)
    elif mode == "eval":
        evaluate.evaluate(_CONFIG.value, _WORKDIR.value, _CHECKPOINT.value)
    elif mode == "report":
        report.report(_WORKDIR.value.split(","), _TO.value, _IMAGES.value)
    else:
        export.export(_WORKDIR.value, _CHECKPOINT.value, _NETWORK.value, _SIZE.value, _TO.value)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
