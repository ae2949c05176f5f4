"""Times the whole training step, ours and PyTorch's, side by side: `python -m benchmarks.step --json=step.json`.

Each row runs in a process of its own, so that no process holds memory of another, within the time of --seconds. The
most important rows come first and results are written after each. On a CPU use --small, also with --crop=129.

Columns: ms per iteration; images/s (labeled and unlabeled together); peak memory, GiB; TFLOP per iteration, counted by
XLA in our program before optimization (for PyTorch: the same number, because the work is the same); share of the rate
of a large bfloat16 matrix product (float32 on a CPU) measured in the same process; CPU seconds per iteration, which
other load on the machine disturbs less than the time; seconds until the first step is done. `jax` includes making the
strong views; the batch of PyTorch has them ready-made.
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tables, train_step
from dssn_jax import sharding

RECIPES = {
    "voc_r101": "pascal:encoder=resnet101",
    "voc_r50": "pascal:encoder=resnet50",
    "cityscapes_r101": "cityscapes:encoder=resnet101",
    "cityscapes_r50": "cityscapes:encoder=resnet50",
    "coco_xception": "coco:encoder=xception",
}
# Forms of our step, with the keys that they set; those of PyTorch are in `torch_step.FORMS`.
OURS = {
    "jax": {},
    "jax_lean": {"method.perturb_labeled": False},
    "jax_float32": {"model.dtype": "float32"},
    "jax_float32_lean": {"model.dtype": "float32", "method.perturb_labeled": False},
}
# (recipe, form, batch), the most important first; batch 0: the largest that fits.
ROWS = (
    ("voc_r101", "jax", 8), ("voc_r101", "bf16_compiled", 8), ("voc_r101", "published", 8), ("voc_r101", "tf32", 8),
    ("voc_r101", "jax_lean", 8), ("voc_r101", "bf16", 8), ("voc_r101", "jax", 0), ("cityscapes_r101", "jax", 8),
    ("cityscapes_r101", "bf16", 8), ("voc_r50", "jax", 8), ("voc_r50", "bf16", 8),
)  # fmt: skip
SMALL_ROWS = tuple(
    (recipe, form, 2)
    for recipe in ("voc_r50", "coco_xception", "cityscapes_r50")
    for form in ("jax_float32", "jax", "published", "channels_last", "bf16", "compiled", "jax_float32_lean")
)
SMALL_CROP = 65
COLUMNS = (
    "recipe", "form", "crop", "batch", "ms", "images/s", "GiB", "TFLOP", "share", "cpu_s", "first_s",
)  # fmt: skip


def configure(recipe: str, crop: int, batch: int, options: dict):
    """Returns the configuration of a recipe with `batch` labeled and as many unlabeled images; crop 0: the recipe's."""
    name, _, argument = RECIPES[recipe].partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(argument + (f",crop={crop}" if crop else ""))
    config.data.labeled_batch = config.data.unlabeled_batch = batch
    config.model.dtype = "bfloat16"
    config.ema.batch_stats_epochs = 0  # As from the second epoch on: one forward pass of the teacher.
    if crop:  # The same share of the pixels of a group as at the recipe's crop.
        config.method.ohem_min_kept = int(config.method.ohem_min_kept * (crop / 801) ** 2)
    config.update_from_flattened_dict(options)
    return config


def time_steps(step: Callable, wait: Callable, seconds: float) -> dict[str, float]:
    """Times steps that are enqueued one after the other for `seconds`.

    Args:
      step: starts a step and returns its result.
      wait: waits for a result, or for a list of them.
      seconds: time for the measurement, at least 3 and at most 50 steps.

    Returns:
      {"ms", "cpu_s"} per step, and "first_s" until the first step was done.
    """
    started = time.perf_counter()
    wait(step())
    first = time.perf_counter() - started
    started = time.perf_counter()
    wait([step() for _ in range(2)])
    one = (time.perf_counter() - started) / 2
    steps = max(3, min(50, int(seconds / one)))
    started, cpu = time.perf_counter(), time.process_time()
    wait([step() for _ in range(steps)])
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"ms": 1000 * seconds / steps, "cpu_s": cpu / steps, "first_s": first}


def measure_jax(config, seconds: float) -> dict:
    """Times our step; see `measure`."""
    learner = train_step.build(config, jax.devices()[:1])
    state = learner.init_state()
    batch = sharding.put_batch(train_step.random_batch(config), learner.mesh)
    jax.block_until_ready((state, batch))
    started = time.perf_counter()
    lowered = learner.make_train_step().lower(state, batch)
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - started

    def step() -> dict:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    times = time_steps(step, jax.block_until_ready, seconds)
    times["first_s"] += compile_seconds
    memory, stats = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
    planned = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return times | {
        "flop": lowered.cost_analysis()["flops"],
        "ceiling": matmul_rate(),
        "bytes": stats.get("peak_bytes_in_use", planned),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "limit_bytes": stats.get("bytes_limit"),
        "device": jax.devices()[0].device_kind,
        "version": f"jax {jax.__version__}",
    }


