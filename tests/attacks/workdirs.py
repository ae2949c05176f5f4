"""Attacks on the files of a work directory, read and continued by every mode."""

import pathlib
import random
import shutil

from tests.attacks import damage
from tests.attacks.attack import Attack
from tests.attacks.fixtures import Place
from tests.attacks.modes import READING, command

# Records of what happened, which nothing but the report reads. It shows what they hold, and does without them.
_RECORDS = ("metrics.jsonl", "confusion.json", "run.json", "summary.json", "log.txt", "tensorboard")
_TOLERATED = ("deleted", "empty", "truncated", "bit flipped", "zeroed", "other run's", "appended to")


def targets(workdir: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """Returns the files and the folders of a run with names that do not depend on how orbax drew its own."""
    named, counts = [], {}
    key = lambda path: (path.parent, path.suffix, path.name if len(path.name) < 30 else "", path.lstat().st_size)  # noqa: E731
    for path in sorted(workdir.rglob("*"), key=key):
        name = str(path.relative_to(workdir))
        if len(path.name) >= 30 or path.name.startswith("events."):
            where = path.parent.relative_to(workdir)
            counts[where] = counts.get(where, 0) + 1
            name = f"{where}/#{counts[where]}"
        named.append((name, path))
    return named


def generate(place: Place, rng: random.Random) -> Attack:
    """Damages a file or folder of a run."""
    mode = rng.choice([*READING, "train"])
    workdir = place.copy("part" if mode == "train" else "run")
    name, path = rng.choice(targets(workdir))
    how = rng.choice(_ways(path))
    _apply(how, path, place.fixtures / "other", workdir, rng)
    normal = command(place, mode, workdir)
    step = path.relative_to(workdir).parts[1:2] if name.startswith("checkpoints/") else ()
    culprits = (path.name, *(f"checkpoints/{number}" for number in step))
    if name == "checkpoints" or len(path.relative_to(workdir).parts) == 2:
        culprits += (
            "/checkpoints: no checkpoint in it",
            f"{workdir} was trained with another",
            f"{workdir} holds another run",
        )

    def verify(stdout: str) -> str:
        wrong = normal.verify(stdout)
        is_record = path.relative_to(workdir).parts[0] in _RECORDS
        if wrong and mode == "report" and is_record and (how in _TOLERATED or f"left out: {path}" in stdout):
            return f"other: the report shows the records that there are ({wrong})"
        if wrong and mode == "train" and path.name == "metrics.jsonl" and wrong.startswith("losses differ"):
            return f"other: {wrong} in the records, not in the state"
        return wrong

    return Attack(f"{name} {how}", mode, normal.argv, culprits, normal.outputs, verify)


def _ways(path: pathlib.Path) -> list[str]:
    if path.is_dir():
        return ["deleted", "emptied", "a file", "other run's", "renamed", "copied beside"]
    ways = [*damage.BYTES, *damage.KINDS, "other run's"]
    if path.suffix in (".json", ".jsonl") or path.name in ("metadata", "_METADATA", "_CHECKPOINT_METADATA"):
        ways += ["other JSON", "other JSON", "other value", "other value"]
    if path.suffix in (".jsonl", ".txt"):
        ways += ["appended to"] * 2
    return ways


def _apply(how: str, path: pathlib.Path, other: pathlib.Path, workdir: pathlib.Path, rng: random.Random) -> None:
    change = damage.BYTES.get(how) or damage.KINDS.get(how) or _JSON.get(how)
    if change:
        change(path, rng)
    elif how == "emptied":
        for child in list(path.iterdir()):
            damage.delete(child, rng)
    elif how == "a file":
        damage.delete(path, rng)
        path.write_text("text\n")
    elif how == "renamed":
        path.rename(path.with_name({"2": "1", "4": "3", "3": "7"}.get(path.name, f"{path.name}_")))
    elif how == "copied beside":
        shutil.copytree(path, path.with_name({"2": "9", "4": "9", "3": "9"}.get(path.name, f"{path.name}_copy")))
    elif how == "other run's":
        _replace(path, other, workdir, rng)


_JSON = {"other JSON": damage.other_json, "other value": damage.other_value, "appended to": damage.append_noise}


def _replace(path: pathlib.Path, other: pathlib.Path, workdir: pathlib.Path, rng: random.Random) -> None:
    """Replaces a file or folder by that of the same name in another run; the latest there, if the step differs."""
    names = dict(targets(workdir)), dict(targets(other))
    name = next(name for name, each in names[0].items() if each == path)
    source = names[1].get(name)
    if source is None:
        candidates = [each for each in names[1].values() if each.name == path.name and each.is_dir() == path.is_dir()]
        source = candidates[-1] if candidates else other / "config.json"
    damage.delete(path, rng)
    shutil.copytree(source, path) if source.is_dir() else shutil.copy2(source, path)
