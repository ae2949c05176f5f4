"""configs/custom.py: class names, and the choice between splits and folders."""

import pytest

from configs import custom, defaults, methods
from configs.checks import ConfigError
from dssn_jax.validate import validate_training
from tests.input_pipeline.own_images import CLASSES, make_root


@pytest.mark.parametrize("method", methods.METHODS)
def test_valid_for_every_method(tmp_path, method):
    root = make_root(tmp_path, {"a": (0,)}, unlabeled=("u",))
    config = custom.get_config(f"root={root},method={method},crop=33,ignore=0+254")
    validate_training(config, device_count=8)
    assert set(config.to_dict()) == set(defaults.get_config().to_dict())
    assert (config.data.classes, config.data.ignore_values, config.method.name) == (CLASSES, (0, 254), method)
    assert (config.data.folders.labeled, config.data.folders.unlabeled) == ("images", "unlabeled")
    assert config.name == f"custom root={root} split=- encoder=resnet50 method={method}"


@pytest.mark.parametrize(
    ("arguments", "method"),
    [("", "fixmatch_balanced"), (",encoder=dinov2_w64", "unimatch_v2"), (",encoder=dinov2_w64,method=dssn", "dssn")],
)
def test_the_method_is_chosen_with_a_reason_unless_it_is_given(tmp_path, arguments, method):
    config = custom.get_config(f"root={make_root(tmp_path, {'a': (0,)})}{arguments}")
    assert (config.method.name, bool(config.method.reason)) == (method, "method=" not in arguments)
    assert config.name.endswith(f"method={method}")
    assert config.views.mix_partner == {"fixmatch_balanced": "other"}.get(method, "reversed")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a\n\nb\n", r"classes\.txt:2: an empty line"),
        ("a\nb\na\n", r"classes\.txt:3: 'a' a second time"),
        ("a\n", r"classes\.txt: 1 names; .*2 to 255"),
        (b"\xff\xfe", r"classes\.txt: cannot be read as text"),
        (None, r"missing file .*classes\.txt"),
    ],
)
def test_bad_class_names(tmp_path, names, message):
    root = make_root(tmp_path, {"a": (0,)})
    (root / "classes.txt").unlink()
    if names is not None:
        (root / "classes.txt").write_bytes(names if isinstance(names, bytes) else names.encode())
    with pytest.raises(ConfigError, match=message):
        custom.get_config(f"root={root}")


def test_splits_or_folders(tmp_path):
    root = make_root(tmp_path, {"a": (0,), "b": (0,)})
    (root / "splits/1_8").mkdir(parents=True)
    (root / "splits/1_4").mkdir()
    with pytest.raises(ConfigError, match=r"splits has splits: set split=NAME, one of 1_4, 1_8; or labeled=images"):
        custom.get_config(f"root={root}")
    assert custom.get_config(f"root={root},labeled=images").data.split == ""
    data = custom.get_config(f"root={root},split=1_4").data
    assert data.split == "1_4" and data.folders.labeled == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", r"needs the folder of your images"),
        ("root=/absent", r"root='/absent': no such folder"),
        ("root={root},unmasked=allow", r"unknown unmasked 'allow'.* known: refuse, unlabeled"),
        ("root={root},ignore=none", r"ignore='none': expected numbers, such as 0\+254"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    root = make_root(tmp_path, {"a": (0,)})
    with pytest.raises(ConfigError, match=message):
        custom.get_config(arguments.format(root=root))
