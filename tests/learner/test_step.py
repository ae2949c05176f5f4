"""The training step: its terms, devices, determinism, teacher, accumulation, dtypes, frozen parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import methods
from dssn_jax import sharding
from dssn_jax.learner import learner as learners
from dssn_jax.learner import step as steps
from input_pipeline.pipeline import run_length, train_dataset
from input_pipeline.sources.open import open_sources

METHODS = ("supervised", "fixmatch", "unimatch", "dssn")
TERMS = {
    "supervised": {"loss_x"},
    "fixmatch": {"loss_x", "loss_s1"},
    "unimatch": {"loss_x", "loss_s1", "loss_s2", "loss_fp1"},
    "dssn": {"loss_x", "loss_s1", "loss_s2", "loss_fp1", "loss_fp2", "contrast_image", "contrast_feature"},
}


def build(config, devices=1):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    return learners.build(config, mesh, run_length(open_sources(config), config))


def start(config, devices=1):
    """Returns (learner, state, jitted step) over so many devices."""
    learner = build(config, devices)
    return learner, learner.init_state(), learner.make_train_step()


def batches(learner, count):
    dataset = train_dataset(open_sources(learner.config), learner.config)
    return [sharding.put_batch(dataset[i], learner.mesh) for i in range(count)]


def run(config, count, devices=1):
    learner, state, step = start(config, devices)
    history = []
    for batch in batches(learner, count):
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name != "dssn")) for name in METHODS]
)
def test_each_method_has_its_terms_and_they_sum_up(tiny_config, method):
    config = tiny_config(method, method__threshold=0.0, method__selection="threshold")
    state, (first, second) = run(config, 2)
    weights = config.method
    for metrics, strong in ((first, 0.0 if method == "dssn" else 1.0), (second, 1.0)):  # DSSN's teacher warms up.
        shares = metrics.pop("pseudo_labels", None)
        metrics = {name: float(value) for name, value in metrics.items()}
        assert {name for name in metrics if name.startswith(("loss_", "contrast_"))} == TERMS[method]
        total = metrics["loss_x"]
        total += strong * weights.strong_weight * sum(v for k, v in metrics.items() if k.startswith("loss_s"))
        total += weights.feature_weight * sum(v for k, v in metrics.items() if k.startswith("loss_fp"))
        total += 0.01 * sum(v for k, v in metrics.items() if k.startswith("contrast_"))
        total *= 1.0 if method == "supervised" else 0.5
        assert metrics["loss"] == pytest.approx(total, rel=1e-5)
        if method == "supervised":
            assert shares is None
        else:
            assert metrics["mask_ratio"] == 1.0
            assert shares.shape == (6,) and shares.sum() == pytest.approx(1.0, rel=1e-5)
    assert (state.teacher is None) == (method != "dssn")


@pytest.fixture
def exact_config(tiny_config):
    """DSSN in float64, so that differences between device counts are not rounding that training has amplified."""
    with jax.enable_x64(True):
        yield tiny_config(
            method__threshold=0.0, model__dtype="float64", model__param_dtype="float64", ema__batch_stats_epochs=1
        )


@pytest.mark.slow
def test_one_and_four_devices_agree(exact_config):
    alone, alone_metrics = run(exact_config, 3, devices=1)
    shared, shared_metrics = run(exact_config, 3, devices=4)
    for one, four in zip(alone_metrics, shared_metrics, strict=True):
        assert set(one) == set(four)
        for name in one:
            np.testing.assert_allclose(one[name], four[name], rtol=1e-8, atol=1e-12, err_msg=name)
    for one, four in zip(*map(jax.tree.leaves, (alone.student["params"], shared.student["params"])), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, four, rtol=1e-6, atol=1e-10)


@pytest.mark.slow
def test_no_all_to_all_in_the_compiled_step(exact_config):
    learner, state, step = start(exact_config, devices=4)
    text = step.lower(state, batches(learner, 1)[0]).compile().as_text()
    assert "all-reduce" in text  # It is a program for several devices,
    assert "all-to-all" not in text  # which do not exchange images,
    # (in float64 XLA gathers the images for the gradient of the max pooling; in float32 and bfloat16 it does not)
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert all("select_and_scatter" in line for line in gathers)
    # and reduce little but often. A batch norm reduces its sums together: in the forward and the backward pass of both
    # student forwards, and in the teacher's forward. Parallel ones share a reduction; all gradients do, and the loss
    # terms take a few.
    norms = len(jax.tree.leaves(state.student["batch_stats"])) // 2
    assert text.count(" all-reduce(") <= 5 * norms + 8


@pytest.mark.slow
def test_labeled_partners_stay_on_their_device(exact_config):
    """Four devices exchange sums alone, and agree with one."""
    config = exact_config
    methods.apply(config, "fixmatch")
    config.views.update({"mix_partner": "labeled", "paste_classes": 1})
    config.method.update({"threshold": 0.3, "class_weight_power": 0.5, "align_classes": True})
    config.data.class_pixels = (60, 10, 10, 10, 9, 1)
    learner, state, step = start(config, devices=4)
    given = batches(learner, 1)[0]
    text = step.lower(state, given).compile().as_text()
    assert "all-reduce" in text and "all-to-all" not in text and "collective-permute" not in text
    _, metrics = step(state, given)
    _, (alone,) = run(config, 1)
    assert alone.keys() == metrics.keys()
    for name in alone:
        np.testing.assert_allclose(alone[name], metrics[name], rtol=1e-8, atol=1e-12, err_msg=name)


@pytest.mark.slow
def test_no_all_to_all_with_unequal_batches(tiny_config):
    """The labeled batch is twice the unlabeled one: rows are joined in groups."""
    options = {"method__strong_views": 0, "method__image_contrast_weight": 0.0}
    learner, state, step = start(tiny_config(data__labeled_batch=8, **options), devices=4)
    text = step.lower(state, batches(learner, 1)[0]).compile().as_text()
    assert "all-reduce" in text and "all-to-all" not in text


@pytest.mark.slow
def test_same_seed_same_run(tiny_config):
    learner, _, step = start(tiny_config())
    given = batches(learner, 3)

    def losses(seed):
        state, history = build(tiny_config(seed=seed)).init_state(), []
        for batch in given:
            state, metrics = step(state, batch)
            history.append(jax.device_get(metrics))
        return jax.device_get(state), history

    first, second, other = losses(0), losses(0), losses(1)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert other[1][0]["loss"] != first[1][0]["loss"]
    jax.tree.map(np.testing.assert_array_equal, given, batches(learner, 3))


def test_keys_of_a_step_are_all_different():
    """Keys of strong views, dropout and positions, by micro-batch, differ over three steps and from their parents."""
    rng, keys = jax.random.PRNGKey(0), []
    for step in range(3):
        parent = jax.random.fold_in(rng, step)
        keys += [parent, steps.stream_key(rng, step, steps.VIEWS)]
        for stream in (steps.DROPOUT, steps.ROPE):
            keys.append(steps.stream_key(rng, step, stream))
            keys += [jax.random.fold_in(keys[-1], micro_batch) for micro_batch in range(4)]
    assert len({np.asarray(key).tobytes() for key in [rng, *keys]}) == len(keys) + 1


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ce", "ohem"])
def test_a_batch_without_a_valid_pixel_is_harmless(tiny_config, loss):
    learner, state, step = start(tiny_config("dssn" if loss == "ce" else "supervised", method__labeled_loss=loss))
    batch = batches(learner, 1)[0]
    batch = batch._replace(label_x=jnp.full_like(batch.label_x, 255))
    if batch.valid_u is not None:
        batch = batch._replace(valid_u=jnp.zeros_like(batch.valid_u), valid_m=jnp.zeros_like(batch.valid_m))
    new_state, metrics = step(state, batch)
    for name, value in metrics.items():
        assert np.isfinite(value).all(), name
    assert not np.any(metrics.get("pseudo_labels", 0.0))
    assert {float(value) for name, value in metrics.items() if name.startswith(("loss_", "mask_ratio"))} == {0.0}
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new_state.student))


@pytest.mark.slow
def test_teacher_is_a_copy_after_warm_up_and_an_average_later(tiny_config):
    learner, state, step = start(tiny_config(ema__decay=0.9))
    first, second = batches(learner, 2)
    state, _ = step(state, first)
    jax.tree.map(np.testing.assert_array_equal, state.teacher, state.student)
    before = jax.device_get(state.teacher["params"])
    state, _ = step(state, second)
    averages = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * np.asarray(new), before, state.student["params"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, state.teacher["params"], averages)


@pytest.mark.slow
def test_frozen_encoder_has_no_gradient_no_momentum_and_no_second_copy(tiny_config):
    learner, state, step = start(tiny_config(optimizer__freeze="encoder/"))
    before = jax.device_get(state.student["params"])
    assert list(state.teacher["params"]) == ["decoder"]
    momentum = optax.tree_utils.tree_get(state.opt_state, "trace")
    assert list(momentum) == ["decoder"]
    for batch in batches(learner, 2):
        state, metrics = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, state.student["params"]["encoder"], before["encoder"])
    assert np.any(
        state.student["params"]["decoder"]["classifier"]["kernel"] != before["decoder"]["classifier"]["kernel"]
    )
    teacher = state.networks()["teacher"]
    jax.tree.map(np.testing.assert_array_equal, teacher["params"]["encoder"], before["encoder"])
    assert float(metrics["grad_norm"]) > 0


@pytest.mark.slow
def test_loss_falls_on_a_repeated_batch(tiny_config):
    learner, state, step = start(tiny_config("unimatch", method__threshold=0.0))
    batch, values = batches(learner, 1)[0], []
    for _ in range(6):
        state, metrics = step(state, batch)
        values.append(float(metrics["loss_x"]))
    assert values[-1] < 0.8 * values[0]
    assert optax.tree_utils.tree_get(state.opt_state, "count") == 6


@pytest.mark.slow
def test_adamw_trains(tiny_config):
    config = tiny_config("supervised", optimizer__name="adamw", optimizer__lr=0.003)
    learner, state, step = start(config)
    batch, values = batches(learner, 1)[0], []
    for _ in range(6):
        state, metrics = step(state, batch)
        values.append(float(metrics["loss"]))
    assert values[-1] < 0.9 * values[0]


@pytest.mark.slow
def test_accumulated_gradients_make_one_update_of_their_mean(tiny_config):
    """Two micro-batches of a batch of 4 on 2 devices: the first has the first row of each device."""
    config = tiny_config("supervised", train__accumulation=2, method__labeled_batch_factor=1)
    learner, state, step = start(config, devices=2)
    batch = batches(learner, 1)[0]
    before = jax.device_get(state)
    images, labels = np.asarray(learner.normalize(batch.image_x)), np.asarray(batch.label_x)
    after, metrics = step(state, batch)

    batch_stats, gradients, losses = before.student["batch_stats"], [], []
    for rows in ([0, 2], [1, 3]):

        def loss_fn(params, batch_stats=batch_stats, rows=rows):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = learner.network.apply(variables, images[rows], train=True, mutable=["batch_stats"])
            valid = labels[rows] != 255
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, np.where(valid, labels[rows], 0))
            return (losses * valid).sum() / valid.sum(), updated["batch_stats"]

        grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        (loss, batch_stats), gradient = grad(before.student["params"])
        gradients.append(gradient)
        losses.append(loss)
    assert float(metrics["loss"]) == pytest.approx(float(np.mean(losses)), rel=1e-5)
    decay, lr = config.optimizer.weight_decay, config.optimizer.lr
    trees = (before.student["params"], after.student["params"], *gradients)
    for leaf, updated, first, second in zip(*map(jax.tree.leaves, trees), strict=True):
        expected = leaf - lr * ((first + second) / 2 + decay * leaf)
        np.testing.assert_allclose(updated, expected, rtol=1e-4, atol=1e-5)
    for ours, expected in zip(*map(jax.tree.leaves, (after.student["batch_stats"], batch_stats)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selection", "devices", "rows"), [("adaptive", 4, [[0, 1, 2, 3]]), ("soft", 2, [[0, 2], [1, 3]])]
)
def test_running_statistics_are_those_of_the_global_batch(tiny_config, selection, devices, rows):
    """Two steps, by the teacher applied by hand; `rows` are those of each micro-batch."""
    config = tiny_config(
        "fixmatch", method__teacher="ema", method__selection=selection, method__selection_momentum=0.5,
        train__accumulation=len(rows),
    )  # fmt: skip
    learner, state, step = start(config, devices)
    expected, initial = learner.method.selection.init(6), jax.device_get(state.method_state)
    predict = jax.jit(functools.partial(learner.network.apply, method="low_res_logits"))
    for batch in batches(learner, 2):
        images, valid = np.asarray(learner.normalize(batch.image_u)), np.asarray(batch.valid_u)
        teacher = jax.device_get(state.networks()["teacher"])
        for part in rows:
            logits = predict(teacher, images[part])
            at = np.round(np.linspace(0, 32, logits.shape[1])).astype(int)
            expected = learner.method.selection.update(expected, logits, jnp.asarray(valid[part][:, at][:, :, at]))
        state, metrics = step(state, batch)
        assert 0 < float(metrics["mask_ratio"]) <= 1
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), state.method_state, expected)
    assert all(np.any(new != old) for new, old in zip(*map(jax.tree.leaves, (expected, initial)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["adaptive", "soft"])
def test_running_selections_agree_on_one_and_four_devices(exact_config, selection):
    methods.apply(exact_config, "fixmatch")
    exact_config.method.update({"selection": selection, "selection_momentum": 0.0})
    (alone, alone_metrics), (shared, shared_metrics) = (run(exact_config, 3, devices) for devices in (1, 4))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-10)  # The statistics are in float32.
    jax.tree.map(close, (alone.method_state, alone_metrics), (shared.method_state, shared_metrics))
    assert 0 < alone_metrics[-1]["mask_ratio_s1"] < 1


@pytest.mark.slow
def test_dssn_accumulates_with_the_same_state_and_metrics(tiny_config):
    """Traced, not run: the scan over micro-batches demands that every statistic keeps its shape and dtype."""
    traced = []
    for accumulation in (1, 2):
        options = {"method__selection": "adaptive", "train__accumulation": accumulation}
        learner = build(tiny_config("dssn", **options), devices=2)
        traced.append(jax.eval_shape(learner.make_train_step(), learner.abstract_state(), batches(learner, 1)[0]))
    assert traced[0] == traced[1] and TERMS["dssn"] <= set(traced[0][1])


@pytest.mark.slow
def test_labeled_partners_and_class_weights_accumulate(tiny_config):
    """Traced, not run: the same state and metrics as with the other partners."""
    traced, plain = [], {"train__accumulation": 2, "method__labeled_loss": "ohem"}
    pasting = {"views__mix_partner": "labeled", "views__paste_classes": 1, "method__class_weight_power": 1.0}
    for options in ({}, pasting | {"data__class_pixels": (1, 2, 3, 4, 5, 0)}):
        learner = build(tiny_config("dssn", **plain, **options), devices=2)
        traced.append(jax.eval_shape(learner.make_train_step(), learner.abstract_state(), batches(learner, 1)[0]))
    assert traced[0] == traced[1]


@pytest.mark.slow
def test_bfloat16_steps_over_float32_parameters(tiny_config):
    """The first loss is that of float32 up to rounding; parameters and statistics stay float32."""
    _, (exact,) = run(tiny_config(), 1)
    state, (rounded,) = run(tiny_config(model__dtype="bfloat16"), 1)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.student, state.teacher))} == {np.dtype("float32")}
    assert rounded["loss"].dtype == np.float32
    assert float(rounded["loss_x"]) == pytest.approx(float(exact["loss_x"]), rel=0.02)


@pytest.mark.slow
def test_a_rematerialized_step_is_the_same(tiny_config):
    """In float64, where the order of operations leaves no trace."""
    with jax.enable_x64(True):
        types = {"model__dtype": "float64", "model__param_dtype": "float64"}
        plain, _ = run(tiny_config(**types), 1)
        remat, _ = run(tiny_config(model__remat=True, **types), 1)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), plain.student, remat.student)
