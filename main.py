"""Trains and evaluates: `python main.py --config=configs/shapes.py --workdir=/tmp/shapes`."""

import logging as python_logging
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

MODES = ("train", "eval")

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with arguments after a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, summary.")
_MODE = flags.DEFINE_enum("mode", "train", MODES, "train (continues a stopped run) or eval (scores a checkpoint).")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "For --mode=eval: best, latest or a step.")
flags.mark_flags_as_required(["config", "workdir"])


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; a mistake in it, or in the config file, ends the program with one line."""
    from configs import defaults
    from dssn_jax.config import ConfigError, check_keys

    try:
        check_keys(arguments, defaults.get_config())
        rest = flags.FLAGS(arguments)
        _CONFIG.value.name  # A file that cannot be read is noticed here.  # noqa: B018
        return rest
    except (flags.Error, ConfigError) as error:
        _fail(str(error))
    except OSError:
        path = str(flags.FLAGS["config"].config_filename)
        _fail(f"config file {path!r} cannot be read{suggest_config(path)}")


def suggest_config(path: str) -> str:
    """Names the config files that there are."""
    from dssn_jax.config import suggest

    folder = pathlib.Path(__file__).parent / "configs"
    helpers = {"__init__", "arguments", "defaults", "methods"}
    return suggest(path, sorted(f"configs/{file.name}" for file in folder.glob("*.py") if file.stem not in helpers))


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        _fail(f"unexpected argument {arguments[1]!r}")
    from dssn_jax import checkpoint, config, evaluate, train  # After the flags: --help need not wait for JAX.
    from input_pipeline import DataError

    logging.set_verbosity(logging.WARNING)
    python_logging.getLogger("jax").setLevel(python_logging.ERROR)
    try:
        if _MODE.value == "train":
            train.train(_CONFIG.value, _WORKDIR.value)
        else:
            evaluate.evaluate(_CONFIG.value, _WORKDIR.value, _CHECKPOINT.value)
    except (config.ConfigError, checkpoint.CheckpointError, train.DivergedError, DataError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
