"""Times strong views on the device against Pillow's on one core: `python -m benchmarks.augment --json=augment.json`.

Columns: ms an image of the batch, of each operation alone and of whole views; for Pillow on one core; their ratio.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks import tables
from configs import cityscapes, pascal
from dssn_jax.methods import strong_augment as augment
from input_pipeline.sources.shapes import ShapesSource
from tests.reference import photometric

COLUMNS = ("what", "crop", "batch", "device_ms", "pillow_ms", "ratio")


def time_call(call, seconds: float = 1.0) -> float:
    """ms of a call, the best of a few stretches."""
    call()
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return 1000 * best


def row(what: str, images: np.ndarray, on_device, on_host, seconds: float) -> dict:
    """Measures a jitted function of the images and a function of one picture."""
    batch = jnp.asarray(images)
    compiled = jax.jit(on_device).lower(batch).compile()
    device = time_call(lambda: jax.block_until_ready(compiled(batch)), seconds) / len(images)
    pillow = time_call(lambda: [on_host(image) for image in images[:2]], seconds) / len(images[:2])
    return {
        "what": what, "crop": images.shape[1], "batch": len(images), "device_ms": device, "pillow_ms": pillow,
        "ratio": pillow / device,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, default=513)
    parser.add_argument("--batch", type=int, default=32, help="images: two views of 8 images and of their partners")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the results")
    arguments = parser.parse_args()
    source = ShapesSource(arguments.crop, 4, 0, part="train", labeled=False)
    images = np.stack([source[i % 4]["image"] for i in range(arguments.batch)])
    rows, rng, middle = [], np.random.default_rng(0), {"posterize": 6, "solarize": 128}
    for operation in augment.OPERATIONS[1:]:
        name = operation.__name__
        parameter = middle.get(name, 0.5)
        given = jnp.full(len(images), parameter, jnp.float32)
        on_host = getattr(photometric, name)
        rows.append(
            row(
                name,
                images,
                lambda batch, operation=operation, given=given: operation(batch, given),
                lambda image, on_host=on_host, value=parameter: np.asarray(on_host(Image.fromarray(image), value)),
                arguments.seconds,
            )  # fmt: skip
        )
        tables.show(rows[-1:], COLUMNS)
    for name, module in (("view, cityscapes", cityscapes), ("view, pascal", pascal)):
        views = module.get_config().views
        recipe = augment.from_config(views)

        def make(batch, recipe=recipe):
            return augment.strong_views(batch, augment.draw(jax.random.PRNGKey(0), len(batch), recipe), recipe)

        def by_pillow(image, views=views):
            for _ in range(10):  # Views differ in what they do: ten a call.
                photometric.strong_view(image, views, rng)

        found = row(name, images, make, by_pillow, arguments.seconds)
        found |= {"pillow_ms": found["pillow_ms"] / 10, "ratio": found["ratio"] / 10}
        rows.append(found)
        tables.show(rows[-1:], COLUMNS)
    print()
    tables.show(rows, COLUMNS)
    tables.write(arguments.json, {"device": jax.devices()[0].device_kind, "rows": rows})


if __name__ == "__main__":
    main()
