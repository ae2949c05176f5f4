"""Forms of the weights of DINOv2 and DINOv3: names and layouts of transformers and timm, round trips, refusals."""

import functools
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from configs.checks import ConfigError
from dssn_jax import commands
from dssn_jax.models import vit
from dssn_jax.weights import convert, files, forms, names, pretrained
from dssn_jax.weights.files import StateDictError
from dssn_jax.workdir.restore import restore
from tests.golden import case as cases
from tests.golden import check
from tests.reference.timm_models import import_timm
from tests.weights import tensors as made

GATED = {"dinov2": {"ffn": "swiglu_fused"}, "dinov3": {"ffn": "swiglu"}}
SMALL = {"depth": 2, "levels": (0, 0, 1, 1)}
# Family, what is in a file: every kind of block and of prefix that the published sizes have.
KINDS = {
    "dinov2": ("dinov2_w64", {}),
    "dinov2 reg": ("dinov2_w64", {"registers": 4}),
    "dinov2 gated": ("dinov2_w64", GATED["dinov2"]),
    "dinov2 reg gated": ("dinov2_w64", {"registers": 4, **GATED["dinov2"]}),
    "dinov3": ("dinov3_w64", {}),
    "dinov3 gated": ("dinov3_w64", GATED["dinov3"]),
    "dinov3 gated without bias": ("dinov3_w64", {"qkv_bias": "none", **GATED["dinov3"]}),
}


def encoder_of(kind):
    name, fields = KINDS[kind]
    return vit.ViT(**vit.SIZES[name] | fields | SMALL)


@functools.cache
def variables_of(kind):
    """Returns the shapes and dtypes of the variables of a network that is nothing but the encoder."""
    encoder = encoder_of(kind)
    image = np.zeros((1, encoder.patch, encoder.patch, 3), np.float32)
    like = jax.eval_shape(lambda key: encoder.init(key, image, False), jax.random.PRNGKey(0))
    return {collection: {"encoder": tree} for collection, tree in like.items()}


def shapes_of(kind):
    """Returns names and shapes of an encoder file, in the original form without what is computed."""
    return {name.removeprefix("backbone."): shape for name, shape in names.shapes(variables_of(kind)).items()}


def tensors_of(kind):
    tensors = made.made_up(shapes_of(kind))
    matrices = {name: value for name, value in tensors.items() if name.endswith("weight") and value.ndim == 2}
    return tensors | {name: (value - np.float32(0.5)) * np.float32(1.2) for name, value in matrices.items()}


def assert_tokens(kind, tensors, images, expected):
    """Compares the last feature map, for tensors in the original form, with patch tokens [B, T, 64] of PyTorch."""
    state_dict = {f"backbone.{name}": value for name, value in tensors.items()}
    variables = names.from_state_dict(state_dict, variables_of(kind))
    variables = {collection: tree["encoder"] for collection, tree in variables.items()}
    result = jax.jit(encoder_of(kind).apply, static_argnums=2)(variables, images, False)[-1]
    np.testing.assert_allclose(result.reshape(expected.shape), expected, rtol=2e-4, atol=2e-4)


