"""Compiles the training step for a chip that is not there: memory, bytes moved, launches, collectives.

    make compilers
    .venv-cuda/bin/python -m benchmarks.compiled --target=h100 --config=configs/pascal.py --config.model.dtype=bfloat16
    .venv-tpu/bin/python -m benchmarks.compiled --target=v5p --topology=v5p:2x2x1 --config=configs/pascal.py

Nothing is run and no accelerator is needed: XLA compiles the step of a configuration, whole, for a chip described in
`benchmarks/targets`; numbers are per device and do not vary with load. --topology is SLICESxHOSTSxDEVICES for GPUs
(1x1x8: a machine of eight), KIND:AxB[xC] for TPUs, a number of simulated devices for the target `cpu`. The batch is
that of the configuration, split over the devices.

- memory: the compiler's plan. Arguments (state and batch), results, of which aliased ones lie in the arguments' place,
  temporary arrays; `peak_gib` is their sum. It fits if that is at most the chip's memory; JAX takes 75% of a GPU's
  unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
- launches: kernels, library calls, copies and collectives of the schedule; loops times their turns, of a conditional
  the branch of a false condition (the teacher with running statistics, from the second epoch on).
- bytes moved: operands and results of every launch, each as a whole. Caches are not modeled; a launch that reads a part
  of an operand counts all of it. What a TPU's compiler keeps in vector memory counts where it is brought there from
  main memory or written back ("prefetch", beside other kernels), not where kernels read it.
- FLOP: of matrix products and convolutions, two per multiplication and addition.
- roofline: sum over launches of the larger of bytes / bandwidth and FLOP / rate, with the target's rates; the time of a
  step cannot be below it unless a cache saves bytes. Collectives count with the bytes of their arrays in memory.
- parts: by the functions of the step that made an operation; a kernel fused from several counts where its result does.

`model.attention=auto` becomes what it is on such a chip: cudnn in bfloat16 on GPUs. Its scratch space is not planned,
because cuDNN must be asked for it on a device.

For TPUs "optimal_seconds", "bytes accessed" and "flops" are the compiler's own estimates (`compiled.cost_analysis()`).
The first two count what is brought into vector memory beside other kernels like any other work, so that a program of
--level=O1, which brings nothing, looks better than it is; `estimated_mcycles`, the sum of the cycles that the same
compiler writes beside its kernels, does not.
Triton's products are off for GPUs (`compiler_options` of the target): autotuning, which chooses between them and those
of cuBLAS, needs a device.
"""

import argparse
import ast
import collections
import json
import os
import pathlib
import time
from typing import NamedTuple

import jax
from jax.experimental import topologies

from benchmarks import hlo, tables, train_step
from dssn_jax import commands

TARGETS = pathlib.Path(__file__).parent / "targets"
ROOT = pathlib.Path(__file__).parents[1]
GIB = 2**30
HEAVIEST = 20
LEVELS = ("O0", "O1", "O2", "O3")
# Functions of the step -> part; the first that is on the stack of an operation decides.
PARTS = (
    ("update", ("TrainStep._update",)),
    ("loss", ("loss_terms", "total_loss")),
    ("teacher", ("Objective.teacher_logits",)),
    ("forward", ("Objective.student_logits", "Objective.encode")),
    ("views", ("Learner._strong_views", "Learner._to_views", "strong_views")),
)
VIEW_FILES = ("strong_augment.py", "views.py")  # Bodies of loops have shorter stacks.
# Layers of all networks call functions of these files: the lines of the layers say more.
SHARED_FILES = ("batch_norm.py", "convolution.py", "depthwise.py", "platforms.py")
TOTALS = (
    "arguments_gib", "output_gib", "alias_gib", "temp_gib", "peak_gib", "gigabytes_moved", "launches", "tflop",
    "roofline_ms", "optimal_ms", "accessed_gb", "compiler_tflop", "estimated_mcycles", "compile_s",
)  # fmt: skip


