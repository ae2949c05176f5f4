"""Starting from weights of PyTorch: the features are those of the network in PyTorch; what does not fit is named."""

import jax
import numpy as np
import pytest

from dssn_jax import models
from dssn_jax.models import resnet
from dssn_jax.training import loop as train
from dssn_jax.weights import files as state_dict_files
from dssn_jax.weights import names as state_dicts
from dssn_jax.weights import pretrained
from dssn_jax.weights.files import StateDictError


def made_up(shapes):
    """Random tensors of these names and shapes, scaled so that features stay of size 1."""
    rng = np.random.default_rng(0)

    def tensor(name, shape):
        if name.endswith("running_var"):
            return np.exp(0.1 * rng.normal(size=shape))
        if len(shape) == 4:
            return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        return (0.5 if name.endswith("weight") else 0.0) + 0.1 * rng.normal(size=shape)

    return {name: np.asarray(tensor(name, shape), np.float32) for name, shape in shapes.items()}


def network_tensors(config):
    """Made-up tensors of the network of a configuration."""
    return made_up(state_dicts.shapes(pretrained.abstract_variables(config.model, len(config.data.classes))))


def backbone_tensors(config):
    """Made-up tensors of its backbone, as in a backbone's file: with a classifier that the network has no use for."""
    tensors = network_tensors(config).items()
    own = {name.removeprefix("backbone."): value for name, value in tensors if name.startswith("backbone.")}
    return {**own, "fc.weight": np.zeros((9, 128), np.float32), "fc.bias": np.zeros(9, np.float32)}


def load(config, tensors, path, metadata=None):
    """Writes tensors to a file and loads it for a configuration."""
    state_dict_files.write(path, tensors, metadata or {})
    config.model.pretrained = str(path)
    return pretrained.load(config, pretrained.abstract_variables(config.model, len(config.data.classes)))


def assert_features_are_pytorchs(model, backbone, twin):
    """Compares float64 features and moved running statistics, in evaluation and in training mode."""
    import torch

    image = np.random.default_rng(1).normal(size=(2, 65, 49, 3))

    def both(variables):
        trained, updated = model.apply(variables, image, True, mutable=["batch_stats"])
        return model.apply(variables, image, False), trained, updated["batch_stats"]

    evaluated, trained, batch_stats = jax.device_get(jax.jit(both)(backbone))
    twin.double()
    for mode, features in ((False, evaluated), (True, trained)):
        with torch.no_grad():
            expected = twin.train(mode)(torch.from_numpy(image).permute(0, 3, 1, 2))
        for ours, theirs in zip(features, expected, strict=True):
            theirs = theirs.permute(0, 2, 3, 1).numpy()
            assert ours.dtype == np.float64
            assert np.abs(ours - theirs).max() <= 1e-9 * np.abs(theirs).max()
    moved = twin.state_dict()
    for name, value in state_dicts.to_state_dict({"params": {}, "batch_stats": batch_stats}).items():
        np.testing.assert_allclose(value, moved[name], rtol=1e-9, atol=1e-12)


def made_up_twin(stages, stem, shortcut):
    """Returns a ResNet in PyTorch and its made-up tensors."""
    import torch

    from tests.reference import torch_twin

    twin = torch_twin.ResNet(stages, stem, shortcut)
    tensors = made_up({name: tuple(value.shape) for name, value in twin.state_dict().items() if value.ndim})
    twin.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()}, strict=False)
    return twin, tensors


def test_a_resnet_of_torchvision_has_pytorchs_features(tiny_config, tmp_path):
    torch = pytest.importorskip("torch")
    twin, tensors = made_up_twin((3, 4, 6, 3), "7x7", "strided")
    torch.save({**twin.state_dict(), "fc.weight": torch.zeros(9, 2048)}, tmp_path / "resnet50.pth")
    with jax.enable_x64(True):
        config = tiny_config(model__dtype="float64", model__param_dtype="float64")
        config.model.update({"backbone": "resnet50", "stem": "7x7", "pretrained": str(tmp_path / "resnet50.pth")})
        fitted = pretrained.load(config, pretrained.abstract_variables(config.model, 6))
        assert f"{len(tensors)} tensors matched, 1 unused (backbone.fc.weight), 0 missing" in fitted.report
        backbone = {collection: tree["backbone"] for collection, tree in fitted.variables.items()}
        assert_features_are_pytorchs(models.build(config.model, 6).backbone, backbone, twin)


