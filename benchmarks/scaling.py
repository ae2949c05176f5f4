"""What the training step costs on 8, 64 and 256 devices, on paper: `python -m benchmarks.scaling --json=scaling.json`.

Nothing is run. The step is compiled by XLA for simulated CPU devices and its collectives are read from the program;
FLOP are counted at the full crop before optimization (`lowered.cost_analysis()`), where loops count once. A device has
1 labeled and 1 unlabeled image in bfloat16, so its FLOP are the same on any number of devices.

Collectives reduce parameters, batch-norm statistics and sums over pixels, whose sizes depend neither on the crop nor on
the number of devices. So each recipe is compiled once, for 8 devices at crop 33; --check compiles one of them at
another crop and for 64 devices and prints whether anything differs. Collectives in the branch where the teacher uses
batch statistics run in the first epoch alone and are left out of the times.

Assumptions (`MACHINES`). All of the time is the sum of computation and communication: nothing overlaps.
- computation: 40% of the peak rate of bfloat16 products: H100 SXM 989 TFLOP/s (NVIDIA, H100 datasheet, without
  sparsity); TPU v5p 459 TFLOP/s (Google, cloud.google.com/tpu/docs/v5p).
- bandwidth out of a device, GB/s: H100 in one node 450 (NVLink 4, 900 both ways: H100 datasheet), across nodes 50 (one
  400 Gb/s ConnectX-7 a GPU: NVIDIA, DGX H100 user guide); TPU v5p 600 (1200 both ways: the same page of Google's).
- a ring: an all-reduce of b bytes over g devices sends 2 (g - 1) / g * b bytes out of each; an all-gather with a result
  of b bytes sends (g - 1) / g * b.
- what is compiled for CPUs holds for accelerators, but for sums in bfloat16 (gradients of convolutions): the CPU's
  compiler widens them, here they count as bfloat16. Gradients of the two student forwards (labeled and weak images;
  strong views) are reduced apart and then added. XLA's compiler for GPUs has a pass (AllReduceReassociate) that adds
  first, which would halve the bytes; the times here do not count on it.
- latency of a collective: 2 log2(g) steps of 5 microseconds (GPUs) or 1 (TPUs). These are guesses without a source.

Columns: collectives a step, as run (in loops as often as these turn); MB of them, of it gradients; GB sent by a device;
TFLOP a device and step; ms of computation, of bytes sent, of latencies; share of communication in their sum,
and with 8 + 8 images a device, which are 8 times the computation and the same communication.
"""

import argparse
import collections
import importlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import tables

RECIPES = ("pascal", "cityscapes", "coco")
DEVICES = (8, 64, 256)
COMPILED_DEVICES, COMPILED_CROP = 8, 33
CHECKS = ((COMPILED_DEVICES, 65), (64, COMPILED_CROP))  # (devices, crop) that must not change the collectives.
UTILIZATION = 0.4


class Machine(NamedTuple):
    """What a device does at best."""

    rate: float  # FLOP/s of bfloat16 products.
    near: float  # Bytes/s out of a device to the `node` devices beside it.
    far: float  # Bytes/s out of a device to all others.
    node: int
    hop: float  # Seconds.


MACHINES = {
    "H100": Machine(989e12, 450e9, 50e9, 8, 5e-6),
    "TPU v5p": Machine(459e12, 600e9, 600e9, 1, 1e-6),
}
COLUMNS = (
    "recipe", "machine", "devices", "collectives", "MB", "of gradients", "GB sent", "TFLOP", "compute ms", "bytes ms",
    "latency ms", "share", "share at 8 + 8",
)  # fmt: skip


class Collective(NamedTuple):
    """A collective instruction of a compiled program."""

    kind: str  # all-reduce, ...
    bytes: int  # Of its result on a device.
    group: int  # Devices that take part together, on any number of devices; 0: all.
    times: int  # How often a step runs it.
    branch: bool  # In a branch of a conditional.
    origin: str  # The JAX operations that it comes from.

    @property
    def of_gradients(self) -> bool:
        """True where the gradients of convolutions are summed over the devices."""
        return "transpose(" in self.origin and "/conv_general_dilated" in self.origin


