import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax.methods import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (4, 6, 5, 3)).astype(np.float32)
LABELS = RNG.integers(0, 3, (4, 6, 5)).astype(np.uint8)
LABELS[0, :2] = 255


def probabilities(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def true_class_probability(logits, labels):
    valid = labels != 255
    index = np.where(valid, labels, 0)[..., None].astype(int)
    return np.take_along_axis(probabilities(logits), index, -1)[..., 0], valid


def test_cross_entropy_by_hand():
    p, valid = true_class_probability(LOGITS, LABELS)
    assert losses.CrossEntropy()(LOGITS, LABELS) == pytest.approx(-np.log(p[valid]).mean(), rel=1e-5)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_class_weights_are_those_of_pytorch(power):
    """In float64; the third class does not occur among the counts."""
    torch = pytest.importorskip("torch")
    frequencies = np.array([0.9, 0.1, 0.0])
    weights = losses.class_weights(frequencies, power)
    np.testing.assert_allclose(weights[0] / weights[1], 9**-power)
    assert np.dot(frequencies, weights) == pytest.approx(1) and weights[2] == 1
    with jax.enable_x64(True):
        logits = LOGITS.astype(np.float64)
        value, gradient = jax.value_and_grad(losses.CrossEntropy(255, weights))(jnp.asarray(logits), LABELS)
    theirs = torch.tensor(logits.transpose(0, 3, 1, 2), requires_grad=True)
    expected = torch.nn.CrossEntropyLoss(torch.tensor(weights, dtype=torch.float64), ignore_index=255)
    loss = expected(theirs, torch.tensor(LABELS.astype(np.int64)))
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-9, atol=1e-15)


def test_weights_and_shifts_decide_by_the_sum_of_their_exponents():
    """The least loss of pixels of one distribution is at log P - (power + factor) log f, up to a constant (Eq. 27).

    The last class has a share of less than 1e-5, which counts as that.
    """
    share, pixels = np.array([0.7, 0.2, 0.1 - 1e-6, 1e-6]), np.array([5, 3, 2, 1])
    labels = np.repeat(np.arange(4), pixels)[None, None]
    loss = losses.CrossEntropy(255, losses.class_weights(share, 0.5))
    shifts = np.array(losses.logit_shifts(share, -0.2))
    best = np.log(pixels) - 0.5 * np.log(share) + 0.2 * np.log([*share[:3], 1e-5])
    with jax.enable_x64(True):
        gradient = jax.grad(lambda z: loss(jnp.broadcast_to(z + shifts, (1, 1, 11, 4)), labels))
        np.testing.assert_allclose(gradient(jnp.asarray(best)), 0, atol=1e-12)
        assert np.abs(gradient(jnp.asarray(np.log(pixels)))).max() > 0.01


def test_equal_class_weights_change_nothing():
    assert losses.class_weights(np.array([0.25, 0.75]), 0.0) == (1.0, 1.0)
    for loss in (losses.CrossEntropy(), losses.Ohem(0.3, 10, 2)):
        weighted = dataclasses.replace(loss, weights=(3.0, 3.0, 3.0))
        assert float(weighted(LOGITS, LABELS)) == pytest.approx(float(loss(LOGITS, LABELS)), rel=1e-6)


def test_hard_pixels_are_averaged_by_class_weight():
    """Pixels are kept by their probability alone, in groups of two images."""
    weights = np.array([0.5, 1.0, 4.0])
    p, valid = true_class_probability(LOGITS, LABELS)
    kept, expected = valid & (p <= 0.3), []
    for group in (slice(0, 2), slice(2, 4)):
        weight = weights[LABELS[group][kept[group]]]
        expected.append((weight * -np.log(p[group][kept[group]])).sum() / weight.sum())
    found = losses.Ohem(0.3, 1, 2, weights=tuple(weights.tolist()))(LOGITS, LABELS)
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-5)


def ohem_by_hand(logits, labels, threshold, min_kept, group):
    total = []
    for start in range(0, len(labels), group):
        p, valid = true_class_probability(logits[start : start + group], labels[start : start + group])
        kept = valid
        if valid.sum() > 0 and min_kept <= valid.sum():
            ordered = np.sort(np.where(valid, p, 1).ravel())
            kept = valid & (p <= max(threshold, ordered[min(min_kept, p.size) - 1]))
        total.append(-np.log(p[kept]).mean() if kept.any() else 0.0)
    return np.mean(total)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("min_kept", [1, 10, 29, 55, 1000])
