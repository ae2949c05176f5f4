"""What --mode chooses: what each mode does, the flags that it needs, and whom it calls.

Modules are imported when a mode runs: the command line's help need not wait for JAX.
"""

from collections.abc import Callable
from typing import NamedTuple


class Mode(NamedTuple):
    """A mode of main.py."""

    does: str  # For the help.
    needs: tuple[str, ...]  # Flags that must be given.
    run: Callable  # Takes absl's parsed flags.
    takes_config: bool = True  # If not, it reads the configuration that is in the work directory.


def _train(flags) -> None:
    from dssn_jax.training import loop as train

    train.train(flags.config, flags.workdir)


def _eval(flags) -> None:
    from dssn_jax.evaluation import evaluate

    evaluate.evaluate(flags.config, flags.workdir, flags.checkpoint)


def _predict(flags) -> None:
    from dssn_jax.evaluation import predict

    images = flags["from"].value
    predict.predict(flags.config, flags.workdir, images, flags.to, flags.checkpoint, flags.network, flags.confidence)


def _report(flags) -> None:
    from dssn_jax import report

    report.report(flags.workdir.split(","), flags.to, flags.images)


def _export(flags) -> None:
    from dssn_jax.evaluation import export

    export.export(flags.workdir, flags.checkpoint, flags.network, flags.size, flags.to)


def _check(flags) -> None:
    from dssn_jax.prepare import prepare as own_images

    own_images.check(flags.config, flags.to)


def _split(flags) -> None:
    from dssn_jax.prepare import prepare as own_images

    own_images.split(flags.config, flags.subsets.split(","), flags.stratify, flags.to or "")


def _records(flags) -> None:
    from dssn_jax.prepare import prepare as own_images

    own_images.pack(flags.config, flags.to)


def _convert(flags) -> None:
    from dssn_jax.weights import convert

    weights = {"teacher": flags.teacher, "network": flags.network or "student"}
    weights |= {"which": flags.checkpoint, "part": flags.part}
    convert.convert(flags["from"].value, flags.to, flags.config, **weights)


# Without --config, predict reads that of the work directory.
MODES = {
    "check": Mode("looks through a whole data set and tells what is wrong with it", ("config",), _check),
    "split": Mode("makes lists of labeled, unlabeled and validation images", ("config", "subsets"), _split),
    "records": Mode("packs a data set of files into a few large ones", ("config", "to"), _records),
    "train": Mode("trains, or continues a stopped run", ("config", "workdir"), _train),
    "eval": Mode("scores a checkpoint", ("config", "workdir"), _eval),
    "predict": Mode("writes class maps of images", ("workdir", "from", "to"), _predict),
    "report": Mode("makes a page about runs", ("workdir",), _report, takes_config=False),
    "export": Mode("writes a network that JAX alone runs", ("workdir",), _export, takes_config=False),
    "convert": Mode("takes weights of PyTorch in or out", ("from", "to"), _convert),
}
