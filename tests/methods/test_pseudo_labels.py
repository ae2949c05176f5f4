import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax import sharding
from dssn_jax.methods import pseudo_labels

LOGITS = np.random.default_rng(0).normal(0, 2, (4, 6, 5, 3)).astype(np.float32)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_class_aware_selection_by_hand():
    p = softmax(3 * LOGITS)
    p[1] = softmax(0.1 * LOGITS[1])  # Unsure everywhere: selects nothing.
    expected = np.zeros(p.shape[:3], bool)
    for image in range(len(p)):
        for k in range(p.shape[-1]):
            largest = p[image, ..., k].max()
            gamma = 0.96 * largest if largest > 0.92 else largest
            expected[image] |= p[image, ..., k] > gamma
    weight = pseudo_labels.ClassAware()(jnp.asarray(p), {})
    assert weight.dtype == jnp.float32
    np.testing.assert_array_equal(weight, expected)
    assert expected.any() and not expected[1].any()


def test_threshold_selection():
    p = jnp.asarray(softmax(LOGITS))
    np.testing.assert_array_equal(pseudo_labels.Threshold(0.8)(p, {}), np.asarray(p).max(-1) >= 0.8)
    assert pseudo_labels.Threshold(0.0)(p, {}).all()


def running(selection, updates):
    """Returns the state after logits [U, h, w, K] with masks of valid pixels."""
    state = selection.init(3)
    for logits, valid in updates:
        state = selection.update(state, jnp.asarray(logits), jnp.asarray(valid))
    return state


RNG = np.random.default_rng(1)
UPDATES = [(RNG.normal(0, 3, (4, 6, 5, 3)).astype(np.float32), RNG.random((4, 6, 5)) < 0.7) for _ in range(3)]


def test_adaptive_selection_by_hand():
    """Eq. 19, after three updates from 1 / K; pixels that are not valid do not count."""
    tau, classes = 1 / 3, np.full(3, 1 / 3)
    for logits, valid in UPDATES:
        q = softmax(logits)[valid]
        tau = 0.9 * tau + 0.1 * q.max(-1).mean()
        classes = 0.9 * classes + 0.1 * q.mean(0)
    selection = pseudo_labels.Adaptive(0.9)
    state = running(selection, UPDATES)
    np.testing.assert_allclose(state["confidence"], tau, rtol=1e-5)
    np.testing.assert_allclose(state["classes"], classes, rtol=1e-5)
    assert state["confidence"].dtype == state["classes"].dtype == jnp.float32
    p = softmax(0.3 * LOGITS)
    thresholds = classes / classes.max() * tau
    expected = np.array([pixel.max() >= thresholds[pixel.argmax()] for pixel in p.reshape(-1, 3)]).reshape(p.shape[:3])
    np.testing.assert_array_equal(selection(jnp.asarray(p), state), expected)
    assert 0 < expected.mean() < 1
    assert selection(jnp.asarray(p), selection.init(3)).all()


def test_adaptive_thresholds_are_lower_for_rare_classes():
    selection, p = pseudo_labels.Adaptive(), jnp.array([[[[0.6, 0.2, 0.2], [0.2, 0.6, 0.2]]]])
    state = {"confidence": jnp.float32(0.8), "classes": jnp.array([0.8, 0.15, 0.05])}
    np.testing.assert_array_equal(selection(p, state), [[[0, 1]]])


def test_soft_selection_by_hand():
    """Eq. 20, after three updates from 1 / K and 1."""
    mean, variance = 1 / 3, 1.0
    for logits, valid in UPDATES:
        confidence = softmax(logits)[valid].max(-1)
        mean = 0.2 * mean + 0.8 * confidence.mean()
        variance = 0.2 * variance + 0.8 * confidence.var(ddof=1)
    selection = pseudo_labels.Soft(0.2)
    state = running(selection, UPDATES)
    np.testing.assert_allclose([state["mean"], state["variance"]], [mean, variance], rtol=1e-5)
    confidence = softmax(0.3 * LOGITS).max(-1)
    below = np.exp(-((confidence - mean) ** 2) / (2 * variance / 4))
    weight = selection(jnp.asarray(softmax(0.3 * LOGITS)), state)
    np.testing.assert_allclose(weight, np.where(confidence >= mean, 1, below), rtol=1e-5)
    assert weight.dtype == jnp.float32 and (weight == 1).any() and weight.min() < 0.9