@pytest.mark.parametrize("threshold", [0.05, 0.7])
def test_ohem_by_hand(group, min_kept, threshold):
    expected = ohem_by_hand(LOGITS, LABELS, threshold, min_kept, group)
    found = losses.Ohem(threshold, min_kept, group)(LOGITS, LABELS)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kth_smallest_agrees_with_a_sort(dtype):
    with jax.enable_x64(True):
        values = RNG.random((3, 500)).astype(dtype)
        values[1] = np.round(values[1], 2)  # Ties.
        values[2, :250], values[2, 250:400] = 1.0, 0.0
        for rank in (0, 1, 99, 249, 250, 498, 499):
            found = losses.kth_smallest(jnp.asarray(values), rank)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found[:, 0], np.sort(values, -1)[:, rank])


@pytest.mark.parametrize(
    "loss",
    [
        losses.CrossEntropy(),
        losses.Ohem(0.7, 10, 2),
        losses.CrossEntropy(255, (0.1, 1.0, 9.0)),
        losses.Ohem(0.7, 10, 2, 255, (0.1, 1.0, 9.0)),
        lambda logits, labels: losses.consistency(logits, labels, 1.0 * (labels == 0), labels != 255),
    ],
)
def test_no_valid_pixel_gives_zero_and_no_gradient(loss):
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(LOGITS), jnp.full_like(LABELS, 255))
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


def test_consistency_weighs_pixels_and_divides_by_the_valid_ones():
    p, valid = true_class_probability(LOGITS, LABELS)
    weight = np.where(RNG.random(LABELS.shape) < 0.3, RNG.random(LABELS.shape), 0).astype(np.float32)
    expected = -(weight * np.log(p))[valid].sum() / valid.sum()
    assert losses.consistency(LOGITS, LABELS, weight, valid) == pytest.approx(expected, rel=1e-5)
    of_class = np.linspace(0.5, 3, LOGITS.shape[-1])
    weighed = -(of_class[np.where(valid, LABELS, 0)] * weight * np.log(p))[valid].sum() / valid.sum()
    ours = losses.consistency(LOGITS, LABELS, weight, valid, tuple(of_class.tolist()))
    assert ours == pytest.approx(weighed, rel=1e-5)


def contrast(a, b):
    """Eq. 5 as it is written."""
    a, b = ((x - x.mean(-1, keepdims=True)) / x.std(-1, ddof=1, keepdims=True) for x in (a, b))
    return ((a - b) ** 2).mean()


def test_contrast_compares_standardized_logits():
    a, b = LOGITS, RNG.normal(0, 1, LOGITS.shape).astype(np.float32)
    assert losses.contrast(a, b) == pytest.approx(contrast(a, b), rel=1e-5)
    assert losses.contrast(3 * a + 5, b) == pytest.approx(float(losses.contrast(a, b)), rel=1e-4)


def test_gradients_are_those_of_the_formulas():
    """Automatic differentiation of what the docstrings say, in float64."""

    def cross_entropy(logits, weight, valid):
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), np.where(valid, LABELS, 0)[..., None], -1)[..., 0]
        return -(weight * picked)[valid].sum()

    with jax.enable_x64(True):
        a, b = (jnp.asarray(RNG.normal(0, 2, LOGITS.shape)) for _ in range(2))
        weight, valid = RNG.random(LABELS.shape), LABELS != 255
        ours = jax.grad(lambda *maps: 3 * losses.contrast(*maps), (0, 1))(a, b)
        for each, expected in zip(ours, jax.grad(lambda *maps: 3 * contrast(*maps), (0, 1))(a, b), strict=True):
            np.testing.assert_allclose(each, expected, rtol=0, atol=1e-15)
        ours = jax.grad(lambda logits: (weight * losses.pixel_cross_entropy(logits, LABELS, valid)).sum())(a)
        np.testing.assert_allclose(ours, jax.grad(cross_entropy)(a, weight, valid), rtol=0, atol=1e-14)


def test_contrast_of_nearly_equal_logits_is_not_rounding():
    with jax.enable_x64(True):
        a = RNG.normal(size=LOGITS.shape)
        b = a + 1e-6 * RNG.normal(size=a.shape)
        assert float(losses.contrast(a, b)) == pytest.approx(contrast(a, b), rel=1e-8)


def test_contrast_of_equal_logits_has_a_finite_gradient():
    value, gradient = jax.value_and_grad(losses.contrast)(jnp.zeros_like(LOGITS), jnp.asarray(LOGITS))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
