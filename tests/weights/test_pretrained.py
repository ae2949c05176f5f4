"""Starting from PyTorch's weights: the features are those of the network in PyTorch; what does not fit is named."""

import functools

import jax
import numpy as np
import pytest

from dssn_jax import models
from dssn_jax.training import loop
from dssn_jax.weights import convert, files, names, pretrained
from dssn_jax.weights.files import StateDictError
from dssn_jax.workdir.checkpoint import CheckpointError
from tests.weights import tensors as made
from tests.weights.tensors import encoder_tensors, network_tensors


def load(config, tensors, path, metadata=None):
    """Writes tensors to a file and loads it for a configuration."""
    files.write(path, tensors, metadata or {})
    config.model.pretrained = str(path)
    return pretrained.load(config, pretrained.abstract_variables(config.model, len(config.data.classes)))


def assert_features_are_pytorchs(network, variables, twin):
    """Compares float64 features and updated running statistics, in evaluation and in training mode."""
    import torch

    image, encode = (
        np.random.default_rng(1).normal(size=(2, 65, 49, 3)),
        functools.partial(network.apply, method="encode"),
    )

    def both_modes(variables):
        trained, updated = encode(variables, image, True, mutable=["batch_stats"])
        return encode(variables, image), trained, updated

    evaluated, trained, updated = jax.device_get(jax.jit(both_modes)(variables))
    for train, features in ((False, evaluated), (True, trained)):
        with torch.no_grad():
            expected = twin.train(train)(torch.from_numpy(image).permute(0, 3, 1, 2))
        for ours, theirs in zip(features, expected, strict=True):
            theirs = theirs.permute(0, 2, 3, 1).numpy()
            assert ours.dtype == np.float64
            assert np.abs(ours - theirs).max() <= 1e-9 * np.abs(theirs).max()
    theirs = twin.state_dict()
    for name, value in names.to_state_dict(updated).items():
        np.testing.assert_allclose(value, theirs[name.removeprefix("backbone.")], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("stem", "shortcut"), [("7x7", "strided"), ("deep_narrow", "average")])
def test_encoder_files_have_pytorchs_features(stem, shortcut, tiny_config, monkeypatch, tmp_path):
    """Files in the form of torchvision's resnet50 and of timm's resnet50d, with one block per stage."""
    torch = pytest.importorskip("torch")
    from tests.reference import torch_twin

    made.register_bottleneck(monkeypatch)
    twin = torch_twin.ResNet(made.BOTTLENECK_STAGES, stem, shortcut)
    tensors = {name: torch.from_numpy(value) for name, value in made.made_up_like(twin).items()}
    twin.load_state_dict(tensors, strict=False)
    torch.save({**twin.state_dict(), "fc.weight": torch.zeros(9, 2048)}, tmp_path / "resnet.pth")
    with jax.enable_x64(True):
        config = tiny_config(model__dtype="float64", model__param_dtype="float64", model__encoder=made.BOTTLENECK)
        config.model.update({"stem": stem, "shortcut": shortcut, "pretrained": str(tmp_path / "resnet.pth")})
        loaded = pretrained.load(config, pretrained.abstract_variables(config.model, 6))
        assert f"{len(tensors)} tensors matched, 1 unused (backbone.fc.weight), 0 missing" in loaded.report
        assert_features_are_pytorchs(models.build(config.model, 6), loaded.variables, twin.double())


def test_training_starts_from_the_encoder(tiny_config, monkeypatch, tmp_path):
    """Both networks start with the weights and statistics of the file, on every device; the rest is random."""
    config = tiny_config("dssn")
    tensors = encoder_tensors(config)
    files.write(tmp_path / "resnet10.safetensors", tensors, {})
    config.model.pretrained = str(tmp_path / "resnet10.safetensors")
    started = []
    monkeypatch.setattr(loop.Trainer, "train", lambda trainer: started.append(trainer.state))
    loop.train(config, tmp_path / "run")
    log = (tmp_path / "run/log.txt").read_text()
    assert f"starting from {config.model.pretrained} (encoder): {len(tensors) - 2} tensors matched, 2 unused" in log
    state = started[0]
    assert len(jax.tree.leaves(state.student["params"]["encoder"])[0].sharding.device_set) == 4
    student = names.to_state_dict(state.student)
    assert student.keys() == network_tensors(config).keys()
    for name, value in tensors.items():
        if not name.startswith("fc."):
            np.testing.assert_array_equal(student[f"backbone.{name}"], value, err_msg=name)
    assert np.std(student["fuse.0.weight"]) > 0
    jax.tree.map(np.testing.assert_array_equal, state.teacher, state.student)


