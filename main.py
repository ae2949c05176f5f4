"""Trains, evaluates, predicts and converts: `python main.py --config=configs/shapes.py --workdir=/tmp/shapes`."""

import logging as python_logging
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

# Mode -> flags that it needs.
MODES = {
    "train": ("config", "workdir"),
    "eval": ("config", "workdir"),
    "predict": ("config", "workdir", "from", "to"),
    "convert": ("from", "to"),
}

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with arguments after a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, summary.")
_MODE = flags.DEFINE_enum(
    "mode", "train", list(MODES), "train (continues a stopped run), eval (scores a checkpoint), predict or convert."
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "Of a work directory that is read: best, latest or a step.")
_FROM = flags.DEFINE_string("from", None, "What to predict (image, folder, list) or convert (weights, work directory).")
_TO = flags.DEFINE_string("to", None, "Folder of predictions, or new .pth or .safetensors file or work directory.")
_TEACHER = flags.DEFINE_string("teacher", None, "For --mode=convert to a work directory: file of the teacher.")
_NETWORK = flags.DEFINE_enum("network", None, ["student", "teacher"], "Of a work directory that is read.")
_CONFIDENCE = flags.DEFINE_bool("confidence", False, "For --mode=predict: writes the probability of the class too.")
_PART = flags.DEFINE_enum("part", "network", ["network", "backbone"], "For --mode=convert to a file: what to write.")


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; a mistake in it, or in the config file, ends the program with one line."""
    from configs import defaults
    from dssn_jax.config import ConfigError, check_keys

    try:
        check_keys(arguments, defaults.get_config())
        rest = flags.FLAGS(arguments)
        if _CONFIG.value is not None:
            _CONFIG.value.name  # A file that cannot be read is noticed here.  # noqa: B018
        for name in MODES[_MODE.value]:
            if flags.FLAGS[name].value is None:
                _fail(f"--mode={_MODE.value} needs --{name}")
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
    # After the flags: --help need not wait for JAX.
    from dssn_jax import checkpoint, config, convert, evaluate, predict, state_dict_files, train
    from input_pipeline import DataError

    logging.set_verbosity(logging.WARNING)
    python_logging.getLogger("jax").setLevel(python_logging.ERROR)
    try:
        if _MODE.value == "train":
            train.train(_CONFIG.value, _WORKDIR.value)
        elif _MODE.value == "eval":
            evaluate.evaluate(_CONFIG.value, _WORKDIR.value, _CHECKPOINT.value)
        elif _MODE.value == "predict":
            how = {"which": _CHECKPOINT.value, "network": _NETWORK.value, "confidence": _CONFIDENCE.value}
            predict.predict(_CONFIG.value, _WORKDIR.value, _FROM.value, _TO.value, **how)
        else:
            how = {"which": _CHECKPOINT.value, "network": _NETWORK.value or "student"}
            convert.convert(_FROM.value, _TO.value, _CONFIG.value, _TEACHER.value, part=_PART.value, **how)
    except (
        config.ConfigError, checkpoint.CheckpointError, state_dict_files.StateDictError, train.DivergedError,
        predict.UnreadableError, DataError,
    ) as error:  # fmt: skip
        _fail(str(error))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
