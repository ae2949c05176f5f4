"""Work directories with one checkpoint, as training leaves them, and data sets of validation images."""

import contextlib
import json

import numpy as np
from PIL import Image

from dssn_jax.workdir import checkpoint, records


def save(workdir, config, state, step: int = 3) -> None:
    """Saves `state` as the best and only checkpoint of a run of `config`."""
    settings = json.loads(config.to_json())
    scores = checkpoint.new_scores() | {"best_step": step, "best_score": 50.0}
    with contextlib.closing(checkpoint.Checkpointer(workdir)) as saved:
        saved.save(step, state, {"config": settings, "steps": step, "records": {}, "scores": scores})
    records.write_json(workdir / "config.json", settings)


def make_root(root, sizes: dict[str, tuple[int, int]]):
    """Writes noise with masks of six classes, and val.txt that lists it; returns `root`."""
    rng = np.random.default_rng(0)
    for name, size in sizes.items():
        for kind, suffix, array in (
            ("images", "jpg", rng.integers(0, 255, (*size, 3), np.uint8)),
            ("masks", "png", rng.integers(0, 6, size, np.uint8)),
        ):
            path = root / kind / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (root / "splits").mkdir()
    (root / "splits/val.txt").write_text("".join(f"images/{name}.jpg masks/{name}.png\n" for name in sizes))
    return root