class Target(NamedTuple):
    """A chip, from `benchmarks/targets/NAME.json`."""

    platform: str  # cuda, tpu or cpu.
    topology: str
    memory_bytes: int
    bytes_per_second: float
    flop_per_second: dict[str, float]  # By precision, as `hlo.Program.products` names it.
    bytes_source: str
    flop_source: str
    description: str = ""  # File of the GPU's description for the compiler.
    compiler_options: dict = {}  # noqa: RUF012
    # How devices reach each other: "machine", devices of one; "bytes_per_second" out of a device, to its "machine" and
    # "beyond" it; "seconds_per_message"; "source".
    network: dict = {}  # noqa: RUF012


class Kernel(NamedTuple):
    """A launch of the program; numbers are those of all its executions in a step."""

    name: str
    kind: str  # convolution, product, collective, copy, prefetch, other.
    part: str
    times: int
    bytes: float
    flop: float
    seconds: float
    source: str  # "file:line function": the innermost line of this project.
    op_name: str
    cycles: int  # That a compiler for TPUs expects; else 0.


def read_target(name: str) -> Target:
    """Reads the facts of a chip."""
    return Target(**json.loads((TARGETS / f"{name}.json").read_text()))


def devices(target: Target, topology: str) -> list[jax.Device]:
    """Returns the devices of a topology, which exist for the compiler alone; those of a CPU are simulated."""
    if target.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", int(topology))
        return jax.devices()
    if target.platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # No machine to ask for its slice.
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    description = (TARGETS / target.description).read_text()
    described = topologies.get_topology_desc("", "cuda", target_config=description, topology=topology)
    return list(described.devices)


def describe(config, target: Target, topology: str, options: dict) -> dict:
    """Compiles the step of a configuration and returns its numbers."""
    chips = devices(target, topology)
    lowered = train_step.lower(config, chips)
    started = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - started
    program = hlo.Program(compiled.as_text())
    return {
        "devices": len(chips),
        "images_per_device": (config.data.labeled_batch + config.data.unlabeled_batch) / len(chips),
        "compile_s": round(seconds),
        **memory(compiled.memory_analysis(), target),
        **estimates(compiled.cost_analysis()),
        **summary(kernels(program, target)),
        "collectives": collectives(program, len(chips)),
        "loops_of_unknown_length": len(program.unbounded),
    }


def memory(plan, target: Target) -> dict:
    """Returns the compiler's plan in GiB of a device, and whether the chip has as much."""
    arguments, output, alias, temporary = (
        getattr(plan, f"{kind}_size_in_bytes") for kind in ("argument", "output", "alias", "temp")
    )
    peak = arguments + output - alias + temporary
    return {
        "arguments_gib": arguments / GIB,
        "output_gib": output / GIB,
        "alias_gib": alias / GIB,
        "temp_gib": temporary / GIB,
        "peak_gib": peak / GIB,
        "memory_gib": target.memory_bytes / GIB,
        "fits": peak <= target.memory_bytes,
    }


def estimates(cost: dict | None) -> dict:
    """Returns the compiler's own estimates, which compilers for GPUs do not give."""
    names = {"optimal_seconds": ("optimal_ms", 1e3), "bytes accessed": ("accessed_gb", 1e-9)}
    names["flops"] = ("compiler_tflop", 1e-12)
    return {key: cost[name] * scale for name, (key, scale) in names.items() if cost and cost.get(name, -1) > 0}


def kernels(program: hlo.Program, target: Target) -> list[Kernel]:
    """Returns what a step launches, without branches that are not taken after the first epoch."""
    return [_kernel(program, step, target) for step in program.steps() if not step.rare]


