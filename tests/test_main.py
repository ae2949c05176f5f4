"""The command line: a mistake ends with one line that names the culprit, an exit code not 0 and nothing written."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import arguments, camvid, cityscapes, coco, defaults, methods, pascal
from configs import shapes as shapes_config
from configs.checks import ConfigError, check_keys
from dssn_jax.training import loop as train
from dssn_jax.validate import validate
from input_pipeline.errors import DataError
from tests.conftest import ONE_DEVICE

ROOT = pathlib.Path(__file__).parent.parent


def run_main(*options):
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    return subprocess.run(
        [sys.executable, "main.py", *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--config=configs/pascal.py:split=184"], ["unknown split '184'", "'183'"]),
        (["--config=configs/shapes.py:encoder=resnet5"], ["config.model.encoder 'resnet5'", "'resnet50'"]),
        (["--config=configs/shapes.py", "--config.data.croop=3"], ["'data.croop'", "'crop'"]),
        (["--config=configs/shape.py"], ["'configs/shape.py' cannot be read", "'configs/shapes.py'"]),
        (["--config=configs/pascal.py", "--config.data.root=/nowhere"], ["/nowhere"]),
        (["--config=configs/custom.py", "--mode=check"], ["configs/custom.py:root=FOLDER"]),
        (["--config=configs/shapes.py", "--mode=eval"], ["checkpoints: no such folder"]),
        (["--mode=eval"], ["--mode=eval needs --config"]),
        (["--mode=predict", "--from=images"], ["--mode=predict needs --to"]),
        (["--config=configs/shapes.py", "--mode=report"], ["it takes no --config"]),
        (["--mode=report"], ["run: no such folder"]),
    ],
)
def test_mistakes_end_with_one_line(options, messages, tmp_path):
    done = run_main(*options, f"--workdir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    for message in messages:
        assert message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dataset", [pascal, cityscapes, coco, camvid, shapes_config])
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_recipe_is_valid(dataset, method):
    config = dataset.get_config(f"method={method}")
    validate(config, device_count=8)
    assert config.method.name == method
    assert config.data.labeled_batch == (16 if method == "supervised" else 8)
    assert set(config.to_dict()) == set(defaults.get_config().to_dict())


def test_recipe_table():
    """The table of method.md, "Optimizer"."""
    for module, classes, crop, epochs, lr, lr_multi, loss, backbone in (
        (pascal, 21, 513, 100, 0.002, 10, "ce", "resnet101"),
        (cityscapes, 19, 801, 240, 0.005, 1, "ohem", "resnet101"),
        (coco, 81, 513, 30, 0.004, 10, "ce", "xception"),
    ):
        config = module.get_config()
        found = (len(config.data.classes), config.data.crop, config.train.epochs, config.optimizer.lr)
        assert found == (classes, crop, epochs, lr)
        assert (config.optimizer.lr_multi, config.method.labeled_loss) == (lr_multi, loss)
        assert config.model.encoder == backbone
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__crop": -1}, "config.data.crop is -1"),
        ({"data__labeled_batch": 6}, "labeled_batch is 6; expected a multiple of 4 devices"),
        ({"data__unlabeled_batch": 2}, "unlabeled_batch is 2; expected a multiple of 4 devices"),
        ({"model__output_stride": 32}, "output_stride 32"),
        ({"model__dtype": "float64"}, "JAX_ENABLE_X64"),
        ({"method__teacher": "none"}, "nobody labels"),
        ({"method__feature_views": 1}, "needs config.method.feature_views=2"),
        ({"data__scale": (0.0, 1.0)}, "config.data.scale"),
        ({"method__labeled_loss": "ohem", "method__ohem_group": 3}, "multiple of config.method.ohem_group"),
        ({"views__mix_partner": "others"}, "did you mean 'other'"),
        ({"data__unlabeled_batch": 20}, "16 unlabeled images are fewer than one batch of 20"),
        ({"data__shapes__labeled": 17}, "labeled 17, unlabeled 16"),
    ],
)
def test_values_that_cannot_run(tiny_config, options, message, tmp_path):
    with pytest.raises((ConfigError, DataError), match=message):
        train.train(tiny_config(**options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def folder(tmp_path):
    """A data set of eight 40x50 images with masks of 3 classes, and its configuration."""
    rng = np.random.default_rng(0)
    root = tmp_path / "root"
    for name in ("images", "masks", "splits/few"):
        (root / name).mkdir(parents=True)
    lines = []
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(root / f"images/{i}.jpg")
        Image.fromarray(rng.integers(0, 3, (40, 50), np.uint8)).save(root / f"masks/{i}.png")
        lines.append(f"images/{i}.jpg masks/{i}.png\n")
    (root / "splits/few/labeled.txt").write_text("".join(lines[:4]))
    (root / "splits/few/unlabeled.txt").write_text("".join(lines))
    (root / "splits/val.txt").write_text("".join(lines[:2]))
    return root


def configure(tiny_config, root, **options):
    data = {"data__source": "folder", "data__root": str(root), "data__split": "few", "data__classes": ("a", "b", "c")}
    return tiny_config("supervised", **data, **{"train__steps": 1, "train__pictures": 0} | options)


def test_trains_on_a_folder(tiny_config, folder, tmp_path):
    summary = train.train(configure(tiny_config, folder), tmp_path / "run")
    assert set(summary["student"]["last"]["iou"]) == {"a", "b", "c"}


def spoil_list(root):
    (root / "splits/few/labeled.txt").write_text("images/0.jpg masks/0.png\nimages/1.jpg\n")


def spoil_image(root):
    (root / "images/2.jpg").write_bytes((root / "images/2.jpg").read_bytes()[:400])


def spoil_mask(root):
    Image.fromarray(np.full((40, 50), 200, np.uint8)).save(root / "masks/0.png")


def spoil_size(root):
    Image.fromarray(np.zeros((40, 49), np.uint8)).save(root / "masks/3.png")


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (spoil_list, [r"labeled\.txt:2"]),
        (lambda root: (root / "splits/few/labeled.txt").write_text("\n"), [r"labeled\.txt"]),
        (lambda root: (root / "images/1.jpg").unlink(), [r"images/1\.jpg"]),
        (spoil_image, [r"images/2\.jpg"]),
        (spoil_mask, [r"masks/0\.png", "200", "3 classes"]),
        (spoil_size, [r"masks/3\.png", "49", "50"]),
        (lambda root: (root / "splits/few").rename(root / "splits/some"), ["few", "some"]),
    ],
)
def test_bad_data_is_named(tiny_config, folder, spoil, messages, tmp_path):
    spoil(folder)
    config = configure(tiny_config, folder, train__steps=4)
    with pytest.raises(DataError) as error:
        train.train(config, tmp_path / "run")
    for message in messages:
        assert re.search(message, str(error.value)), str(error.value)
    assert not (tmp_path / "run" / "summary.json").exists()
