"""Checks, splits and packs data, trains, evaluates, predicts, reports, exports, converts.

python main.py --config=configs/shapes.py --workdir=/tmp/shapes
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from dssn_jax.commands import MODES

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with arguments after a colon.", lock_config=True
)
flags.DEFINE_string("workdir", None, "Folder of the run; for --mode=report several, with commas between.")
_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "; ".join(f"{k}: {mode.does}" for k, mode in MODES.items()))
flags.DEFINE_string("checkpoint", "best", "Of a work directory that is read: best, latest or a step.")
flags.DEFINE_enum("network", None, ["student", "teacher"], "Of a work directory that is read.")
flags.DEFINE_string("from", None, "What to predict (image, folder, list) or convert (weights, work directory).")
flags.DEFINE_string(
    "to", None, "What predict, split, records (folder), convert, report, export or check (file) writes."
)
flags.DEFINE_string("subsets", None, "For split: how many images are labeled, such as 1_8 or 30; commas between.")
flags.DEFINE_bool("stratify", True, "For split: rare classes come into small subsets too.")
flags.DEFINE_bool("confidence", False, "For predict: writes the probability of the class too.")
flags.DEFINE_integer("images", 200, "For report: most validation images to look through; 0: no pictures.", 0)
flags.DEFINE_string("size", None, "For export: HEIGHTxWIDTH of the images; default: the training crop.")
flags.DEFINE_string("teacher", None, "For convert to a work directory: file of the teacher.")
flags.DEFINE_enum("part", "network", ["network", "backbone"], "For convert to a file: what to write.")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster tells it.")
flags.DEFINE_integer("processes", None, "How many processes the run has.", 1)
flags.DEFINE_integer("process", None, "Number of this process, from 0.", 0)


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; a mistake in it, or in the config file, ends the program with one line."""
    from configs import defaults
    from configs.checks import ConfigError, check_keys, unreadable_config_file

    try:
        check_keys(arguments, defaults.get_config())
        rest = flags.FLAGS(arguments)
        configured = getattr(_CONFIG.value, "name", None) is not None  # A file that cannot be read is noticed here.
        mode = MODES[_MODE.value]
        if configured and not mode.takes_config:
            _fail(f"--mode={_MODE.value} reads the configuration of --workdir; it takes no --config")
        for name in mode.needs:
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
    from dssn_jax import distributed, errors
    from dssn_jax.workdir import recorder  # After the flags: --help need not wait for JAX.

    recorder.quiet_libraries()
    try:
        distributed.initialize(flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process)
        MODES[_MODE.value].run(flags.FLAGS)
    except errors.ERRORS as error:
        _fail(str(error), getattr(error, "exit_code", 1))


def _fail(message: str, exit_code: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
