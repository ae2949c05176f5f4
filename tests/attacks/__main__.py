"""Attacks the program at random: `python -m tests.attacks --seed N --count M [--kinds KIND,KIND] [--keep DIR]`.

Prints a table (attack, mode, outcome, seconds) and a summary; exits with 1 if an outcome is bad. The same seed makes
the same attacks. `--index I` runs one of them alone; `--keep DIR` keeps the folders of those that went wrong.
"""

import argparse
import collections
import os
import pathlib
import sys
import time

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent.parent / ".jax_cache"))

from tabulate import tabulate

from tests.attacks import harness

KINDS = ("keys", "workdir", "data", "weights", "flags", "disks", "signals", "processes")


def _line(row: harness.Row) -> str:
    mark = "good" if row.good else "BAD "
    return f"{row.index:5d} {mark} {row.seconds:6.1f} s  {row.kind}: {row.name} [{row.mode}]: {row.text}"


def summary(rows: list[harness.Row]) -> str:
    """Returns a table of good and bad outcomes per kind, and the seconds that they took."""
    kinds = collections.Counter(row.kind for row in rows)
    table = [
        [kind, count, sum(not row.good for row in rows if row.kind == kind),
         round(sum(row.seconds for row in rows if row.kind == kind), 1)]
        for kind, count in sorted(kinds.items())
    ]  # fmt: skip
    bad = sum(not row.good for row in rows)
    table.append(["all", len(rows), bad, round(sum(row.seconds for row in rows), 1)])
    return tabulate(table, headers=["kind", "attacks", "bad", "seconds"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--index", type=int, help="run this attack alone")
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas (default: all)")
    parser.add_argument("--keep", type=pathlib.Path, help="folder that keeps the files of bad outcomes")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    if set(kinds) - set(KINDS):
        parser.error(f"unknown kind; known: {', '.join(KINDS)}")
    indices = range(arguments.count) if arguments.index is None else [arguments.index]
    started, rows = time.monotonic(), []
    for row in harness.run(arguments.seed, indices, kinds, arguments.workers, arguments.keep):
        print(_line(row), flush=True)
        rows.append(row)
    print(f"\n{summary(rows)}\n")
    bad = sorted(row for row in rows if not row.good)
    if bad:
        print("\n".join(["bad:", *map(_line, bad)]))
    print(f"{len(rows)} attacks, {len(bad)} bad outcomes, {time.monotonic() - started:.0f} s; seed {arguments.seed}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