def test_class_balanced_selection_by_hand():
    """Eq. 26, after three updates from 0, on every second pixel of every second row."""
    thresholds = np.zeros(3)
    for logits, valid in UPDATES:
        q = softmax(logits[:, ::2, ::2])[valid[:, ::2, ::2]]
        for c in range(3):
            thresholds[c] = 0.4 * thresholds[c] + 0.6 * np.quantile(q.max(-1)[q.argmax(-1) == c], 0.7)
    selection = pseudo_labels.ClassBalanced(0.4, 0.3)
    state = running(selection, UPDATES)
    np.testing.assert_allclose(state["thresholds"], thresholds, rtol=1e-5)
    p = softmax(LOGITS)
    weight = np.asarray(selection(jnp.asarray(p), state))
    np.testing.assert_array_equal(weight, p.max(-1) >= thresholds[p.argmax(-1)])
    assert selection(jnp.asarray(p), selection.init(3)).all()


def test_class_balanced_selection_takes_the_same_share_of_each_class():
    """The classes are predicted with very different confidence."""
    logits = np.random.default_rng(2).normal(0, 1, (8, 40, 40, 3)).astype(np.float32) * np.array(
        [8, 2, 0.5], np.float32
    )
    selection, valid = pseudo_labels.ClassBalanced(0.0, 0.3), jnp.ones(logits.shape[:3], bool)
    state = selection.update(selection.init(3), jnp.asarray(logits), valid)
    labels, weight = map(np.asarray, pseudo_labels.pseudo_label(jnp.asarray(logits), selection, state))
    assert [weight[labels == c].mean() for c in range(3)] == pytest.approx([0.3] * 3, abs=0.03)


def test_thresholds_of_classes_without_a_pixel_stay():
    selection, state = pseudo_labels.ClassBalanced(0.5), {"thresholds": jnp.array([0.5, 0.6, 0.7])}
    logits = jnp.asarray(LOGITS + np.array([1000, 0, 0], np.float32))
    moved = selection.update(state, logits, jnp.ones(LOGITS.shape[:3], bool))
    np.testing.assert_allclose(moved["thresholds"], [0.75, 0.6, 0.7], rtol=1e-6)


SHARES = (0.7, 0.28, 0.02)  # The share of each class of the labeled pixels.


def test_alignment_by_hand():
    """Eq. 25, after three updates from the shares of the labels; the inner selection sees aligned predictions."""
    classes, tau, f = np.array(SHARES), 1 / 3, np.array(SHARES)
    for logits, valid in UPDATES:
        q = softmax(logits)[valid]
        classes = 0.9 * classes + 0.1 * q.mean(0)
        aligned = q * f / classes
        tau = 0.8 * tau + 0.2 * (aligned / aligned.sum(-1, keepdims=True)).max(-1).mean()
    selection = pseudo_labels.Aligned(pseudo_labels.Adaptive(0.8), SHARES, 0.9)
    state = running(selection, UPDATES)
    np.testing.assert_allclose(state["classes"], classes, rtol=1e-5)
    np.testing.assert_allclose(state["selection"]["confidence"], tau, rtol=1e-5)
    p = softmax(0.3 * LOGITS) * f / classes
    p /= p.sum(-1, keepdims=True)
    plain = pseudo_labels.Aligned(pseudo_labels.Threshold(0.6), SHARES, 0.9)
    labels, weight = pseudo_labels.pseudo_label(jnp.asarray(0.3 * LOGITS), plain, {**state, "selection": {}})
    np.testing.assert_array_equal(labels, p.argmax(-1))
    np.testing.assert_array_equal(weight, p.max(-1) >= 0.6)
    assert (labels != LOGITS.argmax(-1)).any() and 0 < weight.mean() < 1