def images_for(kind):
    """Returns images as they need no resized position embedding, about which the three disagree."""
    shape = (1, 518, 518, 3) if kind.startswith("dinov2") else (2, 48, 80, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def without_key_bias(tensors):
    """Returns tensors with zeros where forms other than the original have none: no network of DINOv3 reads them."""
    result = dict(tensors)
    for name, value in tensors.items():
        if name.endswith("attn.qkv.bias"):
            result[name] = np.concatenate([value[:64], np.zeros(64, np.float32), value[128:]])
    return result


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_form_and_back(kind):
    """Meta's names are ours; its files of DINOv3 also hold what is computed."""
    tensors = tensors_of(kind)
    written = forms.from_original(tensors, "original", head_size=32)
    added = {name: value for name, value in written.items() if name not in tensors}
    if kind.startswith("dinov2"):
        assert not added
    else:
        blocks = () if "without" in kind else (0, 1)
        assert added.keys() == {"rope_embed.periods", *(f"blocks.{i}.attn.qkv.bias_mask" for i in blocks)}
        exact = [100 ** (2 * j / (32 / 2)) for j in range(8)]
        np.testing.assert_allclose(added["rope_embed.periods"], exact, rtol=2**-8)
        assert not np.any(added["rope_embed.periods"].view(np.uint32) & 0xFFFF)  # Numbers of bfloat16.
    assert_same(forms.to_original(written), tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_faces_form_and_back(kind):
    tensors = tensors_of(kind)
    written = forms.from_original(tensors, "huggingface", head_size=32)
    expected = without_key_bias(tensors) if kind.startswith("dinov3") else tensors
    assert_same(forms.to_original(written), expected)
    # As a model with a head is saved, and as transformers 5 names layers in memory.
    assert_same(forms.to_original({f"dino.{name}": value for name, value in written.items()}), expected)
    if kind.startswith("dinov3"):
        renamed = {f"model.{name}" if name.startswith("layer.") else name: value for name, value in written.items()}
        assert_same(forms.to_original(renamed), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_timms_form_and_back(kind):
    tensors = tensors_of(kind)
    written = forms.from_original(tensors, "timm", head_size=32)
    back = forms.to_original(written)
    expected = without_key_bias(tensors) if kind.startswith("dinov3") else dict(tensors)
    del expected["mask_token"]
    if "reg" in kind:  # The position of the class token is added to it.
        first = expected["pos_embed"][:, :1]
        expected["cls_token"] = expected["cls_token"] + first
        expected["pos_embed"] = np.concatenate([np.zeros_like(first), expected["pos_embed"][:, 1:]], 1)
    if "without" in kind:  # Only the 7B has such files; for other widths a missing bias is zero.
        expected |= {f"blocks.{i}.attn.qkv.bias": np.zeros(192, np.float32) for i in (0, 1)}
    assert_same(back, expected)
    assert_same(forms.from_original(back, "timm", head_size=32), written)


def test_a_bias_of_zeros_is_left_out_for_timm():
    """As timm's models without the suffix qkvb have it."""
    tensors = tensors_of("dinov3")
    for block in (0, 1):
        tensors[f"blocks.{block}.attn.qkv.bias"] = np.zeros(192, np.float32)
    written = forms.from_original(tensors, "timm", head_size=32)
    assert not [name for name in written if "q_bias" in name or "v_bias" in name]
    del tensors["mask_token"]
    assert_same(forms.to_original(written), tensors)


def put(name, value):
    return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("original", put("rope_embed.periods", np.float32([1, 7])), "rope_embed.periods is not that of DINOv3"),
        (
            "original", put("blocks.1.attn.qkv.bias_mask", np.ones(192, np.float32)),
            "blocks.1.attn.qkv.bias_mask is not that of DINOv3, which masks the bias of the keys alone",
        ),
        (
            "huggingface", put("layer.1.attention.k_proj.bias", np.ones(64, np.float32)),
            "blocks.1.attn.k.bias is not 0; DINOv3 has no bias of the keys",
        ),
        (
            "huggingface", put("layer.0.attention.q_proj.weight", np.ones((64, 3), np.float32)),
            "w.safetensors: all the input array dimensions",
        ),
        (
            "huggingface", put("layer.0.attention.gate.weight", np.ones((64, 3), np.float32)),
            "backbone.blocks.0.attention.gate.weight not known to the model",
        ),
        ("timm", put("register_tokens", np.ones((1, 4, 64), np.float32)), "backbone.register_tokens not known"),
    ],
)  # fmt: skip
def test_what_the_family_does_not_have_is_refused(form, change, message, tiny_config, tmp_path):
    shapes = encoder_shapes("dinov3_w64")
    written = change(forms.from_original(made.made_up(shapes), form, head_size=32))
    with pytest.raises(StateDictError, match=message):
        load(vit_config(tiny_config, "dinov3_w64"), written, tmp_path / "w.safetensors")


# From files to networks.


def vit_config(tiny_config, encoder, method="unimatch_v2", **options):
    side = 4 * vit.SIZES[encoder].get("patch", 14)
    return tiny_config(
        method, model__encoder=encoder, model__decoder="dpt", data__crop=side, views__mix_partner="other", **options
    )


@functools.cache
def encoder_shapes(encoder):
    """Returns names and shapes of the encoder file of a registered encoder, without what is computed."""
    shapes = names.shapes(names.encoder_variables(abstract(encoder)))
    return {name.removeprefix("backbone."): shape for name, shape in shapes.items()}


@functools.cache
def abstract(encoder):
    return pretrained.abstract_variables(pretrained._model({"encoder": encoder}), 2)


def load(config, tensors, path):
    files.write(path, tensors, {})
    config.model.pretrained = str(path)
    return pretrained.load(config, pretrained.abstract_variables(config.model, len(config.data.classes)))


@pytest.mark.parametrize("encoder", ["dinov2_w64", "dinov3_w64"])
def test_training_starts_from_every_form(encoder, tiny_config, caplog, tmp_path):
    tensors = made.made_up(encoder_shapes(encoder))
    caplog.set_level("INFO", logger="dssn")
    for form in ("original", "huggingface", "timm"):
        written = forms.from_original(tensors, form, head_size=32)
        loaded = load(vit_config(tiny_config, encoder), written, tmp_path / f"{form}.safetensors")
        assert f"{len(tensors)} tensors matched, 0 unused, 0 missing" in loaded.report
        back = {name.removeprefix("backbone."): value for name, value in names.to_state_dict(loaded.variables).items()}
        expected = dict(tensors) if encoder == "dinov2_w64" or form == "original" else without_key_bias(tensors)
        if form == "timm":
            expected["mask_token"] = np.zeros((1, 64), np.float32)
        assert_same(back, expected)
    assert ("Meta's DINOv3 License" in caplog.text) == (encoder == "dinov3_w64")


FAST = ("dinov2_small_reg", "dinov3_7b")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in vit.SIZES if "w64" not in name and name not in FAST]