def test_average_shortcuts_and_narrow_stem_have_pytorchs_features():
    """Those of timm's resnet50d, with one block a stage."""
    pytest.importorskip("torch")
    stages = (1, 1, 1, 1)
    twin, tensors = made_up_twin(stages, "deep_narrow", "average")
    with jax.enable_x64(True):
        types = {"dtype": np.float64, "param_dtype": np.float64}
        model = resnet.ResNet(stages, stem="deep_narrow", shortcut="average", **types)
        like = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), np.zeros((1, 33, 33, 3)), False))
        assert state_dicts.compare(tensors, state_dicts.shapes(like)).fits
        assert_features_are_pytorchs(model, state_dicts.from_state_dict(tensors, like), twin)


def test_training_starts_from_the_backbone(tiny_config, monkeypatch, tmp_path):
    """Both networks begin with the weights and statistics of the file, on every device; the rest is random."""
    config = tiny_config("dssn")
    tensors = backbone_tensors(config)
    state_dict_files.write(tmp_path / "resnet10.safetensors", tensors, {})
    config.model.pretrained = str(tmp_path / "resnet10.safetensors")
    started = []
    monkeypatch.setattr(train.Trainer, "run", lambda trainer: started.append(trainer.state))
    train.train(config, tmp_path / "run")
    log = (tmp_path / "run/log.txt").read_text()
    assert f"starting from {config.model.pretrained} (backbone): {len(tensors) - 2} tensors matched, 2 unused" in log
    state = started[0]
    assert len(jax.tree.leaves(state.params["backbone"])[0].sharding.device_set) == 4
    for variables in (state.student, state.teacher):
        found = state_dicts.to_state_dict(variables)
        assert found.keys() == network_tensors(config).keys()
        for name, value in tensors.items():
            if not name.startswith("fc."):
                np.testing.assert_array_equal(found[f"backbone.{name}"], value, err_msg=name)
        assert np.std(found["fuse.0.weight"]) > 0
    jax.tree.map(np.testing.assert_array_equal, state.teacher_params, state.params)


def test_tensors_that_do_not_fit_are_named(tiny_config, tmp_path):
    config = tiny_config()
    tensors = backbone_tensors(config)
    del tensors["layer2.0.bn1.weight"]
    tensors["bn1.running_var"] = tensors["bn1.running_var"][:1]
    tensors["layer3.1.conv1.weight"] = np.zeros((64, 64, 3, 3), np.float32)  # A layer more than the model has.
    with pytest.raises(StateDictError) as error:
        load(config, tensors, tmp_path / "a.safetensors")
    for message in (
        f"{tmp_path}/a.safetensors does not fit the model",
        "missing backbone.layer2.0.bn1.weight (32,)",
        "backbone.bn1.running_var has shape (1,), expected (32,)",
        "backbone.layer3.1.conv1.weight not known to the model",
    ):
        assert message in str(error.value)


def test_a_backbone_that_fits_another_model_names_it(tiny_config, tmp_path):
    tensors = backbone_tensors(tiny_config(model__stem="7x7"))
    with pytest.raises(StateDictError, match="its backbone fits model.backbone=resnet10w16 model.stem=7x7"):
        load(tiny_config(), tensors, tmp_path / "a.safetensors")


def test_nothing_is_written_when_the_weights_do_not_fit(tiny_config, tmp_path):
    config = tiny_config(model__pretrained=str(tmp_path / "nowhere.pth"))
    with pytest.raises(StateDictError, match="nowhere.pth: no such file"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_images_than_the_weights_expect_are_warned_of(tiny_config, tmp_path):
    config = tiny_config(data__mean=(0.5, 0.5, 0.5), data__std=(0.5, 0.5, 0.5))
    tensors = backbone_tensors(config)
    report = load(config, tensors, tmp_path / "a.safetensors").report
    assert "WARNING: they expect RGB in [0, 1] with mean (0.485, 0.456, 0.406)" in report
    same = {"mean": "0.5 0.5 0.5", "std": "0.5 0.5 0.5"}  # As `dssn_jax.convert` writes them.
    assert "WARNING" not in load(config, tensors, tmp_path / "b.safetensors", same).report
    unreadable = {"mean": "ImageNet", "std": "0.5"}
    assert "WARNING" not in load(tiny_config(), tensors, tmp_path / "d.safetensors", unreadable).report
    assert "WARNING" not in load(tiny_config(), tensors, tmp_path / "c.safetensors").report
