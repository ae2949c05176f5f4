"""Reads the text of a compiled program (`compiled.as_text()`): its instructions, how often each runs, its arithmetic.

The text is that of XLA's optimized HLO: computations of one instruction per line; operands are named, so their shapes
are those of the instructions that define them. Source lines come from the tables of stack frames at its beginning.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64,
    "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(r"\b(pred|token|opaque|[suf]\d+\w*|bf16|c64|c128)\[([\d,]*)\](?:\{([^{}]*)\})?")
_ON_CHIP = "S(1)"  # In a layout: the memory space of a TPU's vector memory.
_HEADER = re.compile(r"(ENTRY )?%?([\w.$-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.$-]+) = ")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
# Instructions of a schedule that do no work. An asynchronous pair counts once, at its first half.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier",
    "optimization-barrier", "partition-id", "replica-id", "domain",
}  # fmt: skip
COLLECTIVES = (
    "all-reduce", "all-gather", "all-to-all", "ragged-all-to-all", "reduce-scatter", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


class Array(NamedTuple):
    """Dtype, as HLO names it, sizes, and whether it is in the vector memory of a TPU, on the chip."""

    dtype: str
    sizes: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        return (math.prod(self.sizes) * _BITS[self.dtype] + 7) // 8


class Frame(NamedTuple):
    """A line of Python that made an instruction."""

    file: str
    line: int
    function: str


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # Its result; a nested tuple is flattened.
    operands: tuple[str, ...]  # Names of instructions of the same computation.
    attributes: str  # The rest of the line.

    @property
    def bytes(self) -> int:
        """Size of the results."""
        return sum(array.bytes for array in self.results)

    @property
    def bytes_in_memory(self) -> int:
        """Size of the results in the main memory of the device."""
        return sum(array.bytes for array in self.results if not array.on_chip)

    @property
    def results(self) -> tuple[Array, ...]:
        """Its arrays without what else is returned: scratch space of libraries' calls, operands of starts."""
        arrays, count = self.arrays, len(self.operands)
        if self.opcode == "copy-start":
            arrays = arrays[:1]
        elif self.target.startswith("__cu") and len(arrays) > 1 and arrays[-1].dtype in ("u8", "s8"):
            arrays = arrays[:-1]
        elif self.opcode in ("all-gather-start", "collective-permute-start"):
            arrays = arrays[count : 2 * count]
        return arrays

    @functools.cached_property
    def target(self) -> str:
        """Name of the function that a custom call calls; "" for other instructions."""
        return self._string("custom_call_target") if self.opcode == "custom-call" else ""

    @functools.cached_property
    def op_name(self) -> str:
        """Name stack of the JAX operation that it comes from."""
        return self._string("op_name")

    @functools.cached_property
    def calls(self) -> tuple[str, ...]:
        """Computations that run as parts of it: a fusion's, those of an asynchronous start or a call."""
        return tuple(re.findall(r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.$-]+)", self.attributes))

    @property
    def estimated_cycles(self) -> int:
        """Cycles that a compiler for TPUs expects it to take; 0 if none are written."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else 0

    def integers(self, key: str) -> tuple[int, ...]:
        """Returns the numbers of KEY={1,2} or, in the configuration of a library call, of "KEY":["1","2"]."""
        match = re.search(rf'\b{key}"?[=:][\[{{]([^\]}}]*)[\]}}]', self.attributes)
        return tuple(map(int, re.findall(r"\d+", match[1]))) if match else ()

    def group(self, devices: int) -> int:
        """Returns how many devices take part in a collective; 0 for all `devices`.

        Groups are written as lists, "replica_groups={{0,1},{2,3}}", as "[2,4]<=[8]", groups times members of a
        numbering, or as "mesh['a'=4,'b'=2] {'b'}", a mesh and the axes of a group.
        """
        if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", self.attributes):
            sizes = dict(axis.split("=") for axis in match[1].split(","))
            members = math.prod(int(sizes[axis.strip()]) for axis in match[2].split(","))
        elif match := re.search(r"replica_groups=\[\d+,(\d+)\]", self.attributes):
            members = int(match[1])
        else:
            match = re.search(r"replica_groups=\{\{([\d,]*)\}", self.attributes)
            members = len(match[1].split(",")) if match else devices
        return 0 if members == devices else members

    def text(self, key: str) -> str:
        """Returns the word after KEY=, "" if there is none."""
        match = re.search(rf"\b{key}=%?([\w.$>-]+)", self.attributes)
        return match[1] if match else ""

    def _string(self, key: str) -> str:
        match = re.search(rf'\b{key}="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1] if match else ""


class Step(NamedTuple):
    """An instruction that a run of the program launches."""

    instruction: Instruction
    computation: str
    times: int  # Executions in a run.
    rare: bool  # Whether it is in a branch that a false condition, or index 0, does not take.
    start: tuple[str, str]  # Computation and name of what starts it: itself, or an async-start that calls it.


class Program:
    """A compiled program.

    Attributes:
      computations: name -> name -> instruction, in the order of the schedule.
      entry: name of the computation that a run executes.
      unbounded: names of loops whose number of turns the text does not tell; they count as one turn.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.unbounded: set[str] = set()
        tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
        table, body = None, None
        for line in text.splitlines():
            if line in tables:
                table = tables[line]
            elif body is None and table is not None and (row := re.match(r"(\d+) (.*)", line)):
                table[int(row[1])] = row[2]
            elif header := _HEADER.match(line):
                body = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif line.startswith("}"):
                body = None
            elif body is not None and (start := _INSTRUCTION.match(line)):
                body[start[1]] = _instruction(start[1], line[start.end() :])
        self._tables = tables

    def origin(self, step: Step) -> Instruction:
        """Returns the instruction that tells where a launch comes from.

        That is itself, or for those that the compiler made without a name: the last named one that was fused into it,
        else the first named one on the way to where its operands come from.
        """
        instruction, defined = step.instruction, self.computations[step.computation]
        if instruction.op_name:
            return instruction
        fused = [each for called in instruction.calls for each in self.computations.get(called, {}).values()]
        named = [each for each in fused if each.op_name and each.opcode not in _FREE]
        if named:
            return named[-1]
        reached, waiting = {instruction.name}, list(instruction.operands)
        while waiting:
            name = waiting.pop(0)
            if name in reached or name not in defined:
                continue
            reached.add(name)
            if defined[name].op_name and defined[name].opcode not in _FREE:
                return defined[name]
            waiting += defined[name].operands
        return instruction

    def frames(self, instruction: Instruction) -> list[Frame]:
        """Returns the stack of Python frames that made an instruction, the innermost first; [] if not recorded."""
        number, frames = int(instruction.text("stack_frame_id") or 0), []
        while number and number in self._tables["StackFrames"]:
            frame = _fields(self._tables["StackFrames"][number])
            location = _fields(self._tables["FileLocations"][frame["file_location_id"]])
            file = self._tables["FileNames"][location["file_name_id"]].strip('"')
            function = self._tables["FunctionNames"][location["function_name_id"]].strip('"')
            frames.append(Frame(file, location["line"], function))
            number = frame["parent_frame_id"] - 1  # Written one too high: a frame without a parent has 1.
        return frames

    def steps(self) -> Iterator[Step]:
        """Yields what a run launches, in the order of the schedule; all branches of conditionals."""
        yield from self._walk(self.entry, 1, False)

    def _walk(self, computation: str, times: int, rare: bool, start: tuple[str, str] | None = None) -> Iterator[Step]:
        for instruction in self.computations[computation].values():
            opcode = instruction.opcode
            if opcode == "while":
                yield from self._walk(instruction.text("body"), times * self._turns(instruction), rare)
            elif opcode == "conditional":
                for index, branch in enumerate(_branches(instruction)):
                    yield from self._walk(branch, times, rare or index > 0)
            elif opcode in ("call", "async-start"):
                own = (computation, instruction.name) if opcode == "async-start" else start
                for called in instruction.calls:
                    yield from self._walk(called, times, rare, own)
            elif opcode not in _FREE and not opcode.endswith(("-done", "-update")):
                yield Step(instruction, computation, times, rare, start or (computation, instruction.name))

    def _turns(self, loop: Instruction) -> int:
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if not trips:
            self.unbounded.add(loop.name)
        return int(trips[1]) if trips else 1

    def overlaps(self, step: Step) -> bool:
        """Returns whether other work is scheduled between the start of an asynchronous instruction and its end."""
        computation, name = step.start
        schedule, busy, waiting = iter(self.computations[computation].values()), False, {name}
        start = next(each for each in schedule if each.name == name)
        for each in schedule if start.opcode.endswith("-start") else ():
            if waiting & {*each.operands}:
                if each.opcode.endswith("-done"):
                    return busy
                waiting.add(each.name)
            else:
                busy = busy or not (each.opcode in _FREE or each.opcode.endswith(("-start", "-done", "-update")))
        return False

    def bytes_moved(self, step: Step) -> int:
        """Returns the bytes of operands and results of one execution in main memory, each once and as a whole."""
        defined = self.computations[step.computation]
        operands = {name for name in step.instruction.operands if name in defined}
        return step.instruction.bytes_in_memory + sum(defined[name].bytes_in_memory for name in operands)

    def products(self, step: Step) -> list[tuple[float, str]]:
        """Returns (FLOP, precision) of the matrix products, convolutions and attention in one execution.

        Two FLOP per multiplication and addition, as if no convolution met the border. Precision is "float32" where all
        digits are asked for, else the dtype of the first operand, with "tf32" for f32.
        """
        return self._products(step.instruction, step.computation)

    def _products(self, instruction: Instruction, computation: str) -> list[tuple[float, str]]:
        defined, counted = self.computations[computation], []
        arrays = [defined[name].arrays[0] for name in instruction.operands if name in defined and defined[name].arrays]
        if flop := _flop(instruction, arrays):
            counted.append((flop, _precision(instruction, arrays[0].dtype)))
        if instruction.opcode in ("fusion", "call", "map"):
            for called in instruction.calls:
                for inner in self.computations[called].values():
                    counted += self._products(inner, called)
        return counted


