"""Small data sets in the conventions of configs/custom.py: random images, masks of given classes."""

import numpy as np
from PIL import Image

CLASSES = ("a", "b", "c")


def make_root(root, masks: dict[str, tuple[int, ...]], images=(), unlabeled=(), size: int = 8):
    """Writes images with masks of the given ids (by name), images without masks, unlabeled images and classes.txt."""
    for name in ("images", "masks", *(["unlabeled"] if unlabeled else [])):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    for number, name in enumerate((*masks, *images, *unlabeled)):
        folder = root / ("unlabeled" if name in unlabeled else "images")
        save_image(folder / f"{name}.png", number, size)
    for name, ids in masks.items():
        save_mask(root / "masks" / f"{name}.png", ids, size)
    return root


def save_image(path, seed: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(size, size, 3), dtype=np.uint8)).save(path)


def save_mask(path, ids, size: int = 8) -> None:
    """Saves a mask whose rows cycle through the ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(np.resize(np.array(ids, np.uint8), size)[:, None], size, axis=1)).save(path)
