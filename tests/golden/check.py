"""Compares what this implementation computes for a golden case with the stored numbers."""

import json
import os
import pathlib

import numpy as np

from tests.golden import dssn, vits
from tests.golden.case import Case

KINDS = {dssn.Case: dssn.KINDS, vits.Case: vits.KINDS}
# Stored, but no outputs: arguments of losses; masks, boxes and factors of steps; masks and shapes of evaluations.
GIVEN = {
    "step": ("mask_x", "ignore", "ignore_mix", "box1", "box2", "channel_mask1"),
    "evaluate": ("mask", "shape"),
}


def tolerance(kind: str, name: str) -> float:
    """Returns the largest accepted relative error of an array. Errors grow a thousandfold with each step."""
    return 1e-6 if kind == "step" and not name.startswith("step0/") else 1e-9


def is_output(kind: str, name: str) -> bool:
    """Returns whether a stored array is an output, not an input."""
    return not (name.startswith("in/") or name == "input_shape" or name.rsplit("/", 1)[-1] in GIVEN.get(kind, ()))


def relative_error(value, expected) -> float:
    """Largest absolute difference over the largest absolute expected value; inf for another shape or a NaN."""
    value, expected = np.asarray(value), np.asarray(expected)
    if value.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind in "bui":
        return 0.0 if np.array_equal(value, expected) else float("inf")
    error = np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-12)
    return float("inf") if np.isnan(error) else float(error)


def check(folder: str | os.PathLike, file: str, report=print) -> bool:
    """Checks one case and reports the error that is largest for its tolerance; returns whether it is within it."""
    case = load(folder, file)
    kind = case.entry["kind"]
    outputs = KINDS[type(case)][kind](case)
    errors = {
        name: relative_error(outputs[name], value) if name in outputs else float("inf")
        for name, value in case.stored.items()
        if is_output(kind, name)
    }
    worst = max(errors, key=lambda name: errors[name] / tolerance(kind, name))
    allowed = tolerance(kind, worst)
    passed = errors[worst] <= allowed
    verdict = "ok    " if passed else "FAILED"
    report(f"{verdict} {file:36s} {len(errors):4d} arrays, error {errors[worst]:.1e} <= {allowed:.0e} ({worst})")
    return passed


def load(folder: str | os.PathLike, file: str) -> Case:
    """Returns a case; DSSN's name a backbone, the others an encoder."""
    folder = pathlib.Path(folder)
    manifest = _manifest(folder)
    entry = next(entry for entry in manifest["cases"] if entry["file"] == file)
    return (vits.Case if "encoder" in entry else dssn.Case)(folder, manifest, entry)


def files(folder: str | os.PathLike) -> list[str]:
    """Returns the files of the cases of a folder."""
    return [entry["file"] for entry in _manifest(pathlib.Path(folder))["cases"]]


def _manifest(folder: pathlib.Path) -> dict:
    return json.loads((folder / "golden.json").read_text())
