"""Times strong views on the device against Pillow's on one core: `python -m benchmarks.augment --json=augment.json`.

Columns: ms per image of each operation alone, then of whole views; for Pillow on one core; their ratio.
"""

import argparse
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks import tables
from configs import cityscapes, pascal
from dssn_jax.methods import strong_augment
from input_pipeline.sources.shapes import ShapesSource
from tests.reference import photometric

COLUMNS = ("what", "crop", "batch", "device_ms", "pillow_ms", "ratio")
PARAMETERS = {"posterize": 6, "solarize": 128}  # Parameters of the operations; all others are called with 0.5.
PILLOW_VIEWS = 10  # Views per measurement with Pillow: they differ in the operations drawn.


def time_call(call: Callable[[], object], seconds: float) -> float:
    """Returns the ms of the fastest of the calls that take `seconds` together."""
    call()
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return 1000 * best


def measure(what: str, images: np.ndarray, on_device: Callable, on_host: Callable, seconds: float) -> dict:
    """Measures a function of the images uint8 [N, H, W, 3] and one of a single image [H, W, 3]; returns a row."""
    batch = jnp.asarray(images)
    compiled = jax.jit(on_device).lower(batch).compile()
    device = time_call(lambda: jax.block_until_ready(compiled(batch)), seconds) / len(images)
    pillow = time_call(lambda: on_host(images[0]), seconds)
    row = {"what": what, "crop": images.shape[1], "batch": len(images)}
    return row | {"device_ms": device, "pillow_ms": pillow, "ratio": pillow / device}


def measure_operation(name: str, images: np.ndarray, seconds: float) -> dict:
    """Measures one of `strong_augment.OPERATIONS` against Pillow's."""
    parameter = PARAMETERS.get(name, 0.5)
    values = jnp.full(len(images), parameter, jnp.float32)
    operation, pillow = strong_augment.OPERATIONS[name], getattr(photometric, name)
    return measure(
        name,
        images,
        lambda batch: operation(batch, values),
        lambda image: np.asarray(pillow(Image.fromarray(image), parameter)),
        seconds,
    )


def measure_views(name: str, views, images: np.ndarray, seconds: float) -> dict:
    """Measures the strong views of `config.views`."""
    augment, rng = strong_augment.from_config(views), np.random.default_rng(0)

    def on_device(batch):
        return strong_augment.apply(batch, strong_augment.draw(jax.random.PRNGKey(0), len(batch), augment), augment)

    def on_host(image):
        for _ in range(PILLOW_VIEWS):
            photometric.strong_view(image, views, rng)

    row = measure(name, images, on_device, on_host, seconds)
    return row | {key: row[key] / PILLOW_VIEWS for key in ("pillow_ms", "ratio")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, default=513)
    parser.add_argument("--batch", type=int, default=32, help="images: two views of 8 images and of their partners")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement")
    parser.add_argument("--json", type=pathlib.Path, help="file of the results")
    arguments = parser.parse_args()
    source = ShapesSource(arguments.crop, 4, 0, part="train", labeled=False)
    images = np.stack([source[i % 4]["image"] for i in range(arguments.batch)])
    operations = [name for name in strong_augment.OPERATIONS if name != "identity"]
    rows = [measure_operation(name, images, arguments.seconds) for name in operations]
    for name, module in (("view, cityscapes", cityscapes), ("view, pascal", pascal)):
        rows.append(measure_views(name, module.get_config().views, images, arguments.seconds))
    tables.show(rows, COLUMNS)
    tables.write(arguments.json, {"device": jax.devices()[0].device_kind, "rows": rows})


if __name__ == "__main__":
    main()
