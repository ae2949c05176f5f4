"""The loss terms of the step that benchmarks time in PyTorch equal ours."""

import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax.methods import losses, pseudo_labels

torch = pytest.importorskip("torch")
from tests.reference import torch_step  # noqa: E402

RNG = np.random.default_rng(0)
LOGITS = [RNG.normal(0, 4, (4, 9, 8, 5)).astype(np.float32) for _ in range(2)]
LABELS = RNG.integers(0, 5, (4, 9, 8))
VALID = RNG.random((4, 9, 8)) < 0.8
LABELS[~VALID] = 255


def channels_first(array):
    return torch.from_numpy(array).permute(0, 3, 1, 2)


@pytest.mark.parametrize("min_kept", [0, 40, 130])
def test_labeled_terms_agree(min_kept):
    theirs = torch_step.labeled_term(channels_first(LOGITS[0]), torch.from_numpy(LABELS), min_kept)
    loss = losses.Ohem(0.7, min_kept, 2) if min_kept else losses.CrossEntropy()
    assert float(theirs) == pytest.approx(float(loss(jnp.asarray(LOGITS[0]), LABELS)), rel=1e-5)


@pytest.mark.parametrize("selection", [pseudo_labels.ClassAware(), pseudo_labels.Threshold(0.0)])
def test_consistency_agrees(selection):
    view, teacher = map(jnp.asarray, LOGITS)
    select_all = selection == pseudo_labels.Threshold(0.0)
    theirs = torch_step.consistency(*map(channels_first, LOGITS), torch.from_numpy(VALID), select_all)
    ours = losses.consistency(view, *pseudo_labels.pseudo_label(teacher, selection, {}), VALID)
    assert float(theirs) == pytest.approx(float(ours), rel=1e-5)


def test_contrast_agrees():
    theirs = torch_step.contrast(*map(channels_first, LOGITS))
    assert float(theirs) == pytest.approx(float(losses.contrast(*LOGITS)), rel=1e-5)