def _kernel(program: hlo.Program, step: hlo.Step, target: Target) -> Kernel:
    instruction, moved = step.instruction, program.bytes_moved(step)
    products, origin = program.products(step), program.origin(step)
    frames = program.frames(origin)
    arithmetic = sum(flop / target.flop_per_second[precision] for flop, precision in products)
    return Kernel(
        name=instruction.name,
        kind=kind(instruction, bool(products)),
        part=part(origin.op_name, frames),
        times=step.times,
        bytes=step.times * moved,
        flop=step.times * sum(flop for flop, _ in products),
        seconds=step.times * max(moved / target.bytes_per_second, arithmetic),
        source=source(frames),
        op_name=origin.op_name,
        cycles=step.times * instruction.estimated_cycles,
    )


def kind(instruction: hlo.Instruction, multiplies: bool) -> str:
    """Returns what a launch is; `multiplies`: whether products or convolutions are in it."""
    if instruction.opcode.removesuffix("-start") in hlo.COLLECTIVES:
        return "collective"
    if "conv" in instruction.target or instruction.opcode == "convolution":
        return "convolution"
    if multiplies:
        return "product"
    if not instruction.opcode.startswith("copy"):
        return "other"
    return "prefetch" if any(array.on_chip for array in instruction.arrays) else "copy"


def part(op_name: str, frames: list[hlo.Frame]) -> str:
    """Returns the part of the step that an operation belongs to; "other" if neither stack nor name tells."""
    functions, files = {frame.function for frame in frames}, {pathlib.Path(frame.file).name for frame in frames}
    backward = "transpose(" in op_name
    name_of_part = next((name for name, owners in PARTS if functions & {*owners}), "")
    if not name_of_part and files & {*VIEW_FILES}:
        name_of_part = "views"
    if not name_of_part and "Network." in op_name:
        name_of_part = "forward" if "jvp(" in op_name else "teacher"
    if not name_of_part:
        name_of_part = "loss" if "jvp(" in op_name else "other"
    if backward:
        return {"forward": "backward", "loss": "loss, backward"}.get(name_of_part, name_of_part)
    return name_of_part


def source(frames: list[hlo.Frame]) -> str:
    """Returns the innermost line of this project that says which layer it is, "" if there is none."""
    for frame in frames:
        path = pathlib.Path(frame.file)
        if path.is_relative_to(ROOT) and "site-packages" not in frame.file and path.name not in SHARED_FILES:
            return f"{path.relative_to(ROOT)}:{frame.line} {frame.function}"
    return ""


def summary(launched: list[Kernel]) -> dict:
    """Returns totals, tables by kind and by part, and the heaviest kernels and source lines."""
    total = _row(launched)
    cycles = sum(each.cycles for each in launched)
    heaviest = sorted(launched, key=lambda each: -each.seconds)[:HEAVIEST]
    return {
        "gigabytes_moved": total["gigabytes"],
        "launches": total["launches"],
        "tflop": total["tflop"],
        "roofline_ms": total["ms"],
        **({"estimated_mcycles": cycles / 1e6} if cycles else {}),
        "kinds": _table(launched, "kind"),
        "parts": _table(launched, "part"),
        "sources": _table(launched, "source")[:HEAVIEST],
        "kernels": [
            {"name": each.name, "kind": each.kind, "part": each.part, **_row([each]), "source": each.source}
            | {"op_name": each.op_name[-100:]}
            for each in heaviest
        ],
    }


def _row(launched: list[Kernel]) -> dict:
    return {
        "launches": sum(each.times for each in launched),
        "gigabytes": round(sum(each.bytes for each in launched) / 1e9, 4),
        "tflop": round(sum(each.flop for each in launched) / 1e12, 4),
        "ms": round(1e3 * sum(each.seconds for each in launched), 4),
    }


def _table(launched: list[Kernel], field: str) -> list[dict]:
    """Returns a row for each value of a field of the kernels, the longest first."""
    groups = collections.defaultdict(list)
    for each in launched:
        groups[getattr(each, field)].append(each)
    return sorted(({field: name, **_row(group)} for name, group in groups.items()), key=lambda row: -row["ms"])