_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"= (.+?) ({_KINDS})\(")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`, of a CPU) for so many devices."""
    bodies, entry = {}, ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            body = bodies.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif line.startswith(" "):
            body.append(line)
    return list(_walk(bodies, entry, devices, 1, False))


def _walk(bodies: dict, name: str, devices: int, times: int, branch: bool) -> Iterator[Collective]:
    """The collectives of a computation that runs so many times, and of those that it calls."""
    for line in bodies[name]:
        code, _, rest = line.partition(", metadata=")
        if found := _COLLECTIVE.search(code):
            origin = re.search(r'op_name="([^"]*)"', rest)
            # The CPU's compiler widens sums in bfloat16 to float32, and names them so. (A few small sums in float32 may
            # be combined with them.)
            size = _size(found[1]) // (2 if "_promoted" in code else 1)
            yield Collective(found[2], size, _group(code, devices), times, branch, origin[1] if origin else "")
        elif found := re.search(r" while\(.*body=%?([\w.-]+)", code):
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            yield from _walk(bodies, found[1], devices, times * int(turns[1] if turns else 1), branch)
        elif " conditional(" in code:
            listed = re.search(r"branch_computations=\{([^}]*)\}", code)
            names = listed[1].split(",") if listed else re.findall(r"(?:true|false)_computation=([^,]*)", code)
            for each in names:
                yield from _walk(bodies, each.strip(" %"), devices, times, True)
        elif found := re.search(r" call\(.*to_apply=%?([\w.-]+)", code):
            yield from _walk(bodies, found[1], devices, times, branch)


def _size(shapes: str) -> int:
    """Bytes of "f32[3,3]{1,0}" or of a tuple of such."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(_BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in found)


def _group(code: str, devices: int) -> int:
    """Devices that take part together, 0 for all `devices`.

    From "replica_groups=mesh['a'=4,'b'=2] {'b'}", a mesh and the axes along which is reduced, or "{{0,1},{2,3}}".
    """
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", code):
        sizes = dict(axis.split("=") for axis in found[1].split(","))
        group = math.prod(int(sizes[axis.strip()]) for axis in found[2].split(","))
    else:
        group = len(re.search(r"replica_groups=\{\{([\d,]*)\}", code)[1].split(","))
    return 0 if group == devices else group


def configure(recipe: str, crop: int = 0, devices: int = 1):
    """A recipe with one labeled and one unlabeled image a device, in bfloat16; crop 0: the recipe's."""
    config = importlib.import_module(f"configs.{recipe}").get_config(f"crop={crop}" if crop else None)
    config.data.labeled_batch = config.data.unlabeled_batch = devices
    config.model.dtype = "bfloat16"
    return config


def abstract_step(config, mesh):
    """Returns the jitted training step, and shapes of the state and of the batch that it takes; no data is needed."""
    from dssn_jax import models
    from dssn_jax.learner import learner as experiment
    from dssn_jax.learner import optimizer
    from dssn_jax.learner import step as train_step
    from dssn_jax.methods import method as methods
    from dssn_jax.methods import strong_augment as augment

    model = models.build(config.model, len(config.data.classes))
    method = methods.from_config(config, steps_per_epoch=100)
    sgd, schedule = optimizer.from_config(config.optimizer, 1000)
    step = train_step.compile_step(model, method, sgd, schedule, config.data, augment.from_config(config.views), mesh)
    return step, experiment.abstract_state(config, mesh), abstract_batch(config)


def abstract_batch(config) -> dict:
    """Shapes of what the input pipeline sends a method with two strong views, which the device makes."""
    import jax
    import numpy as np

    crop, labeled, unlabeled = config.data.crop, config.data.labeled_batch, config.data.unlabeled_batch
    batch = {"image_x": ((labeled, crop, crop, 3), np.uint8), "label_x": ((labeled, crop, crop), np.uint8)}
    for kind in "um":
        batch[f"image_{kind}"] = ((unlabeled, crop, crop, 3), np.uint8)
        batch[f"valid_{kind}"] = ((unlabeled, crop, crop), np.bool_)
    batch["box1"] = batch["box2"] = ((unlabeled, 4), np.int32)
    return {name: jax.ShapeDtypeStruct(*each) for name, each in batch.items()}


def read(recipe: str, devices: int, crop: int) -> list[Collective]:
    """Compiles the step for simulated devices of this process, at `crop`."""
    from dssn_jax import sharding

    config = configure(recipe, crop, devices)
    step, state, batch = abstract_step(config, sharding.make_mesh())
    return collectives(step.lower(state, batch).compile().as_text(), devices)


def count_flop(recipe: str, devices: int) -> float:
    """FLOP of a device in a step at the recipe's crop."""
    from dssn_jax import sharding

    step, state, batch = abstract_step(configure(recipe, 0, devices), sharding.make_mesh())
    return step.lower(state, batch).cost_analysis()["flops"] / devices


def in_process(recipe: str, devices: int, crop: int) -> dict:
    """{"collectives"}, or at crop 0 {"flop"}, from a new process: the number of devices is set once in each."""
    # Without optimization of the machine code, which comes after the collectives.
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "benchmarks.scaling", "--read", recipe, str(devices), str(crop)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        key: [Collective(*each) for each in value] if key == "collectives" else value for key, value in found.items()
    }


def sent(each: Collective, devices: int) -> float:
    """Bytes that a device sends for a collective, once, in a ring."""
    group = each.group or devices
    return (2 if each.kind == "all-reduce" else 1) * (group - 1) / group * each.bytes


def estimate(found: list[Collective], flop: float, devices: int, machine: Machine) -> dict:
    """Columns of the table, of a step after the first epoch."""
    found = [each for each in found if not each.branch]
    bandwidth = machine.near if devices <= machine.node else machine.far
    total = sum(each.times * sent(each, devices) for each in found)
    latency = sum(each.times * 2 * math.log2(each.group or devices) * machine.hop for each in found)
    compute = flop / (UTILIZATION * machine.rate)
    communication = total / bandwidth + latency
    return {
        "devices": devices,
        "collectives": sum(each.times for each in found),
        "MB": sum(each.times * each.bytes for each in found) / 1e6,
        "of gradients": sum(each.times * each.bytes for each in found if each.of_gradients) / 1e6,
        "GB sent": total / 1e9,
        "TFLOP": flop / 1e12,
        "compute ms": 1e3 * compute,
        "bytes ms": 1e3 * total / bandwidth,
        "latency ms": 1e3 * latency,
        "share": communication / (compute + communication),
        "share at 8 + 8": communication / (8 * compute + communication),
    }


def census(recipe: str, found: list[Collective]) -> list[dict]:
    """A row for each kind of collective and size of group: instructions, runs a step, MB a step, the largest."""
    rows = collections.defaultdict(list)
    for each in found:
        rows[each.kind, each.group or "all", "first epoch" if each.branch else "always"].append(each)
    table = []
    for (kind, group, when), them in rows.items():
        row = {"recipe": recipe, "kind": kind, "group": group, "when": when, "instructions": len(them)}
        row |= {"runs": sum(each.times for each in them), "MB": sum(each.times * each.bytes for each in them) / 1e6}
        largest = max(them, key=lambda each: each.bytes)
        origin = "gradients" if largest.of_gradients else largest.origin[-50:]
        table.append(row | {"largest MB": largest.bytes / 1e6, "which": origin})
    return table


def check(recipe: str, found: list[Collective]) -> None:
    """Prints whether another crop or number of devices changes a collective."""

    def counted(them: list[Collective]) -> collections.Counter:
        return collections.Counter(each._replace(origin="") for each in them)

    for devices, crop in CHECKS:
        other = in_process(recipe, devices, crop)["collectives"]
        verdict = "the same" if counted(other) == counted(found) else "DIFFERENT"
        total = sum(each.times * each.bytes for each in other)
        print(
            f"{recipe}, {devices} devices, crop {crop}: {len(other)} collectives, {total} bytes: {verdict}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--check", choices=RECIPES, help="compile this one for other crops and numbers of devices too")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the results")
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)  # Recipe, devices, crop: as JSON.
    arguments = parser.parse_args()
    if arguments.read:
        recipe, devices, crop = arguments.read[0], *map(int, arguments.read[1:])
        found = {"collectives": read(recipe, devices, crop)} if crop else {"flop": count_flop(recipe, devices)}
        print(json.dumps(found))
        return
    rows, counts = [], []
    for recipe in arguments.recipes:
        found = in_process(recipe, COMPILED_DEVICES, COMPILED_CROP)["collectives"]
        flop = in_process(recipe, COMPILED_DEVICES, 0)["flop"]
        counts += census(recipe, found)
        for name, machine in MACHINES.items():
            rows += [
                {"recipe": recipe, "machine": name, **estimate(found, flop, devices, machine)} for devices in DEVICES
            ]
        tables.write(arguments.json, {"rows": rows, "collectives": counts})
        if recipe == arguments.check:
            check(recipe, found)
    print(f"compiled for {COMPILED_DEVICES} devices at crop {COMPILED_CROP}, computed from it for others")
    tables.show(counts)
    print()
    tables.show(rows, COLUMNS)


if __name__ == "__main__":
    main()
