"""The training step with a vision transformer: UniMatch V2, DSSN, partners within the batch, a frozen encoder."""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes
from dssn_jax import sharding
from dssn_jax.learner import learner as learners
from dssn_jax.learner import step as steps
from dssn_jax.methods.objective import Keys
from dssn_jax.workdir.checkpoint import Checkpointer
from input_pipeline.pipeline import RunLength, train_dataset
from input_pipeline.sources.open import open_sources

FLOAT64 = {"model__dtype": "float64", "model__param_dtype": "float64"}


@pytest.fixture
def vit_config():
    """Returns a function (method, SECTION__KEY=value, ...) -> configuration of a small transformer and its recipe."""

    def make(method: str = "unimatch_v2", encoder: str = "dinov2_w64", **options):
        crop = 32 if encoder.startswith("dinov3") else 28
        config = shapes.get_config(f"method={method},encoder={encoder},crop={crop},labeled=8,steps=10")
        config.data.labeled_batch = config.data.unlabeled_batch = 4
        config.data.shapes.update({"size": 48, "unlabeled": 16, "val": 6})
        config.views.mix_partner = "reversed"
        config.method.threshold = 0.2
        config.optimizer.lr = 1e-4
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in options.items()})
        return config

    return make


def build(config, devices=1):
    return learners.build(config, sharding.make_mesh(jax.devices()[:devices]), RunLength(10, 4))


def batches(learner, count):
    dataset = train_dataset(open_sources(learner.config), learner.config)
    return [sharding.put_batch(dataset[i], learner.mesh) for i in range(count)]


def run(config, count, devices=1):
    """Returns the state after so many steps, their metrics, and the text of the compiled program."""
    learner = build(config, devices)
    state, given = learner.init_state(), batches(learner, count)
    step, history = learner.make_train_step().lower(state, given[0]).compile(), []
    for batch in given:
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history, step.as_text()


def assert_close(tree, other, rtol):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-12), tree, other)


@pytest.mark.slow
def test_unimatch_v2_on_four_devices_moves_no_row_and_equals_one(vit_config):
    """Partners and joined batches stay on their device; gradients and terms are summed, nothing else is exchanged."""
    config = vit_config(data__unlabeled_batch=8, **FLOAT64)
    with jax.enable_x64(True):
        one, one_metrics, _ = run(config, 2, devices=1)
        four, four_metrics, text = run(config, 2, devices=4)
    assert "all-reduce" in text
    assert "all-to-all" not in text and "collective-permute" not in text
    assert set(one_metrics[0]) >= {"loss_x", "loss_s1", "loss_s2", "mask_ratio"}
    assert not any(name.startswith(("loss_fp", "contrast")) for name in one_metrics[0])
    assert one_metrics[0]["loss_s1"] != one_metrics[0]["loss_s2"]
    assert_close(one_metrics, four_metrics, 1e-8)
    assert_close(one.student, four.student, 1e-6)


@pytest.mark.slow
def test_accumulation_and_exact_resume(vit_config, tmp_path):
    """Two micro-batches of two pairs; a run that continues from a checkpoint ends bit for bit like the whole one."""
    config = vit_config(data__labeled_batch=8, data__unlabeled_batch=8, train__accumulation=2)
    learner = build(config)
    step, given = learner.make_train_step(), batches(learner, 3)
    state = with_unused(learner.init_state())
    halves = [jax.tree.map(lambda rows, i=i: rows[4 * i : 4 * i + 4], given[0]) for i in range(2)]
    terms = [loss_x(learner, state, half) for half in halves]
    state, metrics = step(state, given[0])
    assert float(metrics["loss_x"]) == pytest.approx(np.mean(terms), rel=1e-5)
    with contextlib.closing(Checkpointer(tmp_path)) as saved:
        meta = {"config": json.loads(config.to_json()), "steps": 10, "scores": {"best_step": None}}
        saved.save(1, state, meta)
        saved.wait()
        restored, _ = saved.restore(1, learner.abstract_state(), config)
    for batch in given[1:]:
        state, _ = step(state, batch)
        restored, _ = step(restored, batch)
    jax.tree.map(np.testing.assert_array_equal, state, restored)
    assert jax.tree.leaves(state.student["unused"])
    for variables in (state.student, state.teacher):  # Neither gradients nor averages change what is unused.
        assert_close(variables["unused"], jax.tree.map(lambda x: np.full(x.shape, 0.5), variables["unused"]), 1e-6)
    moments = {path[-1] for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state) if "unused" in str(path)}
    assert not moments


