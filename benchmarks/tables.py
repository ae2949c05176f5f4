"""What the benchmarks share: tables, JSON, the machine in words."""

import json
import os
import pathlib
import platform
from collections.abc import Sequence

from dssn_jax.workdir import files


def show(rows: Sequence[dict], columns: Sequence[str] = ()) -> None:
    """Prints rows as a table, with `columns` first and in this order; what a row lacks stays empty."""
    names = [*columns, *dict.fromkeys(name for row in rows for name in row if name not in columns)]
    cells = [names] + [[_text(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _text(value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(path: pathlib.Path | None, content: dict) -> None:
    """Writes `content` and the machine as JSON, whole or not at all; nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as part:
        part.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")


def machine() -> dict:
    return {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