@pytest.mark.parametrize("encoder", [*FAST, *SLOW])
def test_real_sizes_are_recognized(encoder):
    """By names and shapes alone: the tensors take no memory."""
    shapes = encoder_shapes(encoder)
    width, depth, heads = (vit.SIZES[encoder][key] for key in ("width", "depth", "heads"))
    assert shapes["cls_token"] == (1, 1, width) and f"blocks.{depth - 1}.norm2.bias" in shapes
    assert ("blocks.0.attn.qkv.bias" in shapes) == (encoder != "dinov3_7b") and width % heads == 0
    tensors = {f"backbone.{name}": np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    weights = pretrained.Weights("w.pth", tensors, pretrained.Normalization(), {})
    assert pretrained.identify(weights) == {"encoder": encoder}


@pytest.mark.parametrize(
    ("encoder", "other", "message"),
    [
        ("dinov3_w64", "dinov2_w64", "its encoder fits model.encoder=dinov3_w64$"),
        ("dinov2_w64", "dinov3_w64", "its encoder fits model.encoder=dinov2_w64$"),
        ("dinov2_w64", "dinov2_small", "its encoder fits model.encoder=dinov2_w64$"),
    ],
)
def test_another_family_or_size_names_the_keys_that_fit(encoder, other, message, tiny_config, tmp_path):
    tensors = forms.from_original(made.made_up(encoder_shapes(encoder)), "original", head_size=32)
    with pytest.raises(StateDictError, match=message):
        load(vit_config(tiny_config, other), tensors, tmp_path / "w.safetensors")


def test_registers_are_not_left_out(tiny_config, tmp_path):
    tensors = made.made_up(encoder_shapes("dinov2_w64") | {"register_tokens": (1, 4, 64)})
    with pytest.raises(StateDictError, match="backbone.register_tokens not known to the model"):
        load(vit_config(tiny_config, "dinov2_w64"), tensors, tmp_path / "w.safetensors")


@pytest.mark.parametrize("form", ["original", "huggingface"])
def test_a_position_embedding_of_another_grid_is_refused(form, tiny_config, tmp_path):
    tensors = made.made_up(encoder_shapes("dinov2_w64") | {"pos_embed": (1, 257, 64)})
    written = forms.from_original(tensors, form, head_size=32)
    with pytest.raises(StateDictError, match=r"it is of 16x16 patches, expected 37x37: .* images of 518 pixels"):
        load(vit_config(tiny_config, "dinov2_w64"), written, tmp_path / "w.safetensors")


@pytest.mark.parametrize("form", ["huggingface", "timm", "original"])
def test_encoder_files_are_converted_from_form_to_form(form, tmp_path):
    tensors = without_key_bias(made.made_up(encoder_shapes("dinov3_w64")))
    files.write(tmp_path / "a.safetensors", forms.from_original(tensors, "original", head_size=32), {})
    convert.convert(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), form=form)
    convert.convert(str(tmp_path / "b.safetensors"), str(tmp_path / "c.safetensors"))
    if form == "timm":
        tensors["mask_token"] = np.zeros((1, 64), np.float32)
    back = files.read(tmp_path / "c.safetensors")[0]
    assert_same(back, forms.from_original(tensors, "original", head_size=32))
    between = files.read(tmp_path / "b.safetensors")[0]
    assert (between.keys() == back.keys()) == (form == "original")


