import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dssn_jax import sharding
from dssn_jax.learner import learner as experiment
from dssn_jax.learner import step as train_step
from dssn_jax.methods import strong_augment as augment
from dssn_jax.methods import views
from input_pipeline.pipeline import train_dataset

METHODS = ("supervised", "fixmatch", "unimatch", "dssn")
TERMS = {
    "supervised": {"loss_x"},
    "fixmatch": {"loss_x", "loss_s1"},
    "unimatch": {"loss_x", "loss_s1", "loss_s2", "loss_fp1"},
    "dssn": {"loss_x", "loss_s1", "loss_s2", "loss_fp1", "loss_fp2", "contrast_image", "contrast_feature"},
}


def start(config, devices=1):
    """Returns (experiment, state, jitted step) over so many devices."""
    parts = experiment.build(config, jax.devices()[:devices])
    return parts, parts.initial_state(), parts.compile_step()


def batches(parts, count):
    dataset = train_dataset(parts.sources, parts.config)
    return [sharding.put_batch(dataset[i], parts.mesh) for i in range(count)]


def look(parts, state, batch):
    """What the step sees of a batch."""
    batch = augment.add_strong_views(batch, parts.recipe, state.rng, state.step)
    return views.from_batch(batch, parts.config.data.mean, parts.config.data.std, jnp.float32)


def run(config, steps, devices=1):
    parts, state, step = start(config, devices)
    metrics = []
    for batch in batches(parts, steps):
        state, found = step(state, batch)
        metrics.append(jax.device_get(found))
    return jax.device_get(state), metrics


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_its_terms_and_they_sum_up(tiny_config, method):
    config = tiny_config(method, method__threshold=0.0, method__selection="threshold")
    state, (first, second) = run(config, 2)
    weights = config.method
    for found, strong in ((first, 0.0 if method == "dssn" else 1.0), (second, 1.0)):  # DSSN's teacher warms up.
        metrics = {name: float(value) for name, value in found.items()}
        assert {name for name in metrics if name.startswith(("loss_", "contrast_"))} == TERMS[method]
        total = metrics["loss_x"]
        total += strong * weights.strong_weight * sum(v for k, v in metrics.items() if k.startswith("loss_s"))
        total += weights.feature_weight * sum(v for k, v in metrics.items() if k.startswith("loss_fp"))
        total += 0.01 * sum(v for k, v in metrics.items() if k.startswith("contrast_"))
        total *= 1.0 if method == "supervised" else 0.5
        assert metrics["loss"] == pytest.approx(total, rel=1e-5)
        if method != "supervised":
            assert metrics["mask_ratio"] == 1.0
    assert (state.teacher_params is None) == (method != "dssn")


@pytest.fixture
def exact_config(tiny_config):
    """DSSN in float64, so that what differs between device counts is not rounding that training has amplified."""
    with jax.enable_x64(True):
        yield tiny_config(method__threshold=0.0, model__dtype="float64", model__param_dtype="float64")


def test_one_and_four_devices_agree(exact_config):
    alone, alone_metrics = run(exact_config, 3, devices=1)
    shared, shared_metrics = run(exact_config, 3, devices=4)
    for one, four in zip(alone_metrics, shared_metrics, strict=True):
        assert set(one) == set(four)
        for name in one:
            np.testing.assert_allclose(one[name], four[name], rtol=1e-8, atol=1e-12, err_msg=name)
    for one, four in zip(jax.tree.leaves(alone.params), jax.tree.leaves(shared.params), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, four, rtol=1e-6, atol=1e-10)


def test_no_all_to_all_in_the_compiled_step(exact_config):
    parts, state, step = start(exact_config, devices=4)
    text = step.lower(state, batches(parts, 1)[0]).compile().as_text()
    assert "all-reduce" in text  # It is a program for several devices,
    assert "all-to-all" not in text  # which do not exchange images,
    # (in float64 XLA gathers the images for the gradient of the max pooling; in float32 and bfloat16 it does not)
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert all("select_and_scatter" in line for line in gathers)
    # and reduce little but often. A batch norm reduces its sums together: in the forward and the backward pass of both
    # student forwards, and in the first teacher's forward. Parallel ones share a reduction; all gradients do, and the
    # loss terms take a few.
    norms = len(jax.tree.leaves(state.batch_stats)) // 2
    assert text.count(" all-reduce(") <= 5 * norms + 8


def test_no_all_to_all_with_unequal_batches(tiny_config):
    """The labeled batch is twice the unlabeled one: rows are joined in groups."""
    options = {"method__strong_views": 0, "method__image_contrast_weight": 0.0}
    parts, state, step = start(tiny_config(data__labeled_batch=8, **options), devices=4)
    text = step.lower(state, batches(parts, 1)[0]).compile().as_text()
    assert "all-reduce" in text and "all-to-all" not in text


def test_same_seed_same_run(tiny_config):
    parts, _, step = start(tiny_config())
    seen = batches(parts, 3)

    def losses(seed):
        state, found = start(tiny_config(seed=seed))[1], []
        for batch in seen:
            state, metrics = step(state, batch)
            found.append(jax.device_get(metrics))
        return jax.device_get(state), found

    first, second, other = losses(0), losses(0), losses(1)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert other[1][0]["loss"] != first[1][0]["loss"]
    again = batches(start(tiny_config())[0], 3)
    jax.tree.map(np.testing.assert_array_equal, seen, again)


