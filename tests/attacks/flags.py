"""Attacks on the command line: odd values of flags, flags left out and superfluous, odd config files."""

import os
import random

from dssn_jax.commands import MODES
from tests.attacks.attack import Attack
from tests.attacks.fixtures import Place
from tests.attacks.modes import READING, command

_NEW = ("", " ", "~/x", "~nosuchuser/x", "http://x", "a://b", "://", "/proc/x/y", "x\ny", "é\U0001f600", "\x1b[31m",
        "a" * 300, "a/" * 2000, "-", "None")  # fmt: skip
_PATHS = (*_NEW, "..", "/", "/dev/null", "mine.txt")  # Where something is already: for reading alone.
_VALUES = {
    "checkpoint": ("²", "-1", "1.5", str(10**30), "", "BEST", "nan", "../2", "latest,best", "٣", "9"),
    "network": ("teacher", "", "Student", "both", "1"),
    "size": ("0x0", "1e3x3", "x", "33", "-33x33", "33x33x3", "²x²", "3.5x3", "999999999999x999999999999", "33X33", ""),
    "images": ("-1", str(2**70), "abc", "", "1.5", "nan"),
    "confidence": ("maybe", "", "2"),
    "subsets": ("", ",", "0", "-1", "1_0", "0_5", "nan", "2_1", "1_2,1_2", "abc", "9" * 40, "1/0", "½", "1.5"),
    "stratify": ("maybe", "2"),
    "part": ("decoder", "", "Network"),
    "teacher": (*_PATHS,),
    "processes": ("-1", "0", "abc", str(2**70), "1"),
    "process": ("-1", "1", "abc", str(2**70)),
    "coordinator": ("", "x", "localhost:abc"),
    "workdir": _NEW,
    "from": _PATHS,
    "to": _NEW,
    "mode": ("", "Train", "tran", "eval,report", "é", "--help"),
    "config": _PATHS,
}
_FILES = {
    "no Python": "this is no Python (\n",
    "empty": "",
    "NUL": "a = 1\0\n",
    "no function": "config = 1\n",
    "raises": "def get_config(argument=None):\n    raise RuntimeError('a mistake of mine')\n",
    "divides": "x = 1 / 0\n",
    "imports": "import no_such_module\n",
    "returns None": "def get_config(argument=None):\n    return None\n",
    "returns a dict": "def get_config(argument=None):\n    return {'seed': 1}\n",
    "returns too little": "import ml_collections\ndef get_config(_=None):\n    return ml_collections.ConfigDict()\n",
    "wrong arguments": "def get_config(a, b, c):\n    return None\n",
    "no argument": "def get_config():\n    return None\n",
    "exits": "raise SystemExit(0)\n",
    "indents": "def f():\nreturn 1\n",
}
_ARGUMENTS = (
    "crop", "crop=", "crop=x", "crop=33,crop=49", "=3", ",,", "unknown=1", "crop=1e3", "method=dsn", "split=t", "root=",
    "crop=²", "ignore=a+b", "ignore=-1", "val=2", "val=nan", "names=nothing.txt", "encoder=", "pretrained=nothing.pth",
    "steps=-1",
)  # fmt: skip


def generate(place: Place, rng: random.Random) -> Attack:
    """Makes an odd command line."""
    return rng.choice(
        [_value, _value, _value, _missing, _superfluous, _file, _argument, _keys, _environment, _existing]
    )(place, rng)


def _normal(place: Place, rng: random.Random, *modes: str):
    mode = rng.choice(modes or [*READING, "check", "train"])
    return mode, command(place, mode, place.copy("part" if mode == "train" else "run"))


def _attack(place: Place, name: str, mode: str, argv: list[str], culprits: tuple[str, ...], normal) -> Attack:
    """Makes the attack; a command that is accepted has the normal result."""

    def verify(stdout: str) -> str:
        wrong = normal.verify(stdout)
        return f"accepted: {wrong}" if wrong else ""

    return Attack(name, mode, argv, culprits, normal.outputs, verify)


