"""Attacks on the keys of the configuration: odd values, given on the command line or by a config file."""

import json
import random

import numpy as np
from ml_collections import ConfigDict

from configs import defaults
from tests.attacks.attack import Attack
from tests.attacks.fixtures import Place, arrays
from tests.attacks.modes import command

_TEXTS = (
    "",
    " ",
    "nan",
    "None",
    "\x1b[31mred",
    "é\u202e\U0001f600",
    "a\nb",
    "x" * 5000,
    "../..",
    "/",
    "~",
    "<b>",
    "-",
    "0",
)
_VALUES = {
    int: ("-1", "0", "2147483648", str(2**70), str(-(2**63) - 1), "nan", "inf", "1.5", "abc", "", "(1,2)", "True"),
    float: ("-1", "0", "-0.0", "2", "nan", "inf", "-inf", "1e30", "1e400", "abc", "", "(0.5,)", "None", "True"),
    bool: ("maybe", "2", "", "nan", "None", "-1"),
    str: (*_TEXTS, "http://x", "a://b", "gs://"),
    tuple: (
        "()", "(1,)", "(1,2,3,4,5)", "(nan,nan)", "(float('inf'),1e400)", "(-1,-2)", "(2,1)", "('a','b')", "abc",
        "((),)", "(1e30,1e31)", "(None,None)", "[1,2]", "{}", "1", "(0,0)", "(0,0,0)", "(True,False)", "(1,1e6)", "",
    ),
}  # fmt: skip
# Values as a config file may give them, in Python.
_OBJECTS = (
    "None", "-1", "0", "2**70", "float('nan')", "float('inf')", "''", "'x'", "()", "(1,)", "[]", "{}", "object()",
    "b'x'", "True", "1.5", "lambda: 0", "(1, 'a', None)", "range(3)", "'\\x00'", "'\\ud800'",
)  # fmt: skip
# Keys that may change the scores of a run that is there: how, and on which images.
_OF_EVALUATION = ("config.eval.", "config.data.folders.val", "config.data.val_overlap", "config.data.ignore")


def flat(config: ConfigDict, prefix: str = "config") -> dict[str, object]:
    """Returns every key with its default, such as "config.data.crop"."""
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}.{key}") if isinstance(value, ConfigDict) else {f"{prefix}.{key}": value}
    return found


_KEYS = flat(defaults.get_config())


def generate(place: Place, rng: random.Random) -> Attack:
    """Sets a key to an odd value."""
    key = rng.choice(sorted(_KEYS))
    mode = rng.choice(["check", "check", "check", "eval", "eval", "train"])
    workdir = place.copy("run") if mode == "eval" else place.out / "new"
    # No unlabeled stream where that makes no difference: its programs take long to compile.
    method = "unimatch" if mode == "train" and key.startswith(("config.views", "config.ema", "config.method")) else ""
    normal = command(place, mode, workdir)
    argv = place.config(**({"method": method} if method else {}), train__steps=1)
    argv = [f"--mode={mode}", *argv, *([] if mode == "check" else [f"--workdir={workdir}"])]
    if rng.random() < 0.2:
        value = rng.choice(_OBJECTS)
        argv[1:2] = [_config_file(place, argv[1], key, value)]
    else:
        value = rng.choice(_VALUES[type(_KEYS[key])])
        argv = [item for item in argv if not item.startswith(f"--{key}=")] + [f"--{key}={value}"]

    def verify(stdout: str) -> str:
        if mode == "check":
            return "other: accepted" if not _is_absurd(value) or not _is_number(key) else "accepted"
        return _verify_run(workdir, key, value) if mode == "train" else _verify_scores(normal, key, stdout)

    culprits = (key, key.removeprefix("config."), "mine.py")
    if isinstance(_KEYS[key], str) and value.strip():
        culprits += (value, repr(value)[1:-1])  # A file or a name that does not exist.
    return Attack(f"{key}={value[:40]!r}", mode, argv, culprits, (*normal.outputs, workdir), verify)


def _config_file(place: Place, flag: str, key: str, value: str) -> str:
    """Writes a config file that sets a key of another one to a Python value; returns its flag."""
    path, _, argument = flag.removeprefix("--config=").partition(":")
    section, _, name = key.rpartition(".")
    text = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("base", {path!r})
base = importlib.util.module_from_spec(spec)
spec.loader.exec_module(base)
def get_config(argument=None):
    config = base.get_config({argument!r})
    with config.ignore_type():
        {section}.{name} = {value}
    return config
"""
    file = place.scratch / "mine.py"
    file.write_text(text)
    return f"--config={file}"


def _is_number(key: str) -> bool:
    return isinstance(_KEYS[key], int | float | tuple)


def _is_absurd(value: str) -> bool:
    """Returns whether no key of numbers can have the value."""
    return any(text in value.lower() for text in ("nan", "abc", "inf", "1e400", "none", "lambda", "object"))


def _verify_run(workdir, key: str, value: str) -> str:
    """Checks what was trained with an odd value that was accepted: finite, and with that value."""
    json.loads((workdir / "summary.json").read_text(), parse_constant=_refuse)
    config = json.loads((workdir / "config.json").read_text(), parse_constant=_refuse)
    if _is_absurd(value) and _is_number(key):
        return f"trained with {key}={value}: config.json has {_get(config, key)!r}"
    if not all(np.isfinite(array).all() for array in arrays(workdir).values() if array.dtype.kind == "f"):
        return "the weights are not finite"
    return f"other: trained with {_get(config, key)!r}"


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")


def _get(config: dict, key: str):
    for name in key.split(".")[1:]:
        config = config[name]
    return config


def _verify_scores(normal, key: str, stdout: str) -> str:
    wrong = normal.verify(stdout)
    if wrong and (key.startswith(_OF_EVALUATION) or key.removeprefix("config.") in stdout):
        return f"other: evaluated otherwise ({wrong})"
    return f"{wrong}, without a word about {key}" if wrong else ""
