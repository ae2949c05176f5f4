"""Estimates what the training step costs on 8, 64 and 256 devices: `python -m benchmarks.scaling --json=scaling.json`.

Nothing is run. XLA compiles the step for simulated CPU devices and the collectives are read from the program; FLOP are
counted at the full crop before optimization (`lowered.cost_analysis()`), where loops count once. A device has 1 labeled
and 1 unlabeled image in bfloat16, so its FLOP are the same on any number of devices.

Collectives reduce parameters, batch-norm statistics and sums over pixels, whose sizes depend neither on the crop nor on
the number of devices. So each recipe is compiled once, for 8 devices at crop 33; --check compiles one of them at
another crop and for 64 devices and prints whether anything differs. Collectives in the branch where the teacher uses
batch statistics run in the first epoch only and are left out of the times.

Assumptions (`MACHINES`). Time is the sum of computation and communication: nothing overlaps.
- computation: 40% of the peak rate of bfloat16 products: H100 SXM 989 TFLOP/s (NVIDIA, H100 datasheet, without
  sparsity); TPU v5p 459 TFLOP/s (Google, cloud.google.com/tpu/docs/v5p).
- bandwidth out of a device, GB/s: H100 in one node 450 (NVLink 4, 900 in both directions: H100 datasheet), across nodes
  50 (one 400 Gb/s ConnectX-7 per GPU: NVIDIA, DGX H100 user guide); TPU v5p 600 (1200 in both directions: the page
  above).
- rings: an all-reduce of b bytes over g devices sends 2 (g - 1) / g * b bytes out of each; an all-gather with a result
  of b bytes sends (g - 1) / g * b.
- programs for CPUs stand for those of accelerators, except for sums in bfloat16 (gradients of convolutions): the
  compiler for CPUs widens them, here they count as bfloat16. Gradients of the two student forwards (labeled and weak
  images; strong views) are reduced separately and then added. XLA's compiler for GPUs has a pass
  (AllReduceReassociate) that adds first, which would halve the bytes; the times do not assume it.
- latency of a collective: 2 log2(g) steps of 5 microseconds (GPUs) or 1 (TPUs). These are guesses without a source.

Columns: collectives per step as executed (in loops, once per iteration); their MB, and those of gradients; GB sent by a
device; TFLOP per device and step; ms of computation, of bytes sent, of latencies; share of communication in their sum,
and with 8 + 8 images per device, which are 8 times the computation and the same communication.
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
from collections.abc import Iterable
from typing import NamedTuple

import jax

from benchmarks import hlo, tables, train_step

RECIPES = ("pascal", "cityscapes", "coco")
DEVICES = (8, 64, 256)
COMPILED_DEVICES, COMPILED_CROP = 8, 33
CHECKS = ((COMPILED_DEVICES, 65), (64, COMPILED_CROP))  # (devices, crop) that must not change the collectives.
UTILIZATION = 0.4


class Machine(NamedTuple):
    """Peak rates of a device."""

    rate: float  # FLOP/s of bfloat16 products.
    near: float  # Bytes/s out of a device to the other devices of its node.
    far: float  # Bytes/s out of a device to other nodes.
    node: int  # Devices per node.
    hop: float  # Latency of a message, seconds.


MACHINES = {
    "H100": Machine(989e12, 450e9, 50e9, 8, 5e-6),
    "TPU v5p": Machine(459e12, 600e9, 600e9, 1, 1e-6),
}
COLUMNS = (
    "recipe", "machine", "devices", "collectives", "MB", "gradients MB", "GB sent", "TFLOP", "compute ms", "bytes ms",
    "latency ms", "share", "share with 8 + 8",
)  # fmt: skip


class Collective(NamedTuple):
    """A collective instruction of a compiled program."""

    kind: str  # all-reduce, ...
    bytes: int  # Size of its result on a device.
    group: int  # Devices that communicate with each other; 0: all.
    times: int  # Executions per step.
    branch: bool  # Whether it is in the branch of a true condition.
    origin: str  # Names of the JAX operations that it comes from.

    @property
    def of_gradients(self) -> bool:
        """Whether it sums gradients of convolutions over the devices; some are matrix products on a CPU."""
        operations = ("/conv_general_dilated", "/dot_general")
        return "transpose(" in self.origin and any(each in self.origin for each in operations)


def collectives(text: str, devices: int) -> list[Collective]:
    """Returns the collectives of a program that was compiled for `devices` CPUs, from `compiled.as_text()`."""
    listed = []
    for step in hlo.Program(text).steps():
        instruction = step.instruction
        if instruction.opcode in hlo.COLLECTIVES:
            # The compiler for CPUs widens sums in bfloat16 to float32 and names them "promoted". (A few small sums in
            # float32 may be combined with them.)
            size = instruction.bytes // (2 if "_promoted" in instruction.text("to_apply") else 1)
            group = _group(instruction.attributes, devices)
            listed.append(Collective(instruction.opcode, size, group, step.times, step.rare, instruction.op_name))
    return listed


def _group(code: str, devices: int) -> int:
    """Returns the number of devices per group of a collective, 0 for all `devices`.

    Groups are written as "replica_groups=mesh['a'=4,'b'=2] {'b'}", a mesh and the reduced axes, or "{{0,1},{2,3}}".
    """
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", code):
        sizes = dict(axis.split("=") for axis in match[1].split(","))
        group = math.prod(int(sizes[axis.strip()]) for axis in match[2].split(","))
    else:
        group = len(re.search(r"replica_groups=\{\{([\d,]*)\}", code)[1].split(","))
    return 0 if group == devices else group


def configure(recipe: str, crop: int = 0, devices: int = 1):
    """Returns a recipe with one labeled and one unlabeled image per device, in bfloat16; crop 0: the recipe's."""
    config = importlib.import_module(f"configs.{recipe}").get_config(f"crop={crop}" if crop else None)
    config.data.labeled_batch = config.data.unlabeled_batch = devices
    config.model.dtype = "bfloat16"
    return config