def _value(place: Place, rng: random.Random) -> Attack:
    flag = rng.choice(sorted(_VALUES))
    mode, normal = _normal(place, rng, *[mode for mode in (*READING, "check", "train") if flag in MODES[mode].flags])
    value = rng.choice(_VALUES[flag])
    argv = [item for item in normal.argv if not item.startswith(f"--{flag}=")] + [f"--{flag}={value}"]
    if flag == "config" and value:
        argv = [item for item in argv if not item.startswith("--config.")]
    attack = _attack(place, f"--{flag}={value[:30]!r}", mode, argv, _names(place, flag, value), normal)
    if flag in ("workdir", "to", "from") and value == "~/x":
        attack.outputs += (place.scratch / "home/x",)
        attack.verify = lambda stdout: "other: in the home"
    elif value in _NAMES and (flag == "to" or (flag, mode) == ("workdir", "train")):
        target = place.scratch / "cwd" / value
        attack.outputs += (target, target.with_name(target.name + ".json"))
        attack.verify = lambda stdout: "other: an odd name" if target.exists() else "not written"
    elif (flag, mode, value) in _LEGAL:
        attack.verify = lambda stdout: "other: legal"
    return attack


def _names(place: Place, flag: str, value: str) -> tuple[str, ...]:
    """Returns what names a value of a flag: the flag, the value or, of a path, the absolute one."""
    path = value.replace("~", str(place.scratch / "home"), 1) if value.startswith("~/") else value
    absolute = (os.path.abspath(place.scratch / "cwd" / path),) if value in _PATHS else ()
    return f"--{flag}", flag, value.strip() or "''", *absolute


_NAMES = ("x\ny", "é\U0001f600", "\x1b[31m", "-", "None")  # Odd names of files and folders.
# (flag, mode, value) with which a command does something else, rightly.
_LEGAL = {("checkpoint", mode, "2") for mode in READING} | {("confidence", "predict", "2")}


def _missing(place: Place, rng: random.Random) -> Attack:
    mode, normal = _normal(place, rng)
    flag = rng.choice(MODES[mode].inputs + MODES[mode].required)
    argv = [item for item in normal.argv if not item.startswith((f"--{flag}=", f"--{flag}."))]
    attack = _attack(place, f"without --{flag}", mode, argv, (f"--{flag}",), normal)
    attack.verify = lambda stdout: "accepted"
    return attack


def _superfluous(place: Place, rng: random.Random) -> Attack:
    mode, normal = _normal(place, rng)
    taken = MODES[mode].flags
    odd = [
        f"--{flag}=1"
        for flag in _VALUES
        if flag not in (*taken, "mode", "config", "processes", "process", "coordinator")
    ]
    odd += [
        "extra",
        "--nonsense=1",
        "-x",
        "--confg=x",
        "--config.no.such=1",
        "--config.data=1",
        "--config.data.crop.x=1",
        "--=1",
        "--noconfig",
    ]
    extra = rng.choice(odd)
    name = extra.lstrip("-").partition("=")[0]
    culprits = (extra, name.removeprefix("config."), name, name.removeprefix("no"))
    attack = _attack(place, f"with {extra}", mode, [*normal.argv, extra], culprits, normal)
    attack.verify = lambda stdout: "accepted"
    return attack


def _file(place: Place, rng: random.Random) -> Attack:
    mode, normal = _normal(place, rng, "check", "train", "eval")
    how, path = rng.choice(sorted(_FILES)), place.scratch / "mine.py"
    path.write_text(_FILES[how])
    argv = [f"--config={path}" if item.startswith("--config=") else item for item in normal.argv]
    if rng.random() < 0.5:
        argv = [item for item in argv if not item.startswith("--config.")]
    attack = _attack(place, f"config file: {how}", mode, argv, ("mine.py",), normal)
    attack.verify = lambda stdout: "accepted"
    return attack