def with_unused(state):
    """Gives unused weights a value, in student and teacher."""

    def fill(variables):
        return {**variables, "unused": jax.tree.map(lambda x: jnp.full_like(x, 0.5), variables["unused"])}

    return state.replace(student=fill(state.student), teacher=fill(state.teacher))


def loss_x(learner, state, batch) -> float:
    """Computes the labeled loss of a batch by hand."""
    logits = jax.jit(learner.network.apply)(state.student, learner.normalize(batch.image_x))
    labels = np.asarray(batch.label_x)
    chosen = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.where(labels == 255, 0, labels)[..., None], -1
    )
    return -float(chosen[..., 0][labels != 255].mean())


@pytest.mark.slow
def test_frozen_encoder_is_encoded_once_and_gives_the_same_gradients(vit_config, monkeypatch):
    """DSSN, whose weak views both networks read. Fewer operations, equal numbers."""
    config = vit_config("dssn", optimizer__freeze="encoder/", **FLOAT64)
    with jax.enable_x64(True):
        learner = build(config)
        step, state, batch = learner.train_step, learner.init_state(), batches(learner, 1)[0]
        state = state.replace(teacher=jax.tree.map(lambda x: 1.1 * x, state.teacher))
        views, keys = learner.views(batch, state.rng, state.step), step._keys(state, 0)

        def gradients():
            def compute(state, views, keys):
                return step.loss_and_grads(state, steps._carry(state), views, keys)[:2]

            lowered = jax.jit(compute).lower(state, views, keys)
            return lowered.compile()(state, views, keys), lowered.cost_analysis()["flops"]

        (grads, metrics), shared_flops = gradients()
        monkeypatch.setattr(steps.TrainStep, "_shares_encoder", lambda *_: False)
        (expected, expected_metrics), flops = gradients()
    assert list(grads) == ["decoder"] and shared_flops < flops
    assert_close(grads, expected, 1e-9)
    assert_close(metrics, expected_metrics, 1e-9)


@pytest.mark.parametrize(
    ("encoder", "options", "shares"),
    [
        ("dinov2_w64", {"optimizer__freeze": "encoder/"}, True),
        ("dinov2_w64", {"optimizer__freeze": "encoder/blocks_[012]"}, False),
        ("dinov3_w64", {"optimizer__freeze": "encoder/", "model__rope_rescale": 2.0}, False),
        ("resnet10w16", {"optimizer__freeze": "encoder/"}, False),  # Its running statistics move.
    ],
)
def test_which_encoders_are_shared(vit_config, encoder, options, shares):
    learner = build(vit_config(encoder=encoder, **options))
    student = learner.abstract_state().student
    trainable, _ = learner.optimizer.partition(student["params"])
    assert learner.train_step._shares_encoder(student, trainable) == shares


@pytest.mark.slow
def test_positions_are_rescaled_for_the_student_alone(vit_config):
    """Each key gives other positions, the same key the same ones; the teacher's logits need none."""
    learner = build(vit_config("supervised", "dinov3_w64", model__rope_rescale=2.0))
    objective, rng = learner.train_step.objective, np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), learner.abstract_state().student)
    views = learner.views(batches(learner, 1)[0], jax.random.PRNGKey(0), 0)
    forward = jax.jit(lambda key: objective.student_logits(variables, views, Keys(key, key))[0].labeled)
    first, again, other = (forward(jax.random.PRNGKey(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-6
    learner = build(vit_config("fixmatch", "dinov3_w64", model__rope_rescale=2.0))
    state = learner.abstract_state()
    views = jax.eval_shape(learner.views, batches(learner, 1)[0], state.rng, state.step)
    logits, _ = jax.eval_shape(
        learner.train_step.objective.teacher_logits, state.student, state.teacher, views, state.step
    )
    assert logits.weak is not None and logits.partner is None


@pytest.mark.slow
def test_dssn_learns_with_a_complementary_pair_of_feature_streams(vit_config):
    learner = build(vit_config("dssn", optimizer__lr=1e-3))
    names = {stream.name: type(stream.perturb).__name__ for stream in learner.method.streams}
    assert names == {"s1": "NoneType", "s2": "NoneType", "fp1": "ComplementaryDropout", "fp2": "ComplementaryDropout"}
    assert type(learner.method.selection).__name__ == "ClassAware"
    step, state, batch, history = learner.make_train_step(), learner.init_state(), batches(learner, 1)[0], []
    for _ in range(8):
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    assert {"loss_s2", "loss_fp2", "contrast_image", "contrast_feature"} <= set(history[0])
    assert history[0]["contrast_feature"] > 0
    for name in ("loss_x", "loss"):
        assert history[-1][name] < 0.9 * history[0][name]
    assert all(np.isfinite(value).all() for metrics in history for value in metrics.values())