def compiled_collectives(recipe: str, devices: int, crop: int) -> list[Collective]:
    """Compiles the step at `crop` for the simulated devices of this process and returns its collectives."""
    lowered = train_step.lower(configure(recipe, crop, devices), jax.devices())
    return collectives(lowered.compile().as_text(), devices)


def count_flop(recipe: str, devices: int) -> float:
    """Returns the FLOP per device and step at the recipe's crop."""
    lowered = train_step.lower(configure(recipe, 0, devices), jax.devices())
    return lowered.cost_analysis()["flops"] / devices


def in_process(recipe: str, devices: int, crop: int = 0):
    """Returns `compiled_collectives`, or without a crop `count_flop`, from a process with that many devices."""
    # Without optimization of the machine code, which comes after the collectives.
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "benchmarks.scaling", "--read", recipe, str(devices), str(crop)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout
    result = json.loads(output.splitlines()[-1])
    return [Collective(*fields) for fields in result] if crop else result


def bytes_sent(collective: Collective, devices: int) -> float:
    """Returns the bytes that a device sends for one execution of a collective, in a ring."""
    group = collective.group or devices
    return (2 if collective.kind == "all-reduce" else 1) * (group - 1) / group * collective.bytes


def estimate(step: list[Collective], flop: float, devices: int, machine: Machine) -> dict:
    """Returns columns of the table for a step after the first epoch with these collectives and FLOP."""
    step = [collective for collective in step if not collective.branch]
    bandwidth = machine.near if devices <= machine.node else machine.far
    sent = sum(collective.times * bytes_sent(collective, devices) for collective in step)
    hops = sum(collective.times * 2 * math.log2(collective.group or devices) for collective in step)
    compute, communication = flop / (UTILIZATION * machine.rate), sent / bandwidth + hops * machine.hop
    return {
        "devices": devices,
        "collectives": sum(collective.times for collective in step),
        "MB": megabytes(step),
        "gradients MB": megabytes(collective for collective in step if collective.of_gradients),
        "GB sent": sent / 1e9,
        "TFLOP": flop / 1e12,
        "compute ms": 1e3 * compute,
        "bytes ms": 1e3 * sent / bandwidth,
        "latency ms": 1e3 * hops * machine.hop,
        "share": communication / (compute + communication),
        "share with 8 + 8": communication / (8 * compute + communication),
    }


def megabytes(step: Iterable[Collective]) -> float:
    """Returns the MB that the collectives of a step reduce or gather."""
    return sum(collective.times * collective.bytes for collective in step) / 1e6


def census(recipe: str, step: list[Collective]) -> list[dict]:
    """Returns a row per kind of collective and size of group: instructions, executions and MB per step, the largest."""
    groups = collections.defaultdict(list)
    for each in step:
        groups[each.kind, each.group or "all", "first epoch" if each.branch else "always"].append(each)
    rows = []
    for (kind, group, when), members in groups.items():
        largest = max(members, key=lambda each: each.bytes)
        rows.append({
            "recipe": recipe, "kind": kind, "group": group, "when": when, "instructions": len(members),
            "executions": sum(each.times for each in members), "MB": megabytes(members),
            "largest MB": largest.bytes / 1e6,
            "largest": "gradients" if largest.of_gradients else largest.origin[-50:],
        })  # fmt: skip
    return rows


def check(recipe: str, step: list[Collective]) -> None:
    """Prints whether another crop or number of devices changes a collective."""

    def counted(collectives: list[Collective]) -> collections.Counter:
        return collections.Counter(each._replace(origin="") for each in collectives)

    for devices, crop in CHECKS:
        other = in_process(recipe, devices, crop)
        verdict = "the same" if counted(other) == counted(step) else "DIFFERENT"
        summary = f"{len(other)} collectives, {megabytes(other):.3f} MB: {verdict}"
        print(f"{recipe}, {devices} devices, crop {crop}: {summary}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--check", choices=RECIPES, help="also compile this recipe for another crop and 64 devices")
    parser.add_argument("--json", type=pathlib.Path, help="file of the results")
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)  # Recipe, devices, crop: for `in_process`.
    arguments = parser.parse_args()
    if arguments.read:
        recipe, devices, crop = arguments.read[0], *map(int, arguments.read[1:])
        print(json.dumps(compiled_collectives(recipe, devices, crop) if crop else count_flop(recipe, devices)))
        return
    rows, counts = [], []
    for recipe in arguments.recipes:
        step, flop = in_process(recipe, COMPILED_DEVICES, COMPILED_CROP), in_process(recipe, COMPILED_DEVICES)
        counts += census(recipe, step)
        for name, machine in MACHINES.items():
            named = {"recipe": recipe, "machine": name}
            rows += [named | estimate(step, flop, devices, machine) for devices in DEVICES]
        tables.write(arguments.json, {"rows": rows, "collectives": counts})
        if recipe == arguments.check:
            check(recipe, step)
    print(f"compiled for {COMPILED_DEVICES} devices at crop {COMPILED_CROP}; other numbers of devices are computed")
    tables.show(counts)
    print()
    tables.show(rows, COLUMNS)


if __name__ == "__main__":
    main()