def _instruction(name: str, rest: str) -> Instruction:
    """Parses what follows "NAME = "."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    opcode = rest[:opening]
    listed = "" if opcode in ("constant", "parameter") else rest[opening:closing]
    arrays = tuple(
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size), _ON_CHIP in layout)
        for dtype, sizes, layout in _ARRAY.findall(shape)
    )
    return Instruction(name, opcode, arrays, tuple(re.findall(r"%([\w.$-]+)", listed)), rest[closing:])


def _closing(text: str, opening: int) -> int:
    """Returns the position after the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"no closing parenthesis in {text[:200]!r}")


def _branches(conditional: Instruction) -> list[str]:
    """Returns the computations by index; that of a false condition first."""
    if listed := re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes):
        return [name.strip(" %") for name in listed[1].split(",")]
    return [conditional.text("false_computation"), conditional.text("true_computation")]


def _fields(row: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}


def _flop(instruction: Instruction, arrays: list[Array]) -> float:
    """Returns the FLOP of a product or convolution, 0 for other instructions."""
    target = instruction.target
    if instruction.opcode == "dot" or target.startswith("__cublas$"):
        contracted = instruction.integers("lhs_contracting_dims") or instruction.integers("lhs_contracting_dimensions")
        return 2.0 * math.prod(instruction.arrays[0].sizes) * math.prod(arrays[0].sizes[axis] for axis in contracted)
    if target.startswith("__cudnn$fmha"):
        # Attention of query and key [B, T, heads, d] is 2 products forward and 5 backward.
        return (10.0 if "Backward" in target else 4.0) * math.prod(arrays[0].sizes) * arrays[1].sizes[1]
    if instruction.opcode != "convolution" and not target.startswith("__cudnn$conv"):
        return 0.0
    # The output of the forward convolution, and its kernel.
    output, kernel = instruction.arrays[0], arrays[1]
    if target == "__cudnn$convBackwardInput":
        output = arrays[0]
    elif target == "__cudnn$convBackwardFilter":
        output, kernel = arrays[1], instruction.arrays[0]
    features = kernel.sizes[re.search(r"_(\w+)->", instruction.attributes)[1].index("o")]
    return 2.0 * math.prod(output.sizes) * math.prod(kernel.sizes) / features


def _precision(instruction: Instruction, dtype: str) -> str:
    highest = re.search(r'operand_precision"?[=:][\[{]"?highest', instruction.attributes, re.IGNORECASE)
    names = {"bf16": "bfloat16", "f16": "bfloat16", "f64": "float64"}
    return names.get(dtype, "float32" if highest else "tf32")
