import jax
import jax.numpy as jnp
import numpy as np

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


def test_pseudo_labels_have_no_gradient():
    def total(logits):
        return pseudo_labels.pseudo_label(logits, lambda p, state: p.max(-1), {})[1].sum()

    assert not np.any(jax.grad(total)(jnp.asarray(LOGITS)))
