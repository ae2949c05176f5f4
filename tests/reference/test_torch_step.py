"""The step that benchmarks time in PyTorch does our work: its loss terms are ours."""

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
    found = torch_step.labeled_term(channels_first(LOGITS[0]), torch.from_numpy(LABELS), min_kept)
    expected = losses.cross_entropy(LOGITS[0], LABELS)
    if min_kept:
        expected = losses.ohem_cross_entropy(jnp.asarray(LOGITS[0]), LABELS, 0.7, min_kept, 2)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("selection", [pseudo_labels.ClassAware(), pseudo_labels.Threshold(0.0)])
def test_terms_of_views_agree(selection):
    view, labeler = LOGITS
    select_all = selection == pseudo_labels.Threshold(0.0)
    found = torch_step.consistency(*map(channels_first, LOGITS), torch.from_numpy(VALID), select_all)
    expected = losses.consistency(view, *pseudo_labels.pseudo_label(jnp.asarray(labeler), selection), VALID)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    found = torch_step.contrast(*map(channels_first, LOGITS))
    assert float(found) == pytest.approx(float(losses.contrast(*LOGITS)), rel=1e-5)
