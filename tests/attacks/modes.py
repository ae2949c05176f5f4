"""The command line of each mode in a place, with its outputs and the check of its result."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from tests.attacks.fixtures import Place

READING = ("eval", "predict", "export", "report", "convert")  # Modes that read a work directory.


class Command(NamedTuple):
    """A command line that succeeds."""

    argv: list[str]
    outputs: tuple[pathlib.Path, ...]
    verify: Callable[[str], str]  # See `Attack.verify`.


def command(place: Place, mode: str, workdir: pathlib.Path) -> Command:
    """Returns a command of `mode` about the run in `workdir`; train continues it, convert writes .safetensors."""
    work, out, name = f"--workdir={workdir}", place.out, workdir.name
    if mode == "train":
        return Command([*place.config(), work], (workdir,), lambda stdout: place.check_run(workdir))
    if mode == "eval":
        written = workdir / place.oracle["eval"]
        return Command(["--mode=eval", *place.config(), work], (written,), lambda _: place.check_scores(workdir))
    if mode == "predict":
        argv, to = ["--mode=predict", work, f"--from={place.root / 'images'}"], out / name
        return Command([*argv, f"--to={to}"], (to,), lambda _: place.check_maps(to))
    if mode == "export":
        to = out / "a.stablehlo"
        beside = to.with_name("a.stablehlo.json")
        return Command(["--mode=export", work, f"--to={to}"], (to, beside), lambda _: place.check_export(to))
    if mode == "report":
        to = out / "a.html"
        return Command(["--mode=report", work, "--images=0", f"--to={to}"], (to,), lambda _: place.check_page(to))
    if mode == "convert":
        to = out / "w.safetensors"
        return Command(["--mode=convert", f"--from={workdir}", f"--to={to}"], (to,), lambda _: place.check_tensors(to))
    if mode == "check":
        return Command(["--mode=check", *place.config()], (), lambda _: "")
    raise ValueError(mode)
