"""An attack, what came of it, and the definition of a good outcome, which is the same for all of them.

Good is exit 0 with the right result, or another exit with one line "error: ..." on standard error that names the
culprit. Never good: a traceback, a crash, a hang, more memory than a limit, another result than that of the untouched
run, processes that are left, and a file of the user that changed.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import signal
import stat
from collections.abc import Callable, Mapping

LONGEST_LINE = 4000  # Characters of an error.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclasses.dataclass
class Attack:
    """One command line in a prepared folder."""

    name: str  # The attacked input and its change, such as "config.data.crop=-1".
    mode: str
    argv: list[str]
    culprits: tuple[str, ...]  # An error must contain one of them.
    outputs: tuple[pathlib.Path, ...] = ()  # Files and folders that the command may write.
    # Called after exit 0 with the standard output: "" if the result is that of the untouched run; "other: REASON" if it
    # differs and may; else what is wrong with it.
    verify: Callable[[str], str] = lambda stdout: ""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    execute: Callable[[], "Outcome"] | None = None  # Does everything itself, in place of running `argv`.


@dataclasses.dataclass
class Outcome:
    """Verdict on an attack."""

    good: bool
    text: str  # One line.


@dataclasses.dataclass
class Result:
    """Exit code and output of a command, and what it changed."""

    code: int | None  # None: it raised.
    stdout: str
    stderr: str
    raised: str = ""  # The last line of the traceback.
    changed: tuple[str, ...] = ()  # Files that it changed, added or removed beside the declared outputs.


def judge(attack: Attack, result: Result) -> Outcome:
    """Returns whether the outcome of an attack is good."""
    if result.code is None:
        return Outcome(False, f"traceback: {result.raised}")
    if "Traceback (most recent call last)" in result.stderr + result.stdout:
        return Outcome(False, f"traceback printed: {_last_line(result.stderr or result.stdout)}")
    if result.changed:
        return Outcome(False, f"changed the user's {', '.join(result.changed[:3])}")
    if result.code == 0:
        return _judge_result(attack, result.stdout)
    if result.code == 128 + signal.SIGTERM and attack.mode == "train" and "the same command continues" in result.stderr:
        return Outcome(True, "trained until the harness stopped it")
    # --mode=check lists all problems on standard output; its error counts them.
    listed = result.stdout if attack.mode == "check" else ""
    return judge_error(result.code, result.stderr, attack.culprits, listed)


def _judge_result(attack: Attack, stdout: str) -> Outcome:
    verdict = attack.verify(stdout)
    if not verdict:
        return Outcome(True, "exit 0: result as without the attack")
    return Outcome(verdict.startswith("other: "), f"exit 0: {verdict}")


def judge_error(code: int, stderr: str, culprits: tuple[str, ...], listed: str = "") -> Outcome:
    """Returns whether an exit other than 0 is explained by one line that names a culprit, there or in `listed`."""
    lines = [line for line in re.split(r"\r?\n", stderr) if line.strip()]
    text = f"exit {code}: {lines[0] if lines else ''}"
    if len(lines) != 1:
        return Outcome(False, f"{len(lines)} lines on standard error, not one; {text}")
    if not re.match(r"error: \S", lines[0]):
        return Outcome(False, f"no line `error: ...`; {text}")
    if _CONTROL.search(lines[0]):
        return Outcome(False, f"control characters in the line; {text}")
    if len(lines[0]) > LONGEST_LINE:
        return Outcome(False, f"a line of {len(lines[0])} characters; {text[:200]}")
    if not any(culprit in lines[0] or culprit in listed for culprit in culprits):
        return Outcome(False, f"names none of {', '.join(culprits[:4])}; {text}")
    return Outcome(True, text)


def _last_line(text: str) -> str:
    return ([line for line in text.splitlines() if line.strip()] or [""])[-1]


def snapshot(folder: pathlib.Path, outputs: tuple[pathlib.Path, ...]) -> dict[str, str]:
    """Returns a digest of every file, link and folder below `folder` that is in none of `outputs`, by relative path."""
    digests = {}
    skipped = {os.fspath(path) for path in outputs}
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in sorted(folders) if os.path.join(where, name) not in skipped]
        for name in [*folders, *files]:
            path = os.path.join(where, name)
            if path not in skipped:
                digests[os.path.relpath(path, folder)] = _digest(path)
    return digests


def _digest(path: str) -> str:
    kind = os.lstat(path).st_mode
    if stat.S_ISLNK(kind):
        return f"link to {os.readlink(path)}"
    if not stat.S_ISREG(kind):
        return f"kind {stat.S_IFMT(kind)}"
    if os.path.getsize(path) > 1 << 26:  # Sparse files.
        return f"{os.path.getsize(path)} bytes"
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read()).hexdigest()


def changes(before: dict[str, str], after: dict[str, str]) -> tuple[str, ...]:
    """Lists what differs between two snapshots."""
    return tuple(
        f"{path!r} ({'removed' if path not in after else 'added' if path not in before else 'changed'})"
        for path in sorted({*before, *after})
        if before.get(path) != after.get(path)
    )
