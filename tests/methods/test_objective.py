"""The student's and the teacher's forward passes of a method, against the network applied by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import methods
from dssn_jax import models
from dssn_jax.learner.learner import init_variables
from dssn_jax.methods import method, pseudo_labels
from dssn_jax.methods.objective import Keys, Objective, StudentLogits, TeacherLogits, loss_terms
from dssn_jax.methods.views import Views
from dssn_jax.models.network import Network

KEY = jax.random.PRNGKey(2)


@pytest.fixture(scope="module")
def setup(tiny_config):
    """Returns (function from method options to an objective, variables, views)."""
    config = tiny_config()
    network = models.build(config.model, len(config.data.classes))
    variables = jax.jit(functools.partial(init_variables, network))(jax.random.PRNGKey(0))
    image_x, image_u, image_m, *strong = jax.random.normal(jax.random.PRNGKey(1), (5, 2, 33, 33, 3))
    views = Views(image_x, jnp.zeros((2, 33, 33), int), image_u, image_m, strong=tuple(strong))

    def make(name="dssn", **options):
        config = tiny_config(name, **options)
        methods.apply(config, name)
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in options.items()})
        return Objective(network, method.from_config(config, 10))

    return make, variables, views


def student(objective, variables, views, key=KEY):
    return jax.jit(objective.student_logits)(variables, views, Keys(key, key))


@pytest.mark.slow
def test_streams_differ_by_their_dropout(setup):
    make, variables, views = setup
    logits, _ = student(make(), variables, views)
    assert set(logits.streams) == {"s1", "s2", "fp1", "fp2"}
    for one, other in (("fp1", "fp2"), ("s1", "s2")):
        assert np.abs(logits.streams[one] - logits.streams[other]).max() > 1e-3
    again, _ = student(make(), variables, views)
    np.testing.assert_array_equal(again.streams["fp2"], logits.streams["fp2"])
    other, _ = student(make(), variables, views, jax.random.PRNGKey(3))
    assert np.abs(other.streams["fp1"] - logits.streams["fp1"]).max() > 1e-3
    # Not perturbed, but the running statistics, which shift the sums of batch norm, differ.
    np.testing.assert_allclose(other.streams["s1"], logits.streams["s1"], atol=1e-5)


@pytest.mark.slow
def test_images_and_strong_views_encoded_at_once_are_those_of_two_passes(setup, monkeypatch):
    """With the same logits and running statistics."""
    make, variables, views = setup
    joined = student(make(), variables, views)
    monkeypatch.setattr(Network, "draws", True)  # Encoders that draw random numbers get one batch after the other.
    apart = student(make(), variables, views)
    for ours, expected in zip(*map(jax.tree.leaves, (joined, apart)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_without_dropout_a_feature_stream_is_the_weak_view(setup):
    make, variables, views = setup
    logits, _ = student(make(method__feature_dropout=0.0), variables, views)
    for name in ("fp1", "fp2"):
        np.testing.assert_allclose(logits.streams[name], logits.weak, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_views_of_labeled_images_matter_to_the_statistics_alone(setup):
    """Without dropout, copies of all images leave the decoder's statistics; copies of the weak ones do not."""
    make, variables, views = setup

    def mean(name, **options):
        options = {
            "method__strong_views": 0,
            "method__image_contrast_weight": 0.0,
            "method__feature_dropout": 0.0,
            **options,
        }
        _, updated = student(make(name, **options), variables, views)
        return updated["batch_stats"]["decoder"]["reduce_1"]["mean"]

    none = mean("unimatch", method__feature_views=0)
    np.testing.assert_allclose(mean("dssn", method__perturb_labeled=True), none, rtol=1e-3, atol=1e-6)
    assert not np.allclose(mean("dssn", method__perturb_labeled=False), none, rtol=1e-2)


