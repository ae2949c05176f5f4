"""Checks of configuration keys and names that need no JAX, so that a mistyped command line is answered at once."""

import importlib.util
import os
import pathlib
from collections.abc import Collection, Iterable

from configs.defaults import KEYS
from configs.kinds import STORAGE, Choice, Path, Section, show
from input_pipeline.errors import UserError, did_you_mean


class ConfigError(UserError):
    """A configuration or command line that cannot be run.

    The message names the key, its value and what is known or expected. It is no ValueError, which ml_collections turns
    into a traceback when a config file raises it.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'A' or 'B'? known: ..." for an unknown name."""
    known = [str(each) for each in known]
    return f"{did_you_mean(str(name), known) or ';'} known: {', '.join(known)}"


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raises ConfigError if `value` is not one of `known`; `what` names it in the message."""
    known = list(known)
    if value not in known:
        raise ConfigError(f"unknown {what} {show(value)}{suggest(value, known)}")


def check_values(config, keys: Section = KEYS, path: str = "config") -> None:
    """Raises ConfigError for the first value of `config` (section `path`) that is not of the kind of its key."""
    if not hasattr(config, "keys"):
        raise ConfigError(f"{path} is {show(config)}; expected a section with the keys {', '.join(keys)}")
    for name in sorted({*config} - {*keys}):
        raise ConfigError(f"unknown config key {f'{path}.{name}'!r}{suggest(name, keys)}")
    for name, key in keys.items():
        if name not in config:
            raise ConfigError(f"{path}.{name} is missing; configurations start from configs.defaults.get_config()")
        value = config[name]
        if isinstance(key, Section):
            check_values(value, key, f"{path}.{name}")
        elif not key.kind.accepts(value):
            is_name = isinstance(key.kind, Choice) and isinstance(value, str)
            near = did_you_mean(value, map(str, key.kind.names)) if is_name else ""
            raise ConfigError(f"{path}.{name} is {show(value)}; expected {key.kind}{near}")


def check_multiple(key: str, side: int, multiple: int, encoder: str) -> None:
    """Raises ConfigError, with the nearest that fit, if `side` (the value of `key`, pixels) is no multiple."""
    if side % multiple:
        below = side // multiple * multiple
        nearest = " or ".join(str(each) for each in (below, below + multiple) if each)
        raise ConfigError(f"{key} is {side}; {encoder} needs a multiple of {multiple}: {nearest}")


def check_path(flag: str, path: str) -> str:
    """Returns the value of a flag with ~ expanded; raises ConfigError for one that names no path."""
    kind = Path(STORAGE)
    if not path.strip() or not kind.accepts(path):
        raise ConfigError(f"{flag}={show(path)}: expected {kind}")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{flag}={show(path)}: there is no such user; ./~ begins a path of that name")
    check_storage(expanded)
    return expanded


def check_storage(path: str) -> None:
    """Raises ConfigError if `path` is on a bucket and the package that reads buckets is not installed."""
    if "://" in path and importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f'{path} is on a bucket, which needs gcsfs: pip install "dssn-jax[gcs]" or pip install gcsfs')


def shorten(message, most: int = 300) -> str:
    """Returns a message of another library in one line of at most `most` characters."""
    text = " ".join(str(message).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check_output_file(path: pathlib.Path, mark: str) -> None:
    """Raises ConfigError if `path`, the flag --to, is in no folder, or exists without `mark` near its beginning.

    Files that this program writes have a mark, and only those may be replaced.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"--to={path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ConfigError(f"--to={path}: is a folder; expected a file")
    if path.exists():
        with path.open("rb") as file:
            if mark.encode() not in file.read(1024):
                raise ConfigError(f"--to={path}: exists already, and holds no earlier {mark}; expected a new file")


def check_keys(arguments: Iterable[str], defaults) -> None:
    """Raises ConfigError for the first override `--config.KEY=...` in `arguments` whose key is not in `defaults`."""
    for argument in arguments:
        if not argument.startswith("--config."):
            continue
        section, path = defaults, argument.removeprefix("--config.").partition("=")[0]
        for depth, key in enumerate(path.split(".")):
            if not hasattr(section, "keys") or key not in section:
                known = section.keys() if hasattr(section, "keys") else ()
                parent = ".".join(["config", *path.split(".")[:depth]])
                raise ConfigError(f"unknown config key {path!r}: {parent} has no {key!r}{suggest(key, known)}")
            section = section[key]


def unreadable_config_file(path: str) -> str:
    """Returns the error message for a config file that cannot be read, with the known files of `configs/`."""
    folder = pathlib.Path(__file__).parent
    known = sorted(
        f"configs/{file.name}" for file in folder.glob("*.py") if "\ndef get_config(argument" in file.read_text()
    )
    return f"config file {show(path)} cannot be read{suggest(path, known)}"


def differences(old: dict, new: dict, ignore: Collection[str] = (), section: str = "config") -> list[str]:
    """Lists the keys in which two configurations (nested dicts) differ, such as "config.seed: 0, now 1".

    `ignore` holds keys, or sections of keys, to leave out, such as "seed" or "data.shapes".
    """
    changes = []
    for key in sorted({*old, *new}):
        path, before, after = f"{section}.{key}", old.get(key), new.get(key)
        if path.removeprefix("config.") in ignore:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differences(before, after, ignore, path)
        elif before != after:
            changes.append(f"{path}: {before!r}, now {after!r}")
    return changes


# Keys that say where the data are, how fast they are read and what is logged or saved. No score depends on them.
_WITHOUT_EFFECT = (
    "name", "data.root", "data.val_overlap", "data.tfds.data_dir", "data.workers", "data.threads", "data.buffer",
    "method.reason", "model.remat", "train.resume", "train.log_every", "train.checkpoint_every", "train.pictures",
)  # fmt: skip
# Keys, or sections of keys, that may also change between a stop and the next start of the same run: no training step
# depends on them, or they name the data, whose lists are compared.
_MAY_CHANGE = (
    *_WITHOUT_EFFECT, "data.source", "data.splits", "data.split", "data.folders", "model.pretrained",
    "train.eval_every", "train.epochs", "train.steps", "eval",
)  # fmt: skip


def inexact_changes(old: dict, new: dict) -> list[str]:
    """Lists the differences of two configurations after which a run would not continue exactly."""
    return differences(old, new, ignore=_MAY_CHANGE)


def score_changes(old: dict, new: dict) -> list[str]:
    """Lists the differences of two configurations that may change the scores of a run."""
    return differences(old, new, ignore=_WITHOUT_EFFECT)
