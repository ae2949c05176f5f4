"""Vision transformers against PyTorch's interpolation, transformers and timm with random weights, and formulas."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.checks import ConfigError
from configs.defaults import get_config
from dssn_jax import models, validate
from dssn_jax.models import attention, vit
from dssn_jax.models.extent import Extent
from dssn_jax.weights import names

TINY = {"width": 16, "depth": 2, "heads": 2, "hidden": 24, "levels": (0, 1)}
FORMS = {
    "dinov2": {"patch": 2, "side": 3},
    "dinov2_reg": {"patch": 2, "side": 3, "registers": 2, "antialias": True, "offset": 0.0, "ffn": "swiglu_fused"},
    "dinov3": {
        "patch": 4, "position": "rope", "registers": 2, "epsilon": 1e-5, "qkv_bias": "masked", "ffn": "swiglu",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def tiny(form, dtype="float64", param_dtype="float64", **fields):
    return vit.ViT(**TINY | FORMS[form] | fields, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))


@functools.cache
def shapes_of(network):
    image = jnp.zeros((1, network.patch, network.patch, 3), network.dtype)
    return jax.eval_shape(lambda: network.init(jax.random.PRNGKey(0), image, False))


def params_of(network):
    """Random numbers everywhere, biases and LayerScale too."""
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda leaf: draw(size=leaf.shape, scale=0.3).astype(leaf.dtype), shapes_of(network)["params"])


def images_of(network, height, width):
    size = (2, height * network.patch, width * network.patch, 3)
    return np.random.default_rng(1).normal(size=size).astype(network.dtype)


@functools.cache
def program(network, train, method):
    return jax.jit(lambda params, images, **options: network.apply(params, images, train, method=method, **options))


def run(network, params, images, train=False, method=None, **options):
    return program(network, train, method)({"params": params}, images, **options)


@pytest.mark.parametrize(
    ("encoder", "millions"),
    [
        ("dinov2_base_reg", 86.58),
        ("dinov3_small_plus", 28.70),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                ("dinov2_small", 22.06), ("dinov2_base", 86.58), ("dinov2_large", 304.37), ("dinov2_giant", 1136.48),
                ("dinov3_small", 21.60), ("dinov3_base", 85.67), ("dinov3_large", 303.15), ("dinov3_huge_plus", 840.63),
                ("dinov3_7b", 6716.03),
            ]
        ),
    ],
)  # fmt: skip
def test_number_of_parameters(encoder, millions):
    """As the originals count them, without the mask token."""
    model = get_config().model
    model.encoder = encoder
    network = models.ENCODERS[encoder].build(model, dtype=jnp.float32, param_dtype=jnp.float32)
    shapes = shapes_of(network)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) / 1e6 == pytest.approx(millions, abs=0.005)
    assert shapes["unused"]["mask_token"].shape == (1, network.width)
    depth = max(network.levels) + 1
    assert network.depth == depth and len(network.levels) == 4


@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize("antialias", [False, True])
def test_bicubic_matrices_resize_as_pytorch(size, antialias):
    torch = pytest.importorskip("torch")
    square = torch.eye(5, dtype=torch.float64)[None, None]
    options = {"size": (size, 5)} if antialias else {"scale_factor": ((size + 0.1) / 5, 1)}
    theirs = torch.nn.functional.interpolate(square, mode="bicubic", antialias=antialias, **options)
    matrices = vit.bicubic_matrices(jnp.array([3.0, size]), 9, 5, 0.0 if antialias else 0.1, antialias)
    np.testing.assert_allclose(matrices[1, :size], theirs.numpy()[0, 0], atol=1e-14)
    assert np.isfinite(matrices).all()


@pytest.mark.parametrize("antialias", [False, True])
def test_positions_of_the_pretraining_grid_are_used_as_they_are(antialias):
    torch = pytest.importorskip("torch")
    square = np.random.default_rng(0).normal(size=(3, 3, 2))
    grid = Extent(jnp.array([3, 3, 0]), jnp.array([3, 4, 0]))
    resized = vit.resize_positions(jnp.asarray(square), grid, (5, 4), 0.0 if antialias else 0.1, antialias)
    np.testing.assert_array_equal(resized[0, :3, :3], square)
    options = {"size": (3, 4)} if antialias else {"scale_factor": (3.1 / 3, 4.1 / 3)}  # Both sides are resized.
    channels_first = torch.from_numpy(square.transpose(2, 0, 1).copy())[None]
    theirs = torch.nn.functional.interpolate(channels_first, mode="bicubic", antialias=antialias, **options)
    np.testing.assert_allclose(resized[1, :3], theirs.numpy()[0].transpose(1, 2, 0), atol=1e-14)
    assert np.isfinite(resized).all()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_padded_images_get_the_features_of_each_alone(form):
    network = tiny(form)
    params, grids = params_of(network), [(3, 3), (1, 4)]
    images = images_of(network, 3, 5)
    extent = Extent(*(np.array(sizes, np.int32) * network.patch for sizes in zip(*grids, strict=True)))
    for image, height, width in zip(images, extent.height, extent.width, strict=True):
        image[height:], image[:, width:] = np.nan, np.nan
    padded = run(network, params, images, extent=extent)
    for i, (height, width) in enumerate(grids):
        alone = network.apply(
            {"params": params}, images[i : i + 1, : height * network.patch, : width * network.patch], 0
        )
        for ours, level in zip(padded, alone, strict=True):
            np.testing.assert_allclose(ours[i, :height, :width], level[0], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_remat_changes_nothing():
    def gradient(network):
        def loss(params):
            return sum(jnp.square(level).mean() for level in network.apply({"params": params}, images, train=True))

        return jax.jit(jax.grad(loss))(params)

    plain, remat = tiny("dinov3"), tiny("dinov3", remat=True)
    params, images = params_of(plain), images_of(plain, 2, 3)
    assert jax.tree.structure(shapes_of(remat)) == jax.tree.structure(shapes_of(plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), gradient(plain), gradient(remat))


@pytest.mark.parametrize("form", ["dinov2", "dinov3"])
def test_bfloat16_computes_over_float32_weights(form):
    exact, rounded = tiny(form, "float32", "float32"), tiny(form, "bfloat16", "float32")
    params, images = params_of(rounded), images_of(exact, 2, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for ours, level in zip(run(rounded, params, images), run(exact, params, images), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), level, atol=0.05 * np.abs(level).max())


def test_keys_have_no_bias_in_dinov3():
    network = tiny("dinov3")
    params, images = params_of(network), images_of(network, 3, 2)
    changed = jax.tree.map(np.copy, params)
    changed["blocks_0"]["attn"]["qkv"]["bias"][16:32] += 5
    np.testing.assert_array_equal(run(network, params, images)[1], run(network, changed, images)[1])


def test_rope_rescale_draws_a_factor_for_each_block_in_training(monkeypatch):
    plain, rescaled = tiny("dinov3"), tiny("dinov3", rope_rescale=2.0)
    params, images = params_of(plain), images_of(plain, 3, 2)
    expected = run(plain, params, images)
    for network, train in [(plain, True), (rescaled, False)]:
        np.testing.assert_array_equal(run(network, params, images, train)[1], expected[1])
    first, again, other = (
        run(rescaled, params, images, True, rngs={"rope": jax.random.PRNGKey(seed)})[1] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, expected[1]) and not np.allclose(first, other)
    drawn = []
    monkeypatch.setattr(vit, "rope_angles", lambda *args, rope=vit.rope_angles: drawn.append(args[-1]) or rope(*args))
    apply = functools.partial(rescaled.apply, train=True)
    jax.eval_shape(apply, {"params": params}, images, rngs={"rope": jax.random.PRNGKey(0)})
    assert len(drawn) == plain.depth
    with pytest.raises(Exception, match="rope"):  # Not silently off.
        jax.eval_shape(apply, {"params": params}, images)


def test_angles_of_the_rotary_embedding():
    grid, dim = Extent(jnp.array([2, 3]), jnp.array([4, 4])), 8
    angles = vit.rope_angles(grid, (3, 4), dim, jnp.array(1.5))
    assert angles.shape == (2, 12, dim)
    row, column = 1, 3  # In the second image its center is at (0, 0.75).
    by_hand = 1.5 * 2 * np.pi * np.array([0, 0, 0.75, 0.75]) / np.array([1, 10, 1, 10])
    np.testing.assert_allclose(angles[1, row * 4 + column], np.tile(by_hand, 2), atol=1e-12)
    np.testing.assert_allclose(angles[0, 0, :2], 1.5 * 2 * np.pi * np.array([-0.5, -0.05]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention_in_parts_is_that_of_all_queries(monkeypatch, dtype):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, 7, 3, 4)).astype(dtype) for _ in range(3)]
    valid = np.arange(7) < np.array([[5], [7]])
    query, key, value = (np.asarray(array, np.float64) for array in arrays)
    weights = np.exp(np.einsum("btnd,bsnd->bnts", query, key) / 2) * valid[:, None, None]
    expected = np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), value)

    def loss(arrays):
        result = attention.attend(*arrays, valid, "auto")
        return jnp.sin(result).sum(), result

    gradients = []
    for scores in (10**6, 3 * 7 * 3):
        monkeypatch.setattr(attention, "_MOST_SCORES", scores)
        gradient, result = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)
        gradients.append(gradient)
    tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
    for whole, parts in zip(*gradients, strict=True):
        np.testing.assert_allclose(parts, whole, atol=tolerance)


def test_auto_takes_the_fused_kernel_where_it_can_run(monkeypatch):
    def chosen(capability="9.0", platform="cuda 13000", dtype="bfloat16", dim=64, form="auto", valid=None):
        client = types.SimpleNamespace(platform_version=platform)
        device = types.SimpleNamespace(client=client, compute_capability=capability)
        arrays, calls = [jax.ShapeDtypeStruct((1, 3, 2, dim), dtype)] * 3, []
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda: [device])
            patch.setattr(attention, "_attend", lambda *_: calls.append("xla"))
            patch.setattr(jax.nn, "dot_product_attention", lambda *_, implementation: calls.append(implementation))
            attention.attend(*arrays, valid, form)
        return calls[0]

    assert chosen() == chosen("8.0", dim=128) == chosen(platform="cpu", form="cudnn") == "cudnn"
    for options in [
        {"capability": "7.5"}, {"platform": "rocm"}, {"platform": "cpu"}, {"dtype": "float32"}, {"dim": 12},
        {"dim": 256}, {"form": "xla"}, {"valid": jnp.ones((1, 3), bool)},
    ]:  # fmt: skip
        assert chosen(**options) == "xla", options


def test_values_that_fit_no_encoder_or_machine_are_named(tiny_config):
    config = tiny_config(model__encoder="dinov2_w64", model__decoder="dpt", model__rope_rescale=2.0)
    with pytest.raises(ConfigError, match="rope_rescale is 2; dinov2_w64 has no rotary"):
        models.check(config.model)
    config.model.update({"rope_rescale": 1.0, "attention": "cudnn"})
    with pytest.raises(ConfigError, match="cudnn.*needs config.model.dtype=bfloat16, not float32"):
        models.check(config.model)
    config.model.dtype = "bfloat16"
    with pytest.raises(ConfigError, match="cudnn.*needs an NVIDIA GPU"):
        validate.validate_evaluation(config)
    with pytest.raises(ValueError, match="30x28 pixels; expected multiples of 14"):
        models.build(config.model, 2).encoder.init(jax.random.PRNGKey(0), jnp.zeros((1, 30, 28, 3)), False)


# Names in the modules of transformers -> ours, by replacement in this order.
RENAMED = {
    "model.": "", "encoder.": "", "patch_embeddings.projection": "patch_embed.proj",
    "patch_embeddings": "patch_embed.proj", "embeddings.": "", "position_embeddings": "pos_embed",
    "layernorm.": "norm.", "layer.": "blocks.", "layer_scale": "ls", "lambda1": "gamma",
    "attention.o_proj": "attn.proj", "attention.": "attn.", "gate_proj": "w1", "up_proj": "w2", "down_proj": "w3",
}  # fmt: skip
# Our tensors that join several of theirs, or have other names in some forms.
JOINED = {"qkv": ("q_proj", "k_proj", "v_proj"), "w12": ("w1", "w2"), "fc1": ("w2",), "fc2": ("w3",)}


def randomize(twin):
    """Fills a PyTorch module with random numbers, in float64 and evaluation mode; returns its state dict."""
    import torch

    twin.double().eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.from_numpy(np.random.default_rng(parameter.numel()).normal(size=parameter.shape) / 3))
    return {name: value.numpy() for name, value in twin.state_dict().items()}


def convert(state):
    """Returns a state dict with our names, for any of our forms; the keys' bias may be missing."""
    renamed = {}
    for name, value in state.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        renamed[name] = value
    for new, (*_, last) in JOINED.items():
        for name in [name for name in renamed if f".{last}." in name]:
            parts = [renamed.get(name.replace(last, part), np.zeros_like(renamed[name])) for part in JOINED[new]]
            renamed.setdefault(name.replace(last, new), np.concatenate(parts))
    renamed["storage_tokens"] = renamed.get("register_tokens")
    return {names.ENCODER_PREFIX + name: value for name, value in renamed.items()}


