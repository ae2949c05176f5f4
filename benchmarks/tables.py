"""Output of the benchmarks: tables, and JSON files with the machine they were measured on."""

import json
import os
import pathlib
import platform
from collections.abc import Sequence

import tabulate

from dssn_jax.workdir import files


def show(rows: Sequence[dict], columns: Sequence[str] = ()) -> None:
    """Prints rows as a table with `columns` first, in this order; missing values stay empty."""
    missing = dict.fromkeys(columns)
    print(tabulate.tabulate([missing | row for row in rows], headers="keys", floatfmt=".4g"), flush=True)


def write(path: pathlib.Path | None, content: dict) -> None:
    """Writes `content` and the machine as JSON, atomically; does nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    with files.atomic_write(path) as part:
        part.write_text(json.dumps({"machine": machine, **content}, indent=2) + "\n")
