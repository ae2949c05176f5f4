import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax import models
from dssn_jax.models import layers
from dssn_jax.models.resize import resize
from dssn_jax.weights import names as state_dicts


def build(config, **options):
    config.model.update(options)
    return models.build(config.model, len(config.data.classes))


def variables_of(model, size=33):
    return jax.jit(model.init)(jax.random.PRNGKey(0), jnp.zeros((1, size, size, 3)))


@pytest.mark.parametrize(
    ("backbone", "classes", "millions"), [("resnet50", 21, 40.5), ("resnet101", 21, 59.5), ("xception", 21, 54.7)]
)
def test_number_of_parameters(tiny_config, backbone, classes, millions):
    config = tiny_config()
    config.model.update({"backbone": backbone, "decoder_channels": 256})
    model = models.build(config.model, classes)
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.zeros((1, 33, 33, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("backbone", ["resnet10w16", "resnet50", "xception"])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_output_stride(tiny_config, backbone, output_stride):
    model = build(tiny_config(), backbone=backbone, output_stride=output_stride)
    image = jnp.zeros((2, 65, 97, 3))
    variables = jax.eval_shape(model.init, jax.random.PRNGKey(0), image)
    c1, c4 = jax.eval_shape(functools.partial(model.apply, method="features"), variables, image)
    assert c1.shape[1:3] == (17, 25)
    assert c4.shape[1:3] == (-(-65 // output_stride), -(-97 // output_stride))
    assert jax.eval_shape(model.apply, variables, image).shape == (2, 65, 97, 6)


def test_remat_changes_nothing(tiny_config):
    image = jax.random.normal(jax.random.PRNGKey(1), (2, 33, 33, 3))
    plain, remat = (build(tiny_config(), remat=remat) for remat in (False, True))
    variables = variables_of(plain)

    def loss(params, model):
        logits, _ = model.apply({**variables, "params": params}, image, train=True, mutable=["batch_stats"])
        return jnp.square(logits).mean()

    gradients = [jax.jit(jax.grad(loss), static_argnums=1)(variables["params"], model) for model in (plain, remat)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *gradients)
    hlo = [jax.make_jaxpr(jax.grad(loss), static_argnums=1)(variables["params"], model) for model in (plain, remat)]
    assert "remat" in str(hlo[1]) and "remat" not in str(hlo[0])


def test_bfloat16_computes_over_float32_weights(tiny_config):
    image = jax.random.normal(jax.random.PRNGKey(1), (2, 33, 33, 3))
    exact, rounded = (build(tiny_config(), dtype=dtype) for dtype in ("float32", "bfloat16"))
    variables = variables_of(rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.jit(rounded.apply)(variables, image)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, jax.jit(exact.apply)(variables, image), atol=0.1)
    _, c4 = jax.eval_shape(functools.partial(rounded.apply, method="features"), variables, image)
    assert c4.dtype == jnp.bfloat16


def test_initial_weights_are_pytorchs(tiny_config):
    params = variables_of(build(tiny_config()))["params"]
    kernel = params["fuse_0"]["kernel"]  # Uniform within 1 / sqrt(fan_in), whose deviation is that / sqrt(3).
    bound = (3 * 3 * kernel.shape[2]) ** -0.5
    assert np.abs(kernel).max() <= bound
    assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.05)
    bias = params["classifier"]["bias"]
    assert 0 < np.abs(bias).max() <= 16**-0.5
    assert np.all(params["reduce_1"]["scale"] == 1) and np.all(params["reduce_1"]["bias"] == 0)


def test_resize_has_aligned_corners():
    x = jax.random.normal(jax.random.PRNGKey(0), (1, 4, 3, 2))
    y = resize(x, 7, 9)
    np.testing.assert_allclose(y[:, ::6, ::8], x[:, ::3, ::2], rtol=1e-6)  # Corners stay.
    np.testing.assert_allclose(y[0, 1, 0], (x[0, 0, 0] + x[0, 1, 0]) / 2, rtol=1e-6)
    np.testing.assert_allclose(y[0, 0, 1], 0.75 * x[0, 0, 0] + 0.25 * x[0, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(resize(x, 1, 1)[:, 0, 0], x[:, 0, 0])  # As PyTorch: the first pixel.
    np.testing.assert_allclose(resize(x[:, :1, :1], 5, 6), np.broadcast_to(x[:, :1, :1], (1, 5, 6, 2)))


def test_batch_norm_by_hand():
    x = np.random.default_rng(0).normal(2, 3, (4, 5, 6, 3)).astype(np.float32)
    norm = layers.BatchNorm(momentum=0.1)
    variables = norm.init(jax.random.PRNGKey(0), x, False)
    y, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
    mean, flat = x.mean((0, 1, 2)), x.reshape(-1, 3)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(flat.var(0) + 1e-5), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(norm.apply(variables, x, False), x / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_channel_dropout_drops_whole_channels():
    dropped = np.asarray(layers.channel_dropout(jnp.ones((8, 4, 4, 500)), 0.5, jax.random.PRNGKey(0)))
    assert np.array_equal(dropped, np.broadcast_to(dropped[:, :1, :1], dropped.shape))
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert (dropped == 0).mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("perturb_all", [True, False])
def test_feature_views(tiny_config, perturb_all):
    """The images are decoded unperturbed; the views of the last batch differ from it and from each other."""
    model = build(tiny_config())
    parts = tuple(jax.random.normal(jax.random.PRNGKey(i), (2, 33, 33, 3)) for i in range(2))
    variables = variables_of(model)
    options = dict(views=2, train=False, perturb_all=perturb_all, method="coarse_with_feature_views")
    views = jax.jit(lambda rngs: model.apply(variables, parts, rngs=rngs, **options))
    clean, (first, second) = views({"dropout": jax.random.PRNGKey(2)})
    for part, logits in zip(parts, clean, strict=True):
        expected = jax.jit(functools.partial(model.apply, method="coarse"))(variables, part)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert first.shape == second.shape == clean[1].shape
    assert np.abs(clean[1] - first).max() > 1e-3 and np.abs(first - second).max() > 1e-3
    again = views({"dropout": jax.random.PRNGKey(2)})
    np.testing.assert_array_equal(again[1][1], second)


def test_views_of_labeled_images_matter_to_the_statistics_alone(tiny_config):
    """Without dropout a copy is the image: copies of all leave the statistics, copies of the last weigh it more."""
    model = build(tiny_config(method__feature_dropout=0.0))
    parts = tuple(jax.random.normal(jax.random.PRNGKey(i), (2, 33, 33, 3)) for i in range(2))
    variables = variables_of(model)

    def statistics(parts, **options):
        options |= {"method": "coarse_with_feature_views", "mutable": ["batch_stats"], "train": True}
        _, updated = jax.jit(lambda parts: model.apply(variables, parts, **options))(parts)
        return updated["batch_stats"]["reduce_1"]["mean"]

    none = statistics(parts, views=0, perturb_all=False)
    np.testing.assert_allclose(statistics(parts, views=2, perturb_all=True), none, rtol=1e-3, atol=1e-6)
    assert not np.allclose(statistics(parts, views=2, perturb_all=False), none, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_batch_norm_are_those_of_its_formula(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + rng.normal(0, 2, (2, 4, 5, 3)), dtype)
    scale, bias, weights = (jnp.asarray(rng.normal(1, 0.3, shape), jnp.float32) for shape in ((3,), (3,), x.shape))

    def by_formula(x, scale, bias):
        wide = x.astype(jnp.float32)
        normalized = (wide - wide.mean((0, 1, 2))) / jnp.sqrt(wide.var((0, 1, 2)) + 1e-5)
        return (weights * (normalized * scale + bias)).sum()

    def by_layer(x, scale, bias):
        norm, stats = layers.BatchNorm(dtype=x.dtype), {"mean": jnp.full(3, 2.5), "var": jnp.ones(3)}
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        return (weights * norm.apply(variables, x, True, mutable=["batch_stats"])[0]).sum()

    found, expected = (jax.grad(loss, (0, 1, 2))(x, scale, bias) for loss in (by_layer, by_formula))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(each, np.float32) for each in (one, other))
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=(1e-4 if dtype == "float32" else 2e-2))


def test_state_dict_names_round_trip(tiny_config):
    variables = variables_of(build(tiny_config()))
    state_dict = state_dicts.to_state_dict(variables)
    assert state_dict["backbone.layer2.0.downsample.0.weight"].shape == (32, 16, 1, 1)
    assert "head.b4.gap.2.running_var" in state_dict and "classifier.bias" in state_dict
    assert len(state_dict) == len(flax.traverse_util.flatten_dict(variables))
    jax.tree.map(np.testing.assert_array_equal, state_dicts.from_state_dict(state_dict, variables), dict(variables))
