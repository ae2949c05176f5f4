"""Checks a folder of golden numbers: `python -m tests.golden DIR`.

DIR holds `golden.json`, which lists cases, and one .npz a case. Prints a line for each case and exits with 1 if an
error is over the tolerance. Everything is float64.
"""

import argparse
import os
import pathlib
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    if not (folder / "golden.json").is_file():
        print(f"{folder / 'golden.json'}: no such file", file=sys.stderr)
        return 2
    os.environ["JAX_ENABLE_X64"] = "1"  # Before the first import of JAX.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tests.golden import check

    passed = [check.check(folder, file, lambda line: print(line, flush=True)) for file in check.files(folder)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