@pytest.mark.parametrize("loss", ["ce", "ohem"])
def test_a_batch_without_a_valid_pixel_is_harmless(tiny_config, loss):
    parts, state, step = start(tiny_config("dssn" if loss == "ce" else "supervised", method__labeled_loss=loss))
    batch = batches(parts, 1)[0]
    batch["label_x"] = jnp.full_like(batch["label_x"], 255)
    for key in {"valid_u", "valid_m"} & set(batch):
        batch[key] = jnp.zeros_like(batch[key])
    new_state, metrics = step(state, batch)
    for name, value in metrics.items():
        assert np.isfinite(value), name
    assert {float(value) for name, value in metrics.items() if name.startswith(("loss_", "mask_ratio"))} == {0.0}
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new_state.params))


def test_teacher_is_a_copy_after_warm_up_and_an_average_later(tiny_config):
    parts, state, step = start(tiny_config(ema__decay=0.9))
    first, second = batches(parts, 2)
    state, _ = step(state, first)
    jax.tree.map(np.testing.assert_array_equal, state.teacher_params, state.params)
    jax.tree.map(np.testing.assert_array_equal, state.teacher_batch_stats, state.batch_stats)
    before = jax.device_get(state.teacher_params)
    state, _ = step(state, second)
    averages = jax.tree.map(lambda old, student: 0.9 * old + 0.1 * np.asarray(student), before, state.params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, state.teacher_params, averages)


@pytest.mark.parametrize(("epochs", "moves"), [(0, False), (1, True)])
def test_teacher_uses_batch_statistics_in_the_first_epochs_only(tiny_config, epochs, moves):
    config = tiny_config(ema__batch_stats_epochs=epochs)
    parts, state, _ = start(config)
    seen = look(parts, state, batches(parts, 1)[0])
    labels, stats = jax.jit(lambda state, seen: train_step.label(state, seen, parts.model, parts.method))(state, seen)
    changed = any(
        not np.array_equal(*leaves)
        for leaves in zip(jax.tree.leaves(stats), jax.tree.leaves(state.teacher_batch_stats), strict=True)
    )
    assert changed == moves
    if not moves:
        expected = jax.jit(functools.partial(parts.model.apply, method="coarse"))(state.teacher, seen.image_u)
        np.testing.assert_allclose(labels.weak, expected, rtol=1e-4, atol=1e-5)


def test_cutmix_box_pastes_images_and_valid_pixels():
    image = jnp.zeros((2, 6, 8, 3))
    boxes = [views.box_mask(jnp.array([[1, 2, 4, 7], [0, 0, 0, 0]]), 6, 8)]
    valid = jnp.ones((2, 6, 8), bool)
    seen = views.mix(None, None, image, image + 1, [image], [image + 1], valid, ~valid, boxes)
    expected = np.zeros((2, 6, 8), bool)
    expected[0, 1:4, 2:7] = True
    np.testing.assert_array_equal(seen.strong[0][..., 0] == 1, expected)
    np.testing.assert_array_equal(seen.mixing(0, seen.valid_u, seen.valid_m), ~expected)


def test_normalize_by_hand():
    image = np.array([[[0, 128, 255]]], np.uint8)
    found = views.normalize(image, (0.5, 0.4, 0.3), (0.1, 0.2, 0.5))
    np.testing.assert_allclose(found[0, 0], [-5, (128 / 255 - 0.4) / 0.2, 1.4], rtol=1e-5)


def test_loss_falls_on_a_repeated_batch(tiny_config):
    parts, state, step = start(tiny_config("unimatch", method__threshold=0.0))
    batch = batches(parts, 1)[0]
    values = []
    for _ in range(parts.steps):
        state, metrics = step(state, batch)
        values.append(float(metrics["loss_x"]))
    assert values[-1] < 0.8 * values[0]
    assert optax.tree_utils.tree_get(state.opt_state, "count") == parts.steps


def test_accumulated_gradients_make_one_update_of_their_mean(tiny_config):
    """Two parts of a batch of 4 on 2 devices: part 0 is the first row of each device, part 1 the second."""
    config = tiny_config("supervised", train__accumulation=2)
    parts, state, step = start(config, devices=2)
    batch = batches(parts, 1)[0]
    before = jax.device_get(state)
    images = np.asarray(views.normalize(batch["image_x"], config.data.mean, config.data.std))
    labels = np.asarray(batch["label_x"])
    after, metrics = step(state, batch)

    batch_stats, gradients, losses = before.batch_stats, [], []
    for rows in ([0, 2], [1, 3]):

        def loss_fn(params, batch_stats=batch_stats, rows=rows):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = parts.model.apply(variables, images[rows], train=True, mutable=["batch_stats"])
            valid = labels[rows] != 255
            each = optax.softmax_cross_entropy_with_integer_labels(logits, np.where(valid, labels[rows], 0))
            return (each * valid).sum() / valid.sum(), updated["batch_stats"]

        (loss, batch_stats), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(before.params)
        gradients.append(gradient)
        losses.append(loss)
    assert float(metrics["loss"]) == pytest.approx(float(np.mean(losses)), rel=1e-5)
    decay, lr = config.optimizer.weight_decay, config.optimizer.lr
    for leaf, found, first, second in zip(
        *map(jax.tree.leaves, (before.params, after.params, *gradients)), strict=True
    ):
        expected = leaf - lr * ((first + second) / 2 + decay * leaf)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(*map(jax.tree.leaves, (after.batch_stats, batch_stats)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_dssn_accumulates_with_the_same_state_and_metrics(tiny_config):
    """Traced, not run: the loop over parts demands that every statistic keeps its shape and dtype."""
    found = []
    for accumulation in (1, 2):
        parts = experiment.build(tiny_config("dssn", train__accumulation=accumulation), jax.devices()[:2])
        batch = batches(parts, 1)[0]
        found.append(jax.eval_shape(parts.compile_step(), parts.abstract_state(), batch))
    assert found[0] == found[1] and TERMS["dssn"] <= set(found[1][1])