def test_forms_that_do_not_go_together_with_other_options(tiny_config, tmp_path):
    source, config = tmp_path / "w.safetensors", vit_config(tiny_config, "dinov2_w64")
    files.write(source, made.network_tensors(config), {})
    for target, options, message in (
        ("a.safetensors", {"form": "huggingface"}, "is a full network: add --part=encoder"),
        ("a.safetensors", {"form": "unimatch_v2"}, "expected --to=FILE.pth"),
        ("a.pth", {"form": "unimatch_v2", "part": "encoder"}, "takes no --network and no --part"),
        ("a", {"form": "timm", "config": config}, "--form is for converting to a file"),
        ("a.pth", {"form": "keras"}, "unknown form 'keras'"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert.convert(str(source), str(tmp_path / target), **options)
    resnet = tmp_path / "resnet.safetensors"
    files.write(resnet, made.encoder_tensors(tiny_config()), {})
    with pytest.raises(ConfigError, match="--form=timm is not known for resnet10w16; known: original"):
        convert.convert(str(resnet), str(tmp_path / "a.safetensors"), form="timm")
    assert {path.name for path in tmp_path.iterdir()} == {"w.safetensors", "resnet.safetensors"}


def test_another_decoder_is_named(tiny_config, tmp_path):
    config = vit_config(tiny_config, "dinov2_w64")
    tensors = made.network_tensors(config)
    config.model.decoder = "linear"
    with pytest.raises(StateDictError, match="its decoder fits model.decoder=dpt"):
        load(config, tensors, tmp_path / "w.safetensors")


# Whole checkpoints of UniMatch V2.


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    """Returns (configuration, path of a checkpoint as UniMatch V2 saves it, its content)."""
    torch = pytest.importorskip("torch")
    config = vit_config(tiny_config, "dinov2_w64")
    student = made.network_tensors(config)
    teacher = {name: value + np.float32(0.25) for name, value in student.items()}
    content = {
        key: {f"module.{name}": torch.from_numpy(value.copy()) for name, value in tensors.items()}
        for key, tensors in (("model", student), ("model_ema", teacher))
    }
    numbers = {"epoch": 58, "previous_best": 79.25, "previous_best_ema": np.float64(80.5), "best_epoch": 41}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}}
    torch.save({**content, "optimizer": optimizer, **numbers}, tmp_path / "best.pth")
    return config, tmp_path / "best.pth", content


@pytest.mark.slow
def test_whole_checkpoints_come_and_go_exactly(checkpoint, monkeypatch, capsys, tmp_path):
    """One command each way; what the network does not use comes back too."""
    import torch

    config, path, content = checkpoint
    assert "module.backbone.mask_token" in content["model"]
    assert "module.head.scratch.refinenet4.resConfUnit1.conv1.weight" in content["model"]
    written = tmp_path / "config.py"
    written.write_text(
        "import json\nfrom configs import defaults\ndef get_config():\n  config = defaults.get_config()\n"
        f"  config.update(json.loads({config.to_json()!r}))\n  return config\n"
    )
    run, back = tmp_path / "run", tmp_path / "back.pth"
    assert commands.run(["--mode=convert", f"--config={written}", f"--from={path}", f"--to={run}"]) == 0
    log = capsys.readouterr().out
    assert "epoch 58" in log and "previous_best_ema 80.5" in log and "copy of the student" not in log
    networks = restore(run).networks
    for network, key in (("student", "model"), ("teacher", "model_ema")):
        tensors = names.to_state_dict(networks[network])
        assert_same({f"module.{name}": value for name, value in tensors.items()}, content[key])
    assert commands.run(["--mode=convert", f"--from={run}", f"--to={back}", "--form=unimatch_v2"]) == 0
    saved = torch.load(back, weights_only=True)
    assert saved.keys() == {"model", "model_ema", "epoch", "previous_best", "previous_best_ema", "best_epoch"}
    assert (saved["epoch"], saved["previous_best"], saved["previous_best_ema"]) == (58, 79.25, 80.5)
    for key in ("model", "model_ema"):
        assert saved[key].keys() == content[key].keys()
        assert all(torch.equal(saved[key][name], value) for name, value in content[key].items())
    # From file to file, and one of the two networks alone.
    convert.convert(str(back), str(tmp_path / "again.pth"), form="unimatch_v2")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert all(torch.equal(again["model_ema"][name], value) for name, value in content["model_ema"].items())
    convert.convert(str(back), str(tmp_path / "teacher.pth"), network="teacher")
    alone = torch.load(tmp_path / "teacher.pth", weights_only=True)
    assert {f"module.{name}" for name in alone} == content["model"].keys()
    assert all(torch.equal(alone[name.removeprefix("module.")], value) for name, value in content["model_ema"].items())