def test_tensors_that_do_not_fit_are_named(tiny_config, tmp_path):
    config = tiny_config()
    tensors = encoder_tensors(config)
    del tensors["layer2.0.bn1.weight"]
    tensors["bn1.running_var"] = tensors["bn1.running_var"][:1]
    tensors["layer3.1.conv1.weight"] = np.zeros((64, 64, 3, 3), np.float32)  # A block more than the model has.
    with pytest.raises(StateDictError) as error:
        load(config, tensors, tmp_path / "a.safetensors")
    for message in (
        f"{tmp_path}/a.safetensors does not fit the model",
        "missing backbone.layer2.0.bn1.weight (32,)",
        "backbone.bn1.running_var has shape (1,), expected (32,)",
        "backbone.layer3.1.conv1.weight not known to the model",
    ):
        assert message in str(error.value)
    assert "its encoder fits" not in str(error.value)


@pytest.mark.parametrize("encoder", ["resnet10w16", "resnet18w16"])
def test_an_encoder_that_fits_another_model_names_it(encoder, tiny_config, tmp_path):
    tensors = encoder_tensors(tiny_config(model__encoder=encoder, model__stem="7x7", model__shortcut="average"))
    fits = f"its encoder fits model.encoder={encoder} model.stem=7x7 model.shortcut=average$"
    with pytest.raises(StateDictError, match=fits):
        load(tiny_config(), tensors, tmp_path / "a.safetensors")


def test_nothing_is_written_when_the_weights_do_not_fit(tiny_config, tmp_path):
    config = tiny_config(model__pretrained=str(tmp_path / "nowhere.pth"))
    with pytest.raises(StateDictError, match="nowhere.pth: no such file"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_normalization_than_the_weights_expect_is_warned_of(tiny_config, tmp_path):
    config = tiny_config(data__mean=(0.5, 0.5, 0.5), data__std=(0.5, 0.5, 0.5))
    tensors = encoder_tensors(config)
    report = load(config, tensors, tmp_path / "a.safetensors").report
    assert "WARNING: they expect RGB in [0, 1] with mean (0.485, 0.456, 0.406)" in report
    same = {"mean": "0.5 0.5 0.5", "std": "0.5 0.5 0.5"}  # As `dssn_jax.weights.convert` writes them.
    assert "WARNING" not in load(config, tensors, tmp_path / "b.safetensors", same).report
    unreadable = {"mean": "ImageNet", "std": "0.5"}
    assert "WARNING" not in load(tiny_config(), tensors, tmp_path / "d.safetensors", unreadable).report
    assert "WARNING" not in load(tiny_config(), tensors, tmp_path / "c.safetensors").report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.astype(np.int8), "has dtype int8; expected floating-point numbers"),
        (lambda value: value > 0, "has dtype bool"),
        (lambda value: value.astype(np.complex64), "has dtype complex64"),
        (lambda value: value.astype(np.int64), "has dtype int64"),
        (lambda value: np.full_like(value, np.nan), "holds a number that is not finite"),
        (lambda value: np.full(value.shape, 1e300), "holds a number that is not finite"),  # In float32.
        (lambda value: value - 100, "holds -.*; expected variances of at least 0"),
    ],
)
def test_tensors_that_are_no_weights_are_named(change, message, tiny_config, tmp_path):
    config, path = tiny_config(), tmp_path / "w.safetensors"
    tensors = network_tensors(config)
    name = next(name for name in tensors if name.endswith("running_var"))
    with pytest.raises(StateDictError, match=f"w.safetensors: {name} {message}"):
        load(config, tensors | {name: change(tensors[name])}, path)
    with pytest.raises(StateDictError, match=f"w.safetensors: {name} {message}"):
        convert.convert(str(path), str(tmp_path / "new.safetensors"), config=config)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_source_that_its_message_would_not_show_is_named_by_its_key(tiny_config, tmp_path, monkeypatch):
    """A home directory is a folder, and so is taken for a work directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tiny_config(model__pretrained="~")
    with pytest.raises(CheckpointError, match="^config.model.pretrained='~': .*no such folder"):
        pretrained.load(config, pretrained.abstract_variables(config.model, 6))
