"""Convolutions by products, which CPUs get, against XLA's convolutions and PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dssn_jax.models import convolution, depthwise, layers, platforms
from dssn_jax.models.platforms import Options


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_device(monkeypatch):
    """Gives convolutions what they choose where there is one device."""
    jax.clear_caches()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield
    jax.clear_caches()


@pytest.mark.parametrize(("channels", "features"), [(3, 4), pytest.param(4, 3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding", "size"),
    [
        (1, 1, 1, ((0, 0), (0, 0)), (9, 8)),
        (1, 2, 1, ((0, 0), (0, 0)), (9, 8)),
        (1, 1, 1, ((0, 0), (0, 0)), (30, 31)),  # Summed image by image.
        (3, 1, 12, ((12, 12), (12, 12)), (11, 11)),  # Only the center of the kernel reaches the image.
        (3, 1, 4, ((4, 4), (4, 4)), (5, 7)),
        (3, 2, 1, ((0, 1), (1, 1)), (10, 9)),
        (3, 2, 2, ((2, 2), (2, 1)), (3, 4)),
    ],
)
def test_products_are_a_convolution(x64, kernel, stride, dilation, padding, size, channels, features):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, *size, channels)), rng.normal(size=(kernel, kernel, channels, features))
    options = Options((stride, stride), padding, (dilation, dilation))

    def plain(x, weights):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, weights, options.strides, padding, rhs_dilation=options.dilation, dimension_numbers=dimensions
        )

    ours, backward = jax.vjp(lambda x, w: convolution.products(x, w, options), x, weights)
    expected, transpose = jax.vjp(plain, x, weights)
    gradient = rng.normal(size=expected.shape)
    for each, other in zip((ours, *backward(gradient)), (expected, *transpose(gradient)), strict=True):
        np.testing.assert_allclose(each, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "dilation", "padding", "size"),
    [
        (3, 1, ((1, 1), (1, 1)), (5, 4)),
        (3, 1, ((0, 2), (1, 1)), (23, 24)),  # Image by image.
        (3, 2, ((2, 2), (2, 2)), (6, 9)),
        (5, 1, ((0, 0), (0, 1)), (7, 8)),
    ],
)
def test_one_product_is_a_convolution(x64, kernel, dilation, padding, size):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, *size, 3)), rng.normal(size=(kernel, kernel, 3, 4))
    options = Options((1, 1), padding, (dilation, dilation))
    expected, transpose = jax.vjp(lambda x, w: platforms.plain(x, w, options), x, weights)
    gradient = rng.normal(size=expected.shape)
    ours = convolution.one_product(x, weights, options)
    by_arguments = convolution._one_product_gradients(jnp.asarray(x), weights, gradient, options)
    for each, other in zip((ours, *by_arguments), (expected, *transpose(gradient)), strict=True):
        np.testing.assert_allclose(each, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"kernel": 1}, 9),
        ({"kernel": 1, "stride": 2}, 9),
        ({"kernel": 3}, 9),
        ({"kernel": 3, "channels": 8}, 9),  # Enough channels to sum the gradient of the kernel image by image.
        ({"kernel": 3, "stride": 2, "channels": 8}, 9),
        ({"kernel": 3, "stride": 2, "channels": 8}, 10),
        ({"kernel": 3, "dilation": 2, "channels": 8}, 10),
        ({"kernel": 3, "dilation": 12}, 9),
        ({"kernel": 3, "stride": 2, "groups": 4}, 9),
        ({"kernel": 3, "dilation": 2, "groups": 4}, 8),
    ],
)
def test_layers_convolve_as_pytorch(x64, one_device, options, size):
    torch = pytest.importorskip("torch")
    options = options.copy()
    channels = options.pop("channels", 4)
    x = np.random.default_rng(0).normal(size=(2, size, size, channels))
    layer = layers.conv(4, dtype=jnp.float64, param_dtype=jnp.float64, **options)
    variables = layer.init(jax.random.PRNGKey(0), x)
    ours, backward = jax.vjp(layer.apply, variables, x)
    kernel = torch.tensor(np.transpose(variables["params"]["kernel"], (3, 2, 0, 1)), requires_grad=True)
    images = torch.tensor(np.transpose(x, (0, 3, 1, 2)), requires_grad=True)
    padding = options.get("dilation", 1) * (options["kernel"] - 1) // 2
    settings = {name: options.get(name, 1) for name in ("stride", "dilation", "groups")}
    theirs = torch.nn.functional.conv2d(images, kernel, padding=padding, **settings)
    np.testing.assert_allclose(ours, theirs.detach().permute(0, 2, 3, 1), rtol=0, atol=1e-12)
    theirs.square().sum().backward()
    by_variables, by_x = backward(2 * ours)
    np.testing.assert_allclose(by_x, images.grad.permute(0, 2, 3, 1), rtol=0, atol=1e-12)
    np.testing.assert_allclose(by_variables["params"]["kernel"], kernel.grad.permute(2, 3, 1, 0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize(
    ("options", "on_cpu"),
    [
        ({"kernel": 1}, 0),
        ({"kernel": 3, "dilation": 12}, 0),
        ({"kernel": 3, "groups": 8}, 0),
        ({"kernel": 3}, 2),  # All but the gradient of the kernel.
        ({"kernel": 3, "dtype": jnp.bfloat16}, 0),
        ({"kernel": 3, "stride": 2, "dtype": jnp.bfloat16}, 2),
    ],
)
def test_only_accelerators_get_all_convolutions(one_device, platform, options, on_cpu):
    """Forward, and backward for both arguments."""
    layer, x = layers.conv(8, **options), jnp.zeros((1, 9, 9, 8))
    variables = jax.eval_shape(layer.init, jax.random.PRNGKey(0), x)

    def step(variables, x):
        y, backward = jax.vjp(layer.apply, variables, x)
        return y, backward(y)

    lowered = jax.jit(step).trace(variables, x).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("stablehlo.convolution") == (on_cpu if platform == "cpu" else 3)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding", "shape"),
    [
        (3, 1, 1, ((1, 1), (1, 1)), (2, 5, 4, 3)),
        (3, 2, 1, ((0, 1), (1, 1)), (2, 10, 9, 3)),
        (5, 2, 1, ((0, 0), (2, 1)), (1, 10, 12, 4)),
        (5, 1, 2, ((4, 4), (3, 0)), (1, 6, 10, 2)),
    ],
)
def test_shifted_products_are_a_grouped_convolution(x64, kernel, stride, dilation, padding, shape):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=shape), rng.normal(size=(kernel, kernel, 1, shape[-1]))
    forms = depthwise.depthwise_conv, platforms.plain
    options = Options((stride, stride), padding, (dilation, dilation))
    (ours, backward), (grouped, transpose) = (
        jax.vjp(lambda x, w, form=form: form(x, w, options), x, weights) for form in forms
    )
    gradient = rng.normal(size=grouped.shape)
    for each, expected in zip((ours, *backward(gradient)), (grouped, *transpose(gradient)), strict=True):
        np.testing.assert_allclose(each, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("groups", "features"), [(8, 8), (1, 16)], ids=["depthwise", "dense"])
def test_bfloat16_sums_products_in_float32(one_device, groups, features):
    """The result is the sum of exact products, rounded once."""
    rng = np.random.default_rng(0)
    x, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((1, 9, 9, 8), (5, 5, 8 // groups, features))
    )
    dimensions = {"rhs_dilation": (1, 1), "feature_group_count": groups}
    ours = convolution.conv_general_dilated(x, weights, (1, 1), "SAME", **dimensions)
    assert ours.dtype == jnp.bfloat16
    options = Options((1, 1), ((2, 2), (2, 2)), (1, 1))
    exact = platforms.plain(x.astype(jnp.float32), weights.astype(jnp.float32), options)
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_cpus_alone_round_products_after_their_sum(platform):
    """XLA multiplies bfloat16 fast on a CPU if the product has float32 sums; elsewhere the kernel rounds."""
    x, y = jnp.zeros((2, 8, 8), jnp.bfloat16), jnp.zeros((2, 8, 8), jnp.bfloat16)
    dimensions = (((2,), (1,)), ((0,), (0,)))
    product = jax.jit(lambda x, y: platforms.dot_general(x, y, dimensions))
    lines = product.trace(x, y).lower(lowering_platforms=(platform,)).as_text().splitlines()
    (line,) = (line for line in lines if "stablehlo.dot_general" in line)
    assert line.endswith("tensor<2x8x8xf32>" if platform == "cpu" else "tensor<2x8x8xbf16>")
