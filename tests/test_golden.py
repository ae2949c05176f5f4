"""The golden numbers of the original implementation hold, and a number that does not is noticed."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from tests.golden import check as golden

FOLDER = pathlib.Path(__file__).parent / "data" / "golden"


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=[pytest.mark.slow] * file.startswith("step")) for file in golden.files(FOLDER)],
)
def test_golden_numbers_hold(file):
    lines = []
    with jax.enable_x64(True):
        assert golden.check(FOLDER, file, lines.append), lines


@pytest.mark.parametrize("changed", ["out/fixed_0/loss_u_s2", "out/never_computed"])
def test_a_wrong_or_missing_output_fails(changed, tmp_path):
    stored = dict(np.load(FOLDER / "losses.npz"))
    stored[changed] = stored.get(changed, np.float64(1)) * (1 + 1e-7)
    np.savez(tmp_path / "losses.npz", **stored)
    shutil.copy(FOLDER / "golden.json", tmp_path)
    lines = []
    with jax.enable_x64(True):
        assert not golden.check(tmp_path, "losses.npz", lines.append)
    assert lines[0].startswith("FAILED") and changed in lines[0]