def collectives(program: hlo.Program, devices: int) -> list[dict]:
    """Returns kinds of collectives: executions, MB of their results, and how many run beside other kernels.

    `group` is the number of devices that take part in one; 0 for all `devices`.
    """
    rows: dict[tuple, dict] = {}
    for step in program.steps():
        opcode = step.instruction.opcode.removesuffix("-start")
        if step.rare or opcode not in hlo.COLLECTIVES:
            continue
        dtypes = "+".join(sorted({array.dtype for array in step.instruction.arrays}))
        key = {"kind": opcode, "dtype": dtypes, "group": step.instruction.group(devices)}
        row = rows.setdefault(tuple(key.values()), key | {"count": 0, "MB": 0, "overlapped": 0, "overlapped_MB": 0})
        megabytes = step.times * step.instruction.bytes / 1e6
        row["count"] += step.times
        row["MB"] += megabytes
        if program.overlaps(step):
            row["overlapped"] += step.times
            row["overlapped_MB"] += megabytes
    return list(rows.values())


def compare(old: dict, new: dict) -> list[dict]:
    """Returns a row for each total and part: old, new and their ratio."""
    pairs = [(name, old.get(name), new.get(name)) for name in TOTALS]
    for column in ("gigabytes", "launches", "ms"):
        before, after = ({row["part"]: row[column] for row in each["parts"]} for each in (old, new))
        names = dict.fromkeys([*before, *after])
        pairs += [(f"{name}: {column}", before.get(name, 0), after.get(name, 0)) for name in names]
    pairs = [pair for pair in pairs if pair[1] is not None and pair[2] is not None]
    return [{"": name, "old": a, "new": b, "new / old": b / a if a else None} for name, a, b in pairs]


def report(result: dict) -> None:
    """Prints the tables of a result."""
    tables.show([{"": name, "value": result[name]} for name in (*TOTALS, "memory_gib", "fits") if name in result])
    for name in ("kinds", "parts", "collectives", "sources", "kernels"):
        print(f"\n{name}")
        tables.show([{key: value for key, value in row.items() if key != "op_name"} for row in result[name]])


def _option(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, {"true": True, "false": False}.get(value, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100", choices=sorted(file.stem for file in TARGETS.glob("*.json")))
    parser.add_argument("--topology", help="default: the target's")
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE: an option of the compiler")
    parser.add_argument("--level", choices=LEVELS, help="of optimization; default: the compiler's own, the slowest")
    parser.add_argument("--json", type=pathlib.Path, help="file of the results")
    parser.add_argument("--compare", type=pathlib.Path, help="file of earlier results to compare with")
    arguments, settings = parser.parse_known_args()
    _, values = commands.parse(["--mode=check", *settings])
    config, target = values["config"].value, read_target(arguments.target)
    if target.platform == "cuda" and (config.model.attention, config.model.dtype) == ("auto", "bfloat16"):
        config.model.attention = "cudnn"
    topology = arguments.topology or target.topology
    options = target.compiler_options | dict(map(_option, arguments.option))
    level = [f"--level={arguments.level}"] if arguments.level else []
    if level:
        jax.config.update("jax_optimization_level", arguments.level)
    jax.config.update("jax_platforms", "cpu")  # Keys of the run are made here; everything else is compiled only.
    result = {
        "command": " ".join(["python -m benchmarks.compiled", f"--target={arguments.target}"])
        + "".join(f" {setting}" for setting in [f"--topology={topology}", *level, *settings]),
        "jax": jax.__version__,
        "target": arguments.target,
        "compile_flags": options,
        "bandwidth": f"{target.bytes_per_second:.4g} B/s: {target.bytes_source}",
        "rates": {"FLOP/s": target.flop_per_second, "source": target.flop_source},
        **describe(config, target, topology, options),
    }
    tables.write(arguments.json, result)
    report(result)
    if arguments.compare:
        print()
        tables.show(compare(json.loads(arguments.compare.read_text()), result))


if __name__ == "__main__":
    main()