def test_alignment_gives_classes_the_shares_of_the_labels():
    """One update brings the shares of predicted classes closer to those of the labels, for biased predictions too."""
    logits = jnp.asarray(LOGITS)
    selection = pseudo_labels.Aligned(pseudo_labels.Threshold(0.0), SHARES, 0.0)
    valid = jnp.ones(LOGITS.shape[:3], bool)
    even = selection.align(logits, selection.update(selection.init(3), logits, valid))
    biased = logits + jnp.array([1.0, -2.0, 3.0])
    other = selection.align(biased, selection.update(selection.init(3), biased, valid))
    shares = [np.asarray(softmax(np.asarray(each))).mean((0, 1, 2)) for each in (even, other)]
    for share in shares:  # One step of a fixed point iteration, not its end.
        assert np.abs(np.log(share / SHARES)).max() < np.abs(np.log(softmax(LOGITS).mean((0, 1, 2)) / SHARES)).max()
    with pytest.raises(ValueError, match="3 frequencies for 4 classes"):
        selection.init(4)


def test_alignment_of_classes_without_a_label_or_a_prediction_is_finite():
    selection = pseudo_labels.Aligned(pseudo_labels.Threshold(0.0), (0.5, 0.5, 0.0), 0.0)
    logits = jnp.asarray(LOGITS + np.array([0, -1000, 0], np.float32))
    state = selection.update(selection.init(3), logits, jnp.ones(LOGITS.shape[:3], bool))
    assert np.isfinite(selection.align(logits, state)).all()


@pytest.mark.parametrize(
    "selection", [pseudo_labels.Adaptive(0.0), pseudo_labels.Soft(0.0), pseudo_labels.ClassBalanced(0.0)]
)
def test_odd_batches_leave_running_statistics_usable(selection):
    """Without a valid pixel they stay; with one, or equal ones, weights are finite. Logits may be of 16 bits."""
    logits, none = jnp.asarray(LOGITS, jnp.bfloat16), np.zeros((4, 6, 5), bool)
    start = running(selection, UPDATES)
    moved = selection.update(start, logits, none)
    jax.tree.map(np.testing.assert_array_equal, moved, start)
    one = none.copy()
    one[1, 2, 3] = True
    for state in (selection.update(start, logits, one), selection.update(start, 0 * logits, ~none)):
        assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in jax.tree.leaves(state))
        weight = selection(jnp.asarray(softmax(LOGITS)), state)
        assert np.isfinite(weight).all() and weight.max() == 1


@pytest.mark.parametrize(
    "selection",
    [
        pseudo_labels.Adaptive(0.9), pseudo_labels.Soft(0.9), pseudo_labels.ClassBalanced(0.9),
        pseudo_labels.Aligned(pseudo_labels.Soft(0.9), SHARES, 0.9),
    ],
)  # fmt: skip
def test_running_statistics_are_those_of_all_devices(selection):
    """With images, and valid pixels, shared out unevenly."""
    mesh = sharding.make_mesh(jax.devices()[:4])
    logits, valid = UPDATES[0][0], UPDATES[0][1] & (np.arange(4) != 2)[:, None, None]
    update = jax.jit(selection.update, out_shardings=sharding.replicated(mesh))
    shared = update(selection.init(3), *sharding.put_batch((logits, valid), mesh))
    alone = selection.update(selection.init(3), logits, jnp.asarray(valid))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), shared, alone)


def test_pseudo_labels_have_no_gradient():
    def total(logits):
        return pseudo_labels.pseudo_label(logits, lambda p, state: p.max(-1), {})[1].sum()

    assert not np.any(jax.grad(total)(jnp.asarray(LOGITS)))