@pytest.mark.slow
def test_complementary_streams_sum_to_twice_the_features(setup):
    """The classifier's input is not linear in the features, so the sum is checked where the objective perturbs."""
    make, variables, views = setup
    objective = make("unimatch", method__strong_perturb="complementary", method__feature_views=0)
    features = objective.network.apply(variables, views.strong[0], method="encode")
    first, second = (objective._perturb(stream, features, KEY) for stream in objective.method.of_view("strong"))
    for one, other, original in zip(first, second, features, strict=True):
        np.testing.assert_allclose(one + other, 2 * original, rtol=1e-5, atol=1e-6)
    logits, _ = student(objective, variables, views)
    plain, _ = student(make("unimatch", method__feature_views=0), variables, views)
    assert np.abs(logits.streams["s1"] - plain.streams["s1"]).max() > 1e-3


@pytest.mark.parametrize(("epochs", "moves"), [(0, False), (1, True)])
def test_teacher_uses_batch_statistics_in_the_first_epochs_only(setup, epochs, moves):
    make, variables, views = setup
    objective = make(ema__batch_stats_epochs=epochs)
    logits, teacher = jax.jit(objective.teacher_logits)(None, variables, views, jnp.int32(0))
    pairs = zip(*map(jax.tree.leaves, (teacher["batch_stats"], variables["batch_stats"])), strict=True)
    assert any(not np.array_equal(*pair) for pair in pairs) == moves
    if not moves:
        predict = jax.jit(functools.partial(objective.network.apply, method="low_res_logits"))
        np.testing.assert_allclose(logits.weak, predict(variables, views.image_u), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logits.partner, predict(variables, views.image_m), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher", ["ema", "student_eval", "student"])
def test_labeled_partners_are_not_predicted(setup, teacher):
    make, variables, views = setup
    objective = make(method__teacher=teacher, ema__batch_stats_epochs=1)
    views = views._replace(image_m=None, label_m=views.label_x)
    logits, _ = jax.eval_shape(objective.teacher_logits, variables, variables, views, 0)
    assert logits.partner is None and (logits.weak is None) == (teacher == "student")


def test_labeled_partners_bring_their_labels_to_the_target():
    """Eq. 21 by hand: the pseudo-labels of the unmixed weak view outside of the box, labels inside."""
    rng = np.random.default_rng(3)
    size, classes = (2, 6, 5), 3
    student, teacher = (rng.normal(0, 3, (*size, classes)).astype(np.float32) for _ in range(2))
    label = rng.integers(classes, size=size).astype(np.uint8)
    label[:, 2] = 255
    box, valid_u = rng.random(size) < 0.5, rng.random(size) < 0.8
    views = Views(None, label, valid_u=valid_u, valid_m=label != 255, boxes=(box,), label_m=label)
    options = dict(streams=(method.Stream("s1", "strong", 1.0),), teacher="student_eval")
    for selection in (pseudo_labels.Threshold(0.7), pseudo_labels.ClassAware(0.8, 0.9)):
        terms, ratios, _ = loss_terms(
            StudentLogits(student, None, {"s1": student}),
            TeacherLogits(teacher),
            views,
            method.Method(**options, selection=selection),
            {},
        )
        q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, student))
        weight = np.asarray(selection(q, {}))  # The whole weak view is weighted, also under the box.
        valid = np.where(box, label != 255, valid_u)
        target = np.where(box & (label != 255), label, q.argmax(-1))
        losses = -np.log(np.take_along_axis(p, target[..., None], -1)[..., 0])
        expected = (losses * np.where(box, 1, weight) * valid).sum() / valid.sum()
        assert float(terms["loss_s1"]) == pytest.approx(expected, rel=1e-5)
        assert 0 < weight.mean() < 1
        pseudo_labeled = valid_u & ~box
        assert float(ratios["mask_ratio_s1"]) == pytest.approx(weight[pseudo_labeled].mean(), rel=1e-6)