@pytest.mark.slow
def test_the_checkpoint_of_the_golden_numbers_evaluates_to_their_iou(tmp_path):
    """A whole checkpoint with the weights of a golden evaluation: converted, evaluated, and converted back."""
    torch = pytest.importorskip("torch")
    case = check.load(pathlib.Path(__file__).parents[1] / "data" / "golden_v2", "evaluate_dinov2_small.npz")
    with jax.enable_x64(True):
        shapes = names.shapes(cases.abstract_variables(case.network()))
    content = {
        key: {f"module.{name}": torch.from_numpy(case.weight(seed, name, shape)) for name, shape in shapes.items()}
        for key, seed in (("model", case.seed), ("model_ema", f"{case.seed}t"))
    }
    torch.save({**content, "optimizer": {}, "epoch": 59, "previous_best": 80.0}, tmp_path / "best.pth")
    config = "--config=configs/cityscapes.py:encoder=dinov2_small,method=unimatch_v2"
    run, back = tmp_path / "run", tmp_path / "back.pth"
    with jax.enable_x64(True):
        types = [f"--config.model.{key}=float64" for key in ("dtype", "param_dtype")]
        assert commands.run(["--mode=convert", config, *types, f"--from={tmp_path}/best.pth", f"--to={run}"]) == 0
        found = cases.evaluate(case, restore(run).networks["student"], "inside")
        for name, value in found.items():
            np.testing.assert_allclose(value, case.stored[name], rtol=0, atol=1e-9 if "iou" in name else 0)
        assert found["miou_sliding"] > 0
        assert commands.run(["--mode=convert", f"--from={run}", f"--to={back}", "--form=unimatch_v2"]) == 0
    returned = torch.load(back, weights_only=True)
    for key, tensors in content.items():
        assert all(torch.equal(returned[key][name], value.double()) for name, value in tensors.items())


@pytest.mark.slow
def test_methods_without_a_teacher_take_the_student(checkpoint, caplog, tmp_path):
    config, path, content = checkpoint
    config.method.teacher = "student"
    convert.convert(str(path), str(tmp_path / "run"), config=config)
    assert "its teacher is left out" in caplog.text
    networks = restore(tmp_path / "run").networks
    assert networks.keys() == {"student"}
    convert.convert(str(tmp_path / "run"), str(tmp_path / "back.pth"), form="unimatch_v2")
    assert files.read_networks(tmp_path / "back.pth")[0].keys() == {"student"}


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch RAN",)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (RunsCode(), "refused, nothing was run: its pickle asks for posix.system"),
        ({"module.backbone.cls_token": RunsCode()}, "refused, nothing was run"),
        (None, "the file has no teacher; it has student"),
        ({}, "the file has no teacher"),
        ({"epoch": 3}, "the file has no teacher"),
        ([1, 2], "the file has no teacher"),
    ],
)
def test_odd_teachers_are_refused(teacher, message, tiny_config, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    student = {"module.head.a": torch.zeros(3)}
    torch.save({"model": student, "model_ema": teacher, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(StateDictError, match=message):
        pretrained.read(tmp_path / "w.pth", network="teacher")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_a_teacher_of_another_network_is_refused(checkpoint, tmp_path):
    import torch

    config, path, content = checkpoint
    del content["model_ema"]["module.head.projects.0.bias"]
    torch.save(content, path)
    with pytest.raises(StateDictError, match="best.pth does not fit the model: missing head.projects.0.bias"):
        convert.convert(str(path), str(tmp_path / "run"), config=config)
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.pth"]


# Against the modules of transformers and timm.


def hugging_face_twin(kind):
    """Returns a module of transformers with random weights of the shapes of `kind`."""
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    gated = "gated" in kind
    if kind.startswith("dinov3"):
        options |= {"intermediate_size": 128, "num_register_tokens": 4, "use_gated_mlp": gated}
        options["hidden_act"] = "silu" if gated else "gelu"
        if "without" in kind:
            options |= {"query_bias": False, "value_bias": False}
        return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**options))
    # Gated, the hidden size is 2 / 3 of the product, rounded up to a multiple of 8.
    options |= {"image_size": 518, "patch_size": 14, "mlp_ratio": 3 if gated else 2, "use_swiglu_ffn": gated}
    if "reg" in kind:
        return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**options))
    return transformers.Dinov2Model(transformers.Dinov2Config(**options))