def _argument(place: Place, rng: random.Random) -> Attack:
    mode, normal = _normal(place, rng, "check", "train", "eval")
    text = rng.choice(_ARGUMENTS)
    argv = [f"{item},{text}" if item.startswith("--config=") else item for item in normal.argv]
    name, _, value = text.partition("=")
    attack = _attack(place, f"config argument {text}", mode, argv, (name or text, value or name, repr(text)), normal)
    attack.verify = lambda stdout: (
        normal.verify(stdout) and "other: argument taken" if text in _TAKEN else normal.verify(stdout)
    )
    return attack


_TAKEN = ("crop=33,crop=49", "root=")


def _keys(place: Place, rng: random.Random) -> Attack:
    """Gives a flag twice, or a value by the next argument."""
    mode, normal = _normal(place, rng)
    item = rng.choice([item for item in normal.argv if "=" in item and not item.startswith("--mode")])
    how = rng.choice(["twice", "spaced", "one dash"])
    argv = list(normal.argv)
    at = argv.index(item)
    argv[at : at + 1] = {"twice": [item, item], "spaced": item.split("=", 1), "one dash": [item[1:]]}[how]
    return _attack(place, f"{item.partition('=')[0]} {how}", mode, argv, (item.partition("=")[0].lstrip("-"),), normal)


_ENVIRONMENT = (
    {"SLURM_NTASKS": ""}, {"SLURM_NTASKS": "abc", "SLURM_PROCID": "0"}, {"OMPI_COMM_WORLD_SIZE": ""},
    {"OMPI_COMM_WORLD_SIZE": "x"}, {"SLURM_NTASKS": "-3"}, {"COLUMNS": "-1"}, {"COLUMNS": "abc"},
    {"LC_ALL": "C", "LANG": "C"},
    {"TERM": "nothing"}, {"SLURM_NTASKS": "2.5", "SLURM_PROCID": ""},
)  # fmt: skip


def _environment(place: Place, rng: random.Random) -> Attack:
    mode, normal = _normal(place, rng)
    variables = rng.choice(_ENVIRONMENT)
    attack = _attack(place, f"environment {variables}", mode, normal.argv, tuple(variables), normal)
    attack.environment = variables
    return attack


def _existing(place: Place, rng: random.Random) -> Attack:
    """Outputs where the user has files already, and files of the user beside them with the names of temporary ones."""
    mode, normal = _normal(place, rng, "predict", "export", "report", "convert", "train")
    target = normal.outputs[0] if mode != "train" else place.out / "new"
    how = rng.choice(["a file", "a part", "a link", "a folder"])
    argv = (
        [item for item in normal.argv if not item.startswith("--workdir=")] + [f"--workdir={target}"]
        if mode == "train"
        else normal.argv
    )
    outputs, verify = normal.outputs, normal.verify
    if how == "a part":
        for name in (f".{target.name}.part", f"{target.name}.part", f"{target.name}.tmp"):
            (target.parent / name).write_text("a file of the user\n")
    elif how == "a file":
        target.write_text("a file of the user\n")
    elif how == "a link":
        target.symlink_to(place.out / "mine.txt")
    else:
        mine = target / "mine.txt"
        target.mkdir()
        mine.write_text("a file of the user\n")
        verify = lambda stdout: normal.verify(stdout) if mine.exists() else "removed the user's file"  # noqa: E731
    if how in ("a file", "a link"):
        outputs, verify = normal.outputs[1:], lambda stdout: "accepted"
    elif how == "a folder" and mode in ("export", "report", "convert"):
        outputs, verify = (), lambda stdout: "accepted"
    if mode == "train":
        outputs, verify = (target,) if how in ("a part", "a folder") else (), lambda stdout: place.check_run(target)
        if how == "a folder":
            verify = lambda stdout: place.check_run(target) if mine.exists() else "removed the user's file"  # noqa: E731
    return Attack(f"--to has {how}", mode, argv, (target.name,), outputs, verify)
