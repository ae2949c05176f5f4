"""Names and shapes of state dicts: those of the networks in PyTorch, and round trips without loss."""

import jax
import numpy as np
import pytest

from configs import defaults
from dssn_jax.weights import names as state_dicts
from dssn_jax.weights import pretrained


def abstract(backbone, classes, **options):
    model = defaults.get_config().model
    model.update({"backbone": backbone, **options})
    return pretrained.abstract_variables(model, classes)


@pytest.mark.parametrize("classes", [19, 21, 81])
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101", "xception"])
def test_round_trips_are_exact(backbone, classes):
    """PyTorch -> here -> PyTorch, tensor by tensor; the twin in PyTorch loads the result with strict=True."""
    torch = pytest.importorskip("torch")
    from tests.reference import torch_twin

    with torch.device("meta"):
        twin = torch_twin.DeepLabV3Plus(backbone, classes)
    rng = np.random.default_rng(0)
    theirs = {
        name: rng.random(value.shape, np.float32)
        for name, value in twin.state_dict().items()
        if value.dtype.is_floating_point
    }
    ours = state_dicts.from_state_dict(theirs, abstract(backbone, classes))
    back = state_dicts.with_counters(state_dicts.to_state_dict(ours))
    twin.load_state_dict(
        {name: torch.from_numpy(value.copy()) for name, value in back.items()}, strict=True, assign=True
    )
    loaded = twin.state_dict()
    for name, value in theirs.items():
        np.testing.assert_array_equal(loaded[name].numpy(), value, err_msg=name)
    assert {name for name in loaded if name not in theirs} == {n for n in loaded if n.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("stem", "shortcut"), [("7x7", "strided"), ("deep_narrow", "strided"), ("deep_narrow", "average")]
)
def test_names_of_other_stems(stem, shortcut):
    torch = pytest.importorskip("torch")
    from tests.reference import torch_twin

    with torch.device("meta"):
        twin = torch_twin.DeepLabV3Plus("resnet50", 21, stem, shortcut)
    theirs = {name: tuple(value.shape) for name, value in twin.state_dict().items() if "num_batches" not in name}
    assert state_dicts.shapes(abstract("resnet50", 21, stem=stem, shortcut=shortcut)) == theirs


def test_standard_names():
    backbone = {"conv1.weight": 0, "bn1.num_batches_tracked": 1, "fc.bias": 2}
    assert state_dicts.standardize(backbone) == {"backbone.conv1.weight": 0, "backbone.fc.bias": 2}
    whole = {"module.backbone.conv1.weight": 0, "module.classifier.bias": 1}
    assert state_dicts.standardize(whole) == {"backbone.conv1.weight": 0, "classifier.bias": 1}


def test_comparison():
    expected = {"backbone.conv1.weight": (2, 3, 7, 7), "backbone.layer1.0.weight": (2,), "classifier.bias": (3,)}
    tensors = {name: np.zeros(shape) for name, shape in expected.items()}
    fitting = state_dicts.compare({**tensors, "backbone.fc.bias": np.zeros(1000)}, expected)
    assert fitting.fits and fitting.matched == list(expected) and fitting.unused == ["backbone.fc.bias"]
    del tensors["classifier.bias"]
    tensors["backbone.conv1.weight"] = np.zeros((2, 3, 3, 3))
    tensors["backbone.layer1.1.weight"] = np.zeros(2)
    found = state_dicts.compare(tensors, expected)
    assert not found.fits
    assert (found.missing, found.misshapen) == (["classifier.bias"], ["backbone.conv1.weight"])
    assert (found.foreign, found.matched) == (["backbone.layer1.1.weight"], ["backbone.layer1.0.weight"])


def test_filling_names_what_does_not_fit():
    like = {"params": {"classifier": {"kernel": jax.ShapeDtypeStruct((1, 1, 4, 3), np.float32)}}, "batch_stats": {}}
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(2, 4, 1, 1\), the model needs \(3, 4, 1, 1\)"):
        state_dicts.from_state_dict({"classifier.weight": np.zeros((2, 4, 1, 1))}, like)
    with pytest.raises(KeyError, match="classifier.weight"):
        state_dicts.from_state_dict({}, like)
