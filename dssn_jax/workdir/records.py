"""The JSON files of a work directory.

`metrics.jsonl` has one line per log line and per evaluation: {"step", "seconds" (of training so far), ...}; those of
evaluations hold, per network, each metric of the evaluation ("miou_student", ...) and the IoU of each class
("iou_student", a list in the order of the classes), in percent. Log lines hold the share of pixels that are
pseudo-labeled as each class ("pseudo_labels"), likewise. `confusion.json` has the confusion matrices of the last
evaluation, rows true classes: {"step", NETWORK: [K][K]}.
"""

import contextlib
import json
import os

from etils import epath

from configs import checks, defaults
from dssn_jax import distributed
from dssn_jax.workdir import files
from dssn_jax.workdir.logs import logger
from input_pipeline.errors import DataError, UserError

CONFIG = "config.json"
RUN = "run.json"  # `dssn_jax.training.run.run_info`.
METRICS = "metrics.jsonl"
CONFUSION = "confusion.json"
SUMMARY = "summary.json"


class WorkdirError(UserError):
    """A folder that is no work directory of a run, or is damaged; the message names it and what is expected."""


def write_json(path: epath.Path, content: dict) -> None:
    """Writes `content` atomically; the first process does."""
    if not distributed.is_first():
        return
    with files.atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def read_json(workdir: epath.PathLike, name: str) -> dict:
    """Returns the content of a JSON file of `workdir`; raises WorkdirError."""
    path = epath.Path(workdir) / name
    if not epath.Path(workdir).is_dir():
        raise WorkdirError(f"{workdir}: no such folder; expected the work directory of a training run")
    if os.path.islink(path) and not path.exists():
        raise WorkdirError(f"{path}: a broken link; expected a file")
    if not path.exists():
        raise WorkdirError(f"{workdir}: no {name} in it; expected the work directory of a training run")
    try:
        content = json.loads(files.read_bytes(path))
    except DataError as error:
        raise WorkdirError(str(error)) from None
    except (ValueError, RecursionError) as error:  # Not UTF-8, not JSON, or nested without end.
        raise WorkdirError(f"{path}: damaged, not JSON: {error}") from None
    if not isinstance(content, dict):
        raise WorkdirError(f"{path}: holds a {type(content).__name__}; expected a JSON object")
    return content


def read_config(workdir: epath.PathLike):
    """Returns the configuration of a run, with defaults for keys that are newer than the run; raises WorkdirError."""
    try:
        config = with_defaults(read_json(workdir, CONFIG))
        checks.check_values(config)
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError, checks.ConfigError) as error:
        raise WorkdirError(f"{epath.Path(workdir) / CONFIG}: not a configuration of this program: {error}") from None
    return config


def check_unfinished(workdir: epath.PathLike) -> None:
    """Raises WorkdirError if `workdir`, which has no checkpoint, holds the summary of a finished run."""
    path = epath.Path(workdir) / SUMMARY
    if path.exists():
        raise WorkdirError(f"{path}: of a finished run, whose checkpoints are gone; remove it to start the run again")


def summary_of(workdir: epath.PathLike, steps: int) -> dict | None:
    """Returns the summary of a run of `steps` that finished; None if there is none, or a damaged one."""
    with contextlib.suppress(WorkdirError):
        summary = read_json(workdir, SUMMARY)
        return summary if summary.get("steps") == steps else None


def with_defaults(saved: dict):
    """Returns the configuration that was saved as JSON, with defaults for keys that are newer than it."""
    config = defaults.get_config()
    config.update(saved)  # Lists become tuples again.
    return config


def read_metrics(workdir: epath.PathLike) -> list[dict]:
    """Returns the lines of `metrics.jsonl`, which may be missing, or its last line cut short by a kill.

    Other lines that are damaged are left out; a warning counts them.
    """
    path = epath.Path(workdir) / METRICS
    if not path.exists():
        return []
    *lines, last = files.read_bytes(path).split(b"\n")
    if not b"{".startswith(last[:1]):  # Not the beginning of a line.
        lines.append(last)
    parsed = [values for line in lines if (values := _parse(line)) is not None]
    if len(parsed) < len(lines):
        logger.warning("left out: %s: %d damaged of %d lines", path, len(lines) - len(parsed), len(lines))
    return parsed


def _parse(line: bytes) -> dict | None:
    """Returns a line of `metrics.jsonl`, or None if it is none that `Recorder` writes."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):  # Not UTF-8, not JSON.
        return None
    is_record = isinstance(values, dict) and type(values.get("step")) is int and _is_number(values.get("seconds"))
    return values if is_record and all(map(_is_record_value, values.values())) else None


def _is_record_value(value) -> bool:
    return _is_number(value) or (isinstance(value, list) and all(map(_is_number, value)))


def _is_number(value) -> bool:
    return type(value) in (int, float)
