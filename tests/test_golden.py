"""The golden numbers of the original implementation hold, and a number that does not is noticed."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from tests.golden import check as golden

DATA = pathlib.Path(__file__).parent / "data"
FOLDER = DATA / "golden"


def cases():
    for folder in ("golden", "golden_v2"):
        for file in golden.files(DATA / folder):
            slow = file.startswith(("step", "evaluate")) or "518" in file
            yield pytest.param(folder, file, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("folder", "file"), [*cases()])
def test_golden_numbers_hold(folder, file):
    lines = []
    with jax.enable_x64(True):
        assert golden.check(DATA / folder, file, lines.append), lines


@pytest.mark.parametrize("changed", ["out/fixed_0/loss_u_s2", "out/never_computed"])
def test_a_wrong_or_missing_output_fails(changed, tmp_path):
    with np.load(FOLDER / "losses.npz") as archive:
        stored = dict(archive)
    stored[changed] = stored.get(changed, np.float64(1)) * (1 + 1e-7)
    np.savez(tmp_path / "losses.npz", **stored)
    shutil.copy(FOLDER / "golden.json", tmp_path)
    lines = []
    with jax.enable_x64(True):
        assert not golden.check(tmp_path, "losses.npz", lines.append)
    assert lines[0].startswith("FAILED") and changed in lines[0]
