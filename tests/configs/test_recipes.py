"""Every recipe is valid and has the published values; mistakes in arguments and keys name the nearest known one."""

import importlib
import pathlib

import pytest

from configs import arguments, checks, cityscapes, coco, defaults, encoders, methods, pascal
from configs.checks import ConfigError, check_keys
from dssn_jax.validate import validate_training
from input_pipeline.batch import labeled_rows
from tests.input_pipeline.own_images import make_root

FILES = sorted(
    file.stem
    for file in pathlib.Path(checks.__file__).parent.glob("*.py")
    if "\ndef get_config(argument" in file.read_text()
)


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("name", [name for name in FILES if name != "custom"])  # Which needs a folder of images.
def test_every_recipe_is_valid(name, method):
    config = importlib.import_module(f"configs.{name}").get_config(f"method={method}")
    # One unlabeled image per device has no partner on it.
    validate_training(config, device_count=4 if config.views.mix_partner == "reversed" else 8)
    assert config.method.name == method
    assert labeled_rows(config) == (16 if method in ("supervised", "fixmatch_balanced") else 8)
    assert set(config.to_dict()) == set(defaults.get_config().to_dict())


def test_recipe_table():
    """The table of recipes in docs/method.md."""
    for module, classes, crop, epochs, lr, lr_mults, loss, encoder in (
        (pascal, 21, 513, 100, 0.002, (("decoder/", 10.0),), "ce", "resnet101"),
        (cityscapes, 19, 801, 240, 0.005, (), "ohem", "resnet101"),
        (coco, 81, 513, 30, 0.004, (("decoder/", 10.0),), "ce", "xception"),
    ):
        config = module.get_config()
        values = (len(config.data.classes), config.data.crop, config.train.epochs, config.optimizer.lr)
        assert values == (classes, crop, epochs, lr)
        assert (config.optimizer.lr_mults, config.method.labeled_loss) == (lr_mults, loss)
        assert config.model.encoder == encoder
        assert (config.data.labeled_batch, config.data.unlabeled_batch) == (8, 8)
    assert pascal.get_config("split=1_2,crop=321").data.crop == 321
    assert cityscapes.get_config().method.ohem_min_kept == 100000
    assert cityscapes.get_config("method=unimatch").method.threshold == 0
    assert pascal.get_config("method=unimatch").method.threshold == 0.95


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("splt=183", "unknown config argument 'splt'; did you mean 'split'"),
        ("split", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("crop=big", "crop='big' is not of type int"),
        ("method=dsn", "unknown method 'dsn'; did you mean 'dssn'"),
    ],
)
def test_argument_mistakes(text, message):
    with pytest.raises(ConfigError, match=message):
        arguments.parse(text, split="183", method="dssn", crop=513)


def test_unknown_keys_name_the_nearest():
    with pytest.raises(ConfigError, match="config.data.shapes has no 'sise'; did you mean 'size'"):
        check_keys(["--config.data.shapes.sise=3"], defaults.get_config())
    with pytest.raises(ConfigError, match="config.data.crop has no 'x'"):
        check_keys(["--config.data.crop.x=3"], defaults.get_config())
    check_keys(["--config.data.crop=3", "--other=1"], defaults.get_config())


@pytest.mark.parametrize("encoder", ["", ",encoder=dinov2_small"])
@pytest.mark.parametrize("name", FILES)
def test_the_method_has_the_last_word_on_views_and_data(name, encoder, monkeypatch, tmp_path):
    """Over the data set and the family of the encoder; everything else is that of the same method without them."""
    root = make_root(tmp_path, {"a": (0,)})
    views, data = {"mix_partner": "labeled", "cutmix": 0.9, "operations": (2, 2)}, {"labeled_batch": 6}
    plain = methods.METHODS["unimatch"]
    monkeypatch.setitem(methods.METHODS, "plain", plain)
    monkeypatch.setitem(methods.METHODS, "mine", plain | {"views": views, "data": data, "ema": {"decay": 0.5}})
    get_config = importlib.import_module(f"configs.{name}").get_config
    argument = f"{f'root={root},' if name == 'custom' else ''}method=NAME{encoder}"
    expected, config = (get_config(argument.replace("NAME", method)) for method in ("plain", "mine"))
    assert {key: config.views[key] for key in views} == views and config.data.labeled_batch == 6
    ema_is_set = name == "shapes" or encoders.find_family(config.model.encoder) is not None
    assert config.ema.decay == (expected.ema.decay if ema_is_set else 0.5)
    config.name = config.method.name = ""
    expected.name = expected.method.name = ""
    expected.views.update(views)
    expected.data.update(data)
    expected.ema.decay = config.ema.decay
    assert config.to_dict() == expected.to_dict()