def assert_last_tokens(network, state, images, expected):
    like = {"params": {"encoder": shapes_of(network)["params"]}}
    params = names.from_state_dict(state, like)["params"]["encoder"]
    ours = run(network, params, images, method="tokens")[-1]
    np.testing.assert_allclose(ours, expected.detach().numpy(), rtol=1e-6, atol=1e-6)  # Positions are float32 there.


def to_torch(images):
    import torch

    return torch.from_numpy(np.array(images).transpose(0, 3, 1, 2))


HF_SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 6, "patch_size": 2,
    "layer_norm_eps": 1e-6,
}  # fmt: skip


@pytest.mark.slow  # Importing transformers takes long.
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 2])
def test_dinov2_of_transformers(grid, gated, registers):
    """It resizes the position embedding without the offset of the original, so both do."""
    transformers = pytest.importorskip("transformers")
    options = HF_SIZES | {"use_swiglu_ffn": gated, "mlp_ratio": 4}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **options)
        twin = transformers.Dinov2WithRegistersModel(config)
    else:
        twin = transformers.Dinov2Model(transformers.Dinov2Config(**options))
    form = {"hidden": 48, "ffn": "swiglu_fused"} if gated else {"hidden": 64, "ffn": "mlp"}  # 48: 64 * 2 / 3 to 8.
    network = tiny("dinov2_reg" if registers else "dinov2", offset=0.0, **form)
    images = images_of(network, *grid)
    state = convert(randomize(twin))
    assert_last_tokens(network, state, images, twin(to_torch(images)).last_hidden_state)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_dinov3_of_transformers(gated, biased):
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        **HF_SIZES | {"patch_size": 4, "layer_norm_eps": 1e-5}, intermediate_size=24, num_register_tokens=2,
        use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", query_bias=biased, value_bias=biased,
    )  # fmt: skip
    twin = transformers.DINOv3ViTModel(config)
    network = tiny("dinov3", ffn="swiglu" if gated else "mlp", qkv_bias="masked" if biased else "none")
    images = images_of(network, 3, 5)
    state = convert(randomize(twin))
    assert_last_tokens(network, state, images, twin(to_torch(images)).last_hidden_state)
