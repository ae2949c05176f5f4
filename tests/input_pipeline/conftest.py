"""Small data sets on disk, with content that the tests can recognize."""

import os

import numpy as np
import pytest
from PIL import Image

from configs import defaults


@pytest.fixture
def config():
    """Returns the defaults with small sizes and without scaling and flip, which keeps the pixels of a source."""
    config = defaults.get_config()
    config.data.classes = ("a", "b", "c")
    config.data.split = "small"
    config.data.crop = 16
    config.data.scale = (1.0, 1.0)
    config.data.flip = 0.0
    config.data.labeled_batch = 2
    config.data.unlabeled_batch = 4
    config.data.threads = 2
    return config


@pytest.fixture
def folder(tmp_path, config):
    """Returns a root of one-color images: image number n has the color (n, 7, 7) and the class n % 3.

    Images 0 to 2 are labeled, 0 to 9 unlabeled, 10 and 11 validate.
    """
    root = tmp_path / "root"
    for part in ("images", "masks", "splits/small"):
        os.makedirs(root / part)
    for number in range(12):
        save_pair(root, number)
    write_list(root / "splits/small/labeled.txt", range(3))
    write_list(root / "splits/small/unlabeled.txt", range(10))
    write_list(root / "splits/val.txt", (10, 11))
    config.data.root = str(root)
    return root


def save_pair(root, number: int, size: int = 16) -> None:
    image = np.full((size, size, 3), (number, 7, 7), np.uint8)
    Image.fromarray(image).save(root / f"images/{number}.png")
    Image.fromarray(np.full((size, size), number % 3, np.uint8)).save(root / f"masks/{number}.png")


def write_list(path, numbers) -> None:
    path.write_text("".join(f"images/{n}.png masks/{n}.png\n" for n in numbers))