def matmul_rate() -> float:
    """Returns the FLOP/s of a large matrix product, in bfloat16 (on a CPU in float32)."""
    size, dtype = (1024, jnp.float32) if jax.default_backend() == "cpu" else (8192, jnp.bfloat16)
    matrix = jax.random.normal(jax.random.PRNGKey(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    ms = time_steps(lambda: product(matrix, matrix), jax.block_until_ready, 1.0)["ms"]
    return 2 * size**3 / ms * 1e3


def measure_torch(config, form: str, seconds: float) -> dict:
    """Times PyTorch's step; see `measure`."""
    import torch

    from tests.reference import torch_step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    form = torch_step.FORMS[form]
    min_kept = config.method.ohem_min_kept * 2 if config.method.labeled_loss == "ohem" else 0
    step = torch_step.Step(config.model.encoder, len(config.data.classes), form, device, min_kept)
    raw, crop = train_step.random_batch(config), config.data.crop
    normal = np.random.default_rng(1).standard_normal((config.data.unlabeled_batch, crop, crop, 3), np.float32)
    inside = np.zeros((config.data.unlabeled_batch, crop, crop), bool)
    inside[:, crop // 4 : 3 * crop // 4, crop // 4 : 2 * crop // 3] = True
    arrays = dict.fromkeys(("x", "u", "m", "s1", "s2"), normal) | {"label": raw.label_x}
    arrays |= {"valid_u": raw.valid_u, "valid_m": raw.valid_m, "box1": inside, "box2": inside}
    batch = torch_step.to_device(arrays, form, device)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = time_steps(lambda: step(batch), lambda _: synchronize(), seconds)
    times["version"] = f"torch {torch.__version__}"
    return times | ({"bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {})


def measure(recipe: str, form: str, crop: int, batch: int, seconds: float) -> dict:
    """Measures a row in this process: {"ms", "cpu_s", "first_s", ...}."""
    config = configure(recipe, crop, batch, OURS.get(form, {}))
    times = measure_jax(config, seconds) if form in OURS else measure_torch(config, form, seconds)
    return {"recipe": recipe, "form": form, "crop": config.data.crop, "batch": batch, **times}


def run_row(row: tuple, crop: int, arguments, deadline: float) -> dict:
    """Measures a row in a new process; "note" is why a row has no times."""
    recipe, form, batch = row
    left = deadline - time.monotonic()
    named = {"recipe": recipe, "form": form, "crop": crop or None, "batch": batch}
    if left < 20:
        return named | {"note": "no time left"}
    command = [sys.executable, "-m", "benchmarks.step", "--row", recipe, form, str(crop), str(batch)]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", **os.environ}
    try:
        done = subprocess.run(
            [*command, f"--measure={arguments.measure}"], capture_output=True, text=True, timeout=left, env=environment
        )
    except subprocess.TimeoutExpired:
        return named | {"note": "no time left"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["failed"]
        memory = any("out of memory" in line.lower() or "RESOURCE_EXHAUSTED" in line for line in lines)
        errors = [line for line in lines if "Error" in line] or lines
        return named | {"note": "out of memory" if memory else errors[-1][:90]}
    return json.loads(done.stdout.splitlines()[-1])


def largest_batch(row: dict) -> int:
    """Returns the largest multiple of 4 images that should fit, from the memory of a measured row; 0 if unknown."""
    if not row.get("limit_bytes"):
        return 0
    free = 0.97 * row["limit_bytes"] - row["argument_bytes"]
    return int(free / (row["temp_bytes"] / row["batch"])) // 4 * 4


def present(rows: list[dict]) -> list[dict]:
    """Returns the rows of the table from those that were measured."""
    works = {(row["recipe"], row["batch"]): row for row in rows if row.get("flop") and "lean" not in row["form"]}
    table = []
    for row in rows:
        shown = {name: row.get(name) for name in ("recipe", "form", "crop", "batch", "note") if name in row}
        if "ms" in row:
            work = works.get((row["recipe"], row["batch"])) or {}
            flop, ceiling = row.get("flop", work.get("flop")), row.get("ceiling", work.get("ceiling"))
            shown |= {"ms": row["ms"], "images/s": 2 * row["batch"] / row["ms"] * 1e3}
            shown |= {"cpu_s": row["cpu_s"], "first_s": row["first_s"]}
            shown["GiB"] = row["bytes"] / 2**30 if "bytes" in row else None
            if flop:
                shown |= {"TFLOP": flop / 1e12, "share": flop / row["ms"] * 1e3 / ceiling}
        table.append(shown)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small crops and batches, for a CPU")
    parser.add_argument("--crop", type=int, help=f"side of the images (default: the recipe's; small: {SMALL_CROP})")
    parser.add_argument(
        "--only", default="", help="only rows whose recipe and form contain this, such as voc_r101 or jax"
    )
    parser.add_argument("--forms", nargs="+", help="only rows of these forms")
    parser.add_argument("--seconds", type=float, default=3600, help="time for all rows")
    parser.add_argument("--measure", type=float, default=3.0, help="seconds of timing per row")
    parser.add_argument("--json", type=pathlib.Path, help="file of the results")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)  # Recipe, form, crop, batch: one row, as JSON.
    arguments = parser.parse_args()
    if arguments.row:
        recipe, form, crop, batch = arguments.row
        print(json.dumps(measure(recipe, form, int(crop), int(batch), arguments.measure)))
        return
    deadline, rows = time.monotonic() + arguments.seconds, []
    crop = arguments.crop or (SMALL_CROP if arguments.small else 0)
    for recipe, form, batch in SMALL_ROWS if arguments.small else ROWS:
        if arguments.only not in f"{recipe} {form}" or form not in (arguments.forms or [form]):
            continue
        if batch == 0:
            batch = next((largest_batch(row) for row in rows if row["recipe"] == recipe and "temp_bytes" in row), 0)
            if batch == 0:
                continue
        rows.append(run_row((recipe, form, batch), crop, arguments, deadline))
        tables.show(present(rows[-1:]), COLUMNS)
        tables.write(arguments.json, {"rows": rows, "table": present(rows)})
    print()
    tables.show(present(rows), COLUMNS)


if __name__ == "__main__":
    main()
