"""The golden numbers of the original implementation hold, and the checker notices when they do not."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from tests import golden

FOLDER = pathlib.Path(__file__).parent / "data" / "golden"


# `python -m tests.golden tests/data/golden` checks this one too, which takes as long as that of VOC.
LONG = "step_cityscapes_resnet50.npz"


@pytest.mark.parametrize("file", [file for file in golden.files(FOLDER) if file != LONG])
def test_golden_numbers_hold(file):
    lines = []
    with jax.enable_x64(True):
        assert golden.check(FOLDER, file, lines.append), lines


def test_a_changed_number_is_noticed(tmp_path):
    stored = dict(np.load(FOLDER / "losses.npz"))
    stored["out/fixed_0/loss_u_s2"] = stored["out/fixed_0/loss_u_s2"] * (1 + 1e-7)
    np.savez(tmp_path / "losses.npz", **stored)
    shutil.copy(FOLDER / "golden.json", tmp_path)
    lines = []
    with jax.enable_x64(True):
        assert not golden.check(tmp_path, "losses.npz", lines.append)
    assert lines[0].startswith("FAILED") and "out/fixed_0/loss_u_s2" in lines[0]


def test_an_output_that_is_not_computed_is_noticed(tmp_path):
    stored = dict(np.load(FOLDER / "losses.npz"))
    np.savez(tmp_path / "losses.npz", **stored, **{"out/unheard_of": np.float64(1)})
    manifest = json.loads((FOLDER / "golden.json").read_text())
    (tmp_path / "golden.json").write_text(json.dumps(manifest))
    with jax.enable_x64(True):
        assert not golden.check(tmp_path, "losses.npz", print)
