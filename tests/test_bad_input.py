"""Training ends with a message that names the key or the file, and leaves nothing behind."""

import re

import numpy as np
import pytest
from PIL import Image

from configs.checks import ConfigError
from dssn_jax.training.loop import train
from input_pipeline.errors import DataError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__crop": -1}, "config.data.crop is -1"),
        ({"data__labeled_batch": 6}, "labeled_batch is 6; expected a multiple of 4 devices"),
        ({"data__unlabeled_batch": 2}, "unlabeled_batch is 2; expected a multiple of 4 devices"),
        ({"model__output_stride": 32}, "output_stride is 32"),
        ({"model__dtype": "float64"}, "JAX_ENABLE_X64"),
        ({"method__teacher": "none"}, "config.method.teacher"),
        ({"method__feature_views": 1}, "config.method.feature_views"),
        ({"data__scale": (0.0, 1.0)}, "config.data.scale"),
        ({"method__labeled_loss": "ohem", "method__ohem_group": 3}, "multiple of config.method.ohem_group"),
        ({"views__mix_partner": "others"}, "did you mean 'other'"),
        ({"optimizer__lr_mults": (("head/", 10.0),)}, "config.optimizer.lr_mults"),
        ({"data__unlabeled_batch": 20}, "16 unlabeled images are fewer than one batch of 20"),
        ({"data__shapes__labeled": 17}, "labeled 17, unlabeled 16"),
    ],
)
def test_values_that_cannot_run(tiny_config, options, message, tmp_path):
    with pytest.raises((ConfigError, DataError), match=message):
        train(tiny_config(**options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def folder(tmp_path):
    """Returns the root of a data set of eight 40x50 images with masks of 3 classes."""
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


@pytest.mark.slow
def test_trains_on_a_folder(tiny_config, folder, tmp_path):
    summary = train(configure(tiny_config, folder), tmp_path / "run")
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
        train(config, tmp_path / "run")
    for message in messages:
        assert re.search(message, str(error.value)), str(error.value)
    assert not (tmp_path / "run" / "summary.json").exists()
