"""Small data sets on disk, with content that the tests can recognize."""

import os

import numpy as np
import pytest
from absl import flags
from PIL import Image

from configs import defaults


@pytest.fixture(scope="session", autouse=True)
def parsed_flags():
    """Grain's worker processes read absl flags."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture
def config():
    """The defaults with small sizes; the pixels of a source are kept: no scaling, no flip, no strong change.

    Strong views are made on the host, where they can be looked at.
    """
    config = defaults.get_config()
    config.data.classes = ("a", "b", "c")
    config.data.split = "small"
    config.data.crop = 16
    config.data.scale = (1.0, 1.0)
    config.data.flip = 0.0
    config.data.labeled_batch = 2
    config.data.unlabeled_batch = 4
    config.data.threads = 2
    config.views.device = False
    config.views.jitter = config.views.gray = config.views.blur = 0.0
    return config


@pytest.fixture
def folder(tmp_path, config):
    """A root with 3 labeled, 10 unlabeled and 2 validation images of one color each; (number, 7, 7) is image number.

    Labeled are 0, 1, 2; unlabeled 0 to 9; validation 10 and 11. Masks are `number % 3` everywhere.
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
