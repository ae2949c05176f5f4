import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import defaults
from configs.checks import ConfigError
from dssn_jax import models
from dssn_jax.models import resize as resizing
from dssn_jax.models.resize import resize


def build(config, **options):
    config.model.update(options)
    return models.build(config.model, len(config.data.classes))


def variables_of(network, size=33):
    return jax.jit(network.init)(jax.random.PRNGKey(0), jnp.zeros((1, size, size, 3)))


@pytest.mark.parametrize(
    ("encoder", "classes", "millions"), [("resnet50", 21, 40.5), ("resnet101", 21, 59.5), ("xception", 21, 54.7)]
)
def test_number_of_parameters(encoder, classes, millions):
    model = defaults.get_config().model
    model.encoder = encoder
    network = models.build(model, classes)
    shapes = jax.eval_shape(network.init, jax.random.PRNGKey(0), jnp.zeros((1, 33, 33, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("encoder", ["resnet10w16", "resnet50", "xception"])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_output_stride(tiny_config, encoder, output_stride):
    network = build(tiny_config(), encoder=encoder, output_stride=output_stride)
    image = jnp.zeros((2, 65, 97, 3))
    variables = jax.eval_shape(network.init, jax.random.PRNGKey(0), image)
    c1, c4 = jax.eval_shape(functools.partial(network.apply, method="encode"), variables, image)
    assert c1.shape[1:3] == (17, 25)
    assert c4.shape[1:3] == (-(-65 // output_stride), -(-97 // output_stride))
    assert jax.eval_shape(network.apply, variables, image).shape == (2, 65, 97, 6)


@pytest.mark.parametrize(
    ("encoder", "decoder", "low_res"),
    [
        ("dinov2_w64", "dpt", (24, 40)), ("dinov3_w64", "dpt", (24, 40)), ("dinov2_w64", "linear", (3, 5)),
        ("resnet10w16", "linear", (3, 5)),
    ],
)  # fmt: skip
def test_resolution_of_decoders(tiny_config, encoder, decoder, low_res):
    network = build(tiny_config(), encoder=encoder, decoder=decoder)
    multiple = network.size_multiple if network.size_multiple > 1 else 16
    image = jnp.zeros((2, 3 * multiple, 5 * multiple, 3))
    variables = jax.eval_shape(network.init, jax.random.PRNGKey(0), image)
    logits = jax.eval_shape(functools.partial(network.apply, method="low_res_logits"), variables, image)
    assert logits.shape == (2, *low_res, 6)
    assert jax.eval_shape(network.apply, variables, image).shape == (*image.shape[:3], 6)


@pytest.mark.slow
def test_remat_changes_nothing(tiny_config):
    """In float64, where the order of operations leaves no trace."""
    with jax.enable_x64(True):
        types = {"dtype": "float64", "param_dtype": "float64"}
        image = jax.random.normal(jax.random.PRNGKey(1), (2, 33, 33, 3), jnp.float64)
        plain, remat = (build(tiny_config(), remat=remat, **types) for remat in (False, True))
        variables = variables_of(plain)

        def loss(params, network):
            logits, _ = network.apply({**variables, "params": params}, image, train=True, mutable=["batch_stats"])
            return jnp.square(logits).mean()

        grad = jax.jit(jax.grad(loss), static_argnums=1)
        gradients = [grad(variables["params"], network) for network in (plain, remat)]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), *gradients)
        traces = [
            str(jax.make_jaxpr(grad, static_argnums=1)(variables["params"], network)) for network in (plain, remat)
        ]
    assert "remat" in traces[1] and "remat" not in traces[0]


@pytest.mark.slow
def test_bfloat16_computes_over_float32_weights(tiny_config):
    image = jax.random.normal(jax.random.PRNGKey(1), (2, 33, 33, 3))
    exact, rounded = (build(tiny_config(), dtype=dtype) for dtype in ("float32", "bfloat16"))
    variables = variables_of(rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.jit(rounded.apply)(variables, image)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, jax.jit(exact.apply)(variables, image), atol=0.1)
    _, c4 = jax.eval_shape(functools.partial(rounded.apply, method="encode"), variables, image)
    assert c4.dtype == jnp.bfloat16


def test_initial_weights_are_distributed_as_pytorchs(tiny_config):
    params = variables_of(build(tiny_config()))["params"]
    kernel = params["decoder"]["fuse_0"]["kernel"]  # Uniform within 1 / sqrt(fan_in).
    bound = (3 * 3 * kernel.shape[2]) ** -0.5
    assert np.abs(kernel).max() <= bound
    assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.05)
    bias = params["decoder"]["classifier"]["bias"]
    assert 0 < np.abs(bias).max() <= 16**-0.5
    assert np.all(params["decoder"]["reduce_1"]["scale"] == 1) and np.all(params["decoder"]["reduce_1"]["bias"] == 0)


def test_resize_has_aligned_corners():
    x = jax.random.normal(jax.random.PRNGKey(0), (1, 4, 3, 2))
    y = resize(x, 7, 9)
    np.testing.assert_allclose(y[:, ::6, ::8], x[:, ::3, ::2], rtol=1e-6)  # Corners stay.
    np.testing.assert_allclose(y[0, 1, 0], (x[0, 0, 0] + x[0, 1, 0]) / 2, rtol=1e-6)
    np.testing.assert_allclose(y[0, 0, 1], 0.75 * x[0, 0, 0] + 0.25 * x[0, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(resize(x, 1, 1)[:, 0, 0], x[:, 0, 0])  # As PyTorch: the first pixel.
    np.testing.assert_allclose(resize(x[:, :1, :1], 5, 6), np.broadcast_to(x[:, :1, :1], (1, 5, 6, 2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_multiples_are_resized_as_by_products(dtype):
    """So are gradients, in the form of GPUs too."""
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 5, 3, 4), (2, 13, 9, 4)))
    exact = functools.partial(resizing._by_products, height=13, width=9, precision=jax.lax.Precision.HIGHEST)
    expected, transposed = jax.vjp(exact, x.astype(jnp.float32))
    expected_gradient = transposed(weights.astype(jnp.float32))[0]
    ours, gradient = jax.vjp(lambda x: resize(x, 13, 9), x)
    of_gpu = resizing._stretch_transposed(resizing._stretch_transposed(weights, 4, 2), 3, 1)
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    tolerance = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    for each, reference in ((ours, expected), (gradient(weights)[0], expected_gradient), (of_gpu, expected_gradient)):
        assert each.dtype == x.dtype
        close(np.asarray(each, np.float32), reference, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "resnet5"}, "did you mean 'resnet50'"),
        ({"decoder": "deeplab"}, "did you mean 'deeplabv3plus'"),
        (
            {"decoder": "dpt"},
            "four feature maps of equal stride.*; resnet10w16 has maps of stride 4, 16; "
            "decoders for this encoder: deeplabv3plus, linear",
        ),
        (
            {"encoder": "dinov2_w64"},
            "which refines its result with a feature map of stride 4; dinov2_w64 has maps of stride 14, 14, 14, 14; "
            "decoders for this encoder: dpt, linear",
        ),
        ({"encoder": "xception", "stem": "7x7"}, "config.model.stem is '7x7'; xception has only 'deep'"),
        ({"encoder": "resnet50", "stem": "9x9"}, "unknown config.model.stem '9x9'.*known: deep, 7x7, deep_narrow"),
    ],
)
def test_unknown_networks_are_named(tiny_config, options, message):
    config = tiny_config()
    config.model.update(options)
    with pytest.raises(ConfigError, match=message):
        models.check(config.model)