@pytest.mark.slow  # Importing transformers takes long.
@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_transformers(kind, tmp_path):
    """Its files and its modules in memory are read completely, and it reads what is written here completely.

    With the same weights, both have the same features.
    """
    import torch

    twin = hugging_face_twin(kind)
    twin.save_pretrained(tmp_path)
    theirs = {name: value.numpy() for name, value in twin.state_dict().items()}
    saved, _ = files.read(tmp_path / "model.safetensors")
    for tensors in (saved, theirs):
        found = forms.to_original(tensors)
        assert {name: value.shape for name, value in found.items()} == shapes_of(kind)
    assert_same(forms.to_original(theirs), forms.to_original(saved))

    ours = without_key_bias(tensors_of(kind)) if kind.startswith("dinov3") else tensors_of(kind)
    files.write(tmp_path / "model.safetensors", forms.from_original(ours, "huggingface", head_size=32), {})
    loaded, info = type(twin).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), json.dumps({key: list(map(str, value)) for key, value in info.items()})
    loaded.save_pretrained(tmp_path / "again")
    assert_same(forms.to_original(files.read(tmp_path / "again/model.safetensors")[0]), ours)
    images = images_for(kind)
    with torch.no_grad():
        tokens = loaded.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    assert_tokens(kind, ours, images, tokens[:, 5 if "dinov3" in kind or "reg" in kind else 1 :])


TIMM = {
    "dinov2": "vit_small_patch14_dinov2",
    "dinov2 reg": "vit_small_patch14_reg4_dinov2",
    "dinov2 gated": "vit_giant_patch14_dinov2",
    "dinov2 reg gated": "vit_giant_patch14_reg4_dinov2",
    "dinov3": "vit_small_patch16_dinov3_qkvb",
    "dinov3 gated": "vit_small_plus_patch16_dinov3_qkvb",
    "dinov3 gated without bias": "vit_7b_patch16_dinov3",
}


@pytest.mark.slow  # Importing timm takes long.
@pytest.mark.parametrize("kind", TIMM)
def test_modules_of_timm(kind):
    """They are read completely but for mask_token, and load what is written here strictly.

    With the same weights, both have the same features.
    """
    torch, ratio = pytest.importorskip("torch"), 2
    if "gated" in kind:
        ratio = 4 if kind.startswith("dinov2") else 2
    twin = import_timm().create_model(TIMM[kind], embed_dim=64, depth=2, num_heads=2, num_classes=0, mlp_ratio=ratio)
    found = forms.to_original({name: value.numpy() for name, value in twin.state_dict().items()})
    expected = {name: shape for name, shape in shapes_of(kind).items() if name != "mask_token"}
    if "without" in kind:  # Zeros, at this width.
        expected |= {f"blocks.{i}.attn.qkv.bias": (192,) for i in (0, 1)}
    assert {name: value.shape for name, value in found.items()} == expected

    written = forms.from_original(tensors_of(kind), "timm", head_size=32)
    twin.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in written.items()}, strict=True)
    images = images_for(kind)
    with torch.no_grad():
        tokens = twin.eval().forward_features(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert_tokens(kind, tensors_of(kind), images, tokens[:, 5 if "dinov3" in kind or "reg" in kind else 1 :])