def test_all_losses_and_pseudo_labels_are_those_of_shifted_logits():
    rng = np.random.default_rng(6)
    labeled, weak, partner, *streams = rng.normal(0, 3, (7, 2, 6, 5, 3)).astype(np.float32)
    label, box = rng.integers(3, size=(2, 6, 5)).astype(np.uint8), rng.random((2, 6, 5)) < 0.5
    valid = np.ones((2, 6, 5), bool)
    views = Views(None, label, valid_u=valid, valid_m=valid, boxes=(box, ~box))
    names = [f"{kind}{number}" for kind in ("s", "fp") for number in (1, 2)]
    kinds = [("strong", "teacher")] * 2 + [("feature", "student")] * 2
    plain = method.Method(
        streams=tuple(method.Stream(name, view, 1.0, target=of) for name, (view, of) in zip(names, kinds, strict=True)),
        contrasts=(method.Contrast("image", ("s1", "s2"), 0.1), method.Contrast("feature", ("fp1", "fp2"), 0.1)),
        teacher="student_eval",
        selection=pseudo_labels.Adaptive(0.5),
    )
    shifts = (1.0, -0.5, 0.0)
    outcomes = []
    for each, moved in ((plain, 0), (dataclasses.replace(plain, logit_shifts=shifts), np.float32(shifts))):
        outputs = dict(zip(names, (x - moved for x in streams), strict=True))
        student = StudentLogits(labeled - moved, weak - moved, outputs)
        teacher = TeacherLogits(weak - moved, partner - moved)
        outcomes.append(loss_terms(student, teacher, views, each, plain.selection.init(3)))
    assert {"loss_x", "loss_s2", "loss_fp1", "contrast_image", "contrast_feature"} <= set(outcomes[0][0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *outcomes)


def test_shares_of_the_classes_by_hand():
    """The weights of the pixels of each class in the unmixed weak view, at every fourth pixel of every fourth row."""
    rng = np.random.default_rng(5)
    student, teacher = rng.normal(0, 3, (2, 2, 26, 23, 4)).astype(np.float32)
    teacher[..., 3] = -9  # Never predicted.
    box, valid = np.ones((2, 26, 23), bool), rng.random((2, 26, 23)) < 0.8
    views = Views(None, np.zeros((2, 26, 23), np.uint8), valid_u=valid, valid_m=valid, boxes=(box,))
    selection = pseudo_labels.Soft(0.5)
    options = dict(streams=(method.Stream("s1", "strong", 1.0),), teacher="student_eval", selection=selection)
    state = {"mean": np.float32(0.9), "variance": np.float32(0.05)}
    _, ratios, state = loss_terms(
        StudentLogits(student, None, {"s1": student}),
        TeacherLogits(teacher, teacher),
        views,
        method.Method(**options),
        state,
    )
    q = np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True)
    weight, sums, count = np.asarray(selection(q, state)), np.zeros(4), 0
    for image, row, column in np.ndindex(2, 7, 6):
        at = image, 4 * row, 4 * column
        if valid[at]:
            sums[q[at].argmax()] += weight[at]
            count += 1
    np.testing.assert_allclose(ratios["pseudo_labels"], sums / count, rtol=1e-5)
    assert (sums[:3] > 0).all() and sums[3] == 0 and sums.sum() < count


def test_padding_has_no_part_in_running_statistics():
    """Low-resolution logits count if the pixel at their place is valid, however far they are from pixels."""
    rng = np.random.default_rng(4)
    weak, student = rng.normal(0, 3, (2, 2, 4, 5, 3)).astype(np.float32)
    valid = np.zeros((2, 13, 17), bool)  # Logits are at every fourth row and column.
    valid[0, :9, :10], valid[1, :2] = True, True
    options = dict(streams=(method.Stream("fp1", "feature", 1.0, target="student"),), teacher="student")
    selection = pseudo_labels.Adaptive(0.0)
    *_, state = loss_terms(
        StudentLogits(student, weak, {"fp1": student}),
        TeacherLogits(),
        Views(None, np.zeros((2, 13, 17), np.uint8), valid_u=valid),
        method.Method(**options, selection=selection),
        selection.init(3),
    )
    inside = np.concatenate([weak[0, :3, :3].reshape(-1, 3), weak[1, :1].reshape(-1, 3)])
    q = np.exp(inside) / np.exp(inside).sum(-1, keepdims=True)
    np.testing.assert_allclose(state["classes"], q.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state["confidence"], q.max(-1).mean(), rtol=1e-5)


def test_a_branch_that_cannot_run_is_not_compiled(setup):
    make, variables, views = setup
    with_branch, without = (
        str(jax.make_jaxpr(make(ema__batch_stats_epochs=epochs).teacher_logits)(None, variables, views, 0))
        for epochs in (1, 0)
    )
    assert "scan" in with_branch and "scan" not in without  # Weak views and partners, one after the other.
