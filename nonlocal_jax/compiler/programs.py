"""Reads what a compiled program costs from XLA's own text, without running it.

XLA:TPU writes an estimate of the cycles of each fusion, convolution and copy into its optimised
program. Their sum, with the bodies of loops multiplied by their trip counts, is a lower bound of
the program's time: sorts, gathers, reductions of windows, loop control, collectives and Pallas
kernels have no estimate. It is deterministic, so it can be compared between two programs for the
same chip. XLA's programs for other platforms have no estimates, only memory and collectives.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nonlocal_jax.compiler import hlo
from nonlocal_jax.compiler.hlo import Instruction

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_PRODUCTS = {"convolution", "dot"}
_REDUCTIONS = {"reduce", "reduce-window", "select-and-scatter"}
# Have no estimate.
_UNESTIMATED = {"gather", "reduce-window", "scatter", "select-and-scatter", "sort"}
_LAYOUT = {"copy", "transpose", "bitcast", "parameter", "tuple", "get-tuple-element", "reshape"}
_CONTROL = {"while", "call", "conditional"}
# Neither read nor write memory.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INDEX = re.compile(r"index=(\d+)")
_LHS_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a program.

    Attributes:
        opcode: Kind of the collective, such as "all-reduce".
        count: Number of executions.
        bytes: Size of the results on one device, of all executions together.
    """

    opcode: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled program costs on one device.

    Attributes:
        cycles: Estimated cycles; 0 where the compiler estimates none.
        cycles_by_kind: The same by kind of instruction: "products" (with all that is fused into
            them), "reductions", "copies" (nothing but a change of layout), "elementwise".
        unestimated: Number of executed sorts, gathers, scatters, reductions of windows and Pallas
            kernels, which have no estimate.
        flops: FLOPs of the products, a multiply-add as 2.
        traffic: Bytes read from and written to the device's main memory.
        temporary: Peak bytes besides arguments and results.
        arguments: Bytes of arguments and results.
        collectives: The collectives, sorted by opcode.
    """

    cycles: int
    cycles_by_kind: dict[str, int]
    unestimated: int
    flops: int
    traffic: int
    temporary: int
    arguments: int
    collectives: tuple[Collective, ...]


class Program:
    """The optimised program of a `jax.stages.Compiled`, parsed from its text.

    Attributes:
        computations: The instructions of each computation, by its name.
        entry: Name of the computation that runs first.

    >>> import jax, jax.numpy as jnp
    >>> text = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile().as_text()
    >>> Program(text).flops() == 2 * 8**3
    True
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if current is None:
                if match := _COMPUTATION.match(line):
                    current = self.computations[match[2]] = {}
                    if match[1]:
                        self.entry = match[2]
            elif line.startswith("}"):
                current = None
            elif instruction := hlo.parse(line):
                current[instruction.name] = instruction

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Yields every instruction that runs, and how often.

        Bodies of loops and branches are followed. What is fused is part of its fusion.
        """
        for instruction, times, _ in self._executed(self.entry, 1):
            yield instruction, times

    def _executed(self, computation: str, times: int) -> Iterator[tuple[Instruction, int, str]]:
        for instruction in self.computations.get(computation, {}).values():
            yield instruction, times, computation
            if instruction.opcode in _CONTROL:
                for name in instruction.called:
                    trips = self._trips(instruction, computation)
                    yield from self._executed(name, times * trips)

    def _trips(self, loop: Instruction, computation: str) -> int:
        """Returns the iterations of a loop that counts up to a constant, as JAX's do, or 1."""
        if known := _TRIPS.search(loop.attributes):  # on GPUs, whose conditions are fused
            return int(known[1])
        match = _CONDITION.search(loop.attributes)
        if match is None:
            return 1
        condition = self.computations[match[1]]
        root = next(instruction for instruction in condition.values() if instruction.is_root)
        limits = [_constant(condition.get(name)) for name in root.operands]
        counters = [condition.get(name) for name in root.operands]
        limit = next((limit for limit in limits if limit is not None), None)
        counter = next((c for c in counters if c and c.opcode == "get-tuple-element"), None)
        if limit is None or counter is None:
            return 1
        match = _INDEX.search(counter.attributes)
        assert match is not None
        return limit - self._initial_value(loop, int(match[1]), computation)

    def _initial_value(self, loop: Instruction, index: int, computation: str) -> int:
        instructions = self.computations[computation]
        state = instructions[loop.operands[0]]
        if state.opcode != "tuple":
            return 0
        initial = instructions[state.operands[index]]
        while initial.opcode == "copy":
            initial = instructions[initial.operands[0]]
        return _constant(initial) or 0

    def cycles_by_kind(self) -> dict[str, int]:
        """Sums the estimated cycles of instructions, by their `kind`."""
        total: collections.Counter[str] = collections.Counter()
        for instruction, times in self.executed():
            total[self.kind(instruction)] += times * instruction.cycles
        return {kind: cycles for kind, cycles in total.items() if cycles}

    def unestimated(self) -> int:
        """Counts the executions of instructions such as sorts that have no estimate."""
        return sum(
            times
            for instruction, times in self.executed()
            if not instruction.cycles
            and (instruction.opcode in _UNESTIMATED or "tpu_custom_call" in instruction.attributes)
        )

    def kind(self, instruction: Instruction) -> str:
        """Returns the kind of an instruction: "products", "reductions", "copies" or "elementwise".

        A fusion with a product in it is a product.
        """
        opcodes = self._opcodes(instruction)
        if opcodes & _PRODUCTS:
            return "products"
        if opcodes & _REDUCTIONS:
            return "reductions"
        return "copies" if opcodes <= _LAYOUT else "elementwise"

    def _opcodes(self, instruction: Instruction) -> set[str]:
        if instruction.opcode != "fusion":
            return {instruction.opcode}
        fused = self.computations.get(instruction.called[0], {}).values()
        return set().union(*(self._opcodes(inner) for inner in fused))

    def flops(self) -> int:
        """Counts the FLOPs of the products that run, a multiply-add as 2.

        Unlike XLA's own analysis it multiplies the bodies of loops by their trip counts.
        """
        return sum(
            times * self._flops(instruction, computation)
            for instruction, times, computation in self._executed(self.entry, 1)
        )

    def _flops(self, instruction: Instruction, computation: str) -> int:
        if instruction.opcode == "fusion":
            fused = instruction.called[0]
            return sum(self._flops(i, fused) for i in self.computations[fused].values())
        if instruction.opcode not in _PRODUCTS:
            return 0
        left, right, *_ = self._operand_types(instruction, computation)
        if instruction.opcode == "convolution":
            return 2 * hlo.multiplications(instruction, left, right)
        contracted = _LHS_CONTRACTED.search(instruction.attributes)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        sizes = hlo.sizes(left)
        return (
            2 * math.prod(hlo.sizes(instruction.result)) * math.prod(sizes[axis] for axis in axes)
        )

    def collectives(self) -> tuple[Collective, ...]:
        """Sums the collectives that run, by opcode."""
        counts: collections.Counter[str] = collections.Counter()
        sizes: collections.Counter[str] = collections.Counter()
        for instruction, times, computation in self._executed(self.entry, 1):
            if found := self._find_collective(instruction, computation):
                collective, computation = found
                opcode = collective.opcode.removesuffix("-start")
                operands = self._operand_types(collective, computation)
                operand_bytes = sum(map(hlo.bytes_of_type, operands))
                counts[opcode] += times
                sizes[opcode] += times * _bytes_of_results(collective, operand_bytes)
        return tuple(Collective(opcode, counts[opcode], sizes[opcode]) for opcode in sorted(counts))

    def _find_collective(
        self, instruction: Instruction, computation: str
    ) -> tuple[Instruction, str] | None:
        """Returns the collective that an instruction starts, and its computation.

        XLA:TPU overlaps some collectives with products: it splits them among several fusions, of
        which the first one has a custom call that marks the start.
        """
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            return instruction, computation
        if instruction.opcode == "fusion":
            computation = instruction.called[0]
            fused = self.computations.get(computation, {})
            for inner in fused.values():
                if "AsyncCollectiveStart" not in inner.attributes:
                    continue
                collective = fused[inner.operands[0]]
                if collective.opcode.removesuffix("-start") in COLLECTIVES:
                    return collective, computation
        return None

    def _operand_types(self, instruction: Instruction, computation: str) -> list[str]:
        instructions = self.computations[computation]
        return [instructions[name].result for name in instruction.operands if name in instructions]

    def traffic(self) -> int:
        """Sums the bytes that instructions read from and write to the main memory.

        Arrays that XLA:TPU keeps in the chip's vector memory are not counted. Of an array from
        which a fusion reads a slice, or in which it updates one, the slice is counted.
        """
        return sum(
            times * self._traffic(instruction, computation)
            for instruction, times, computation in self._executed(self.entry, 1)
        )

    def _traffic(self, instruction: Instruction, computation: str) -> int:
        if instruction.opcode in _FREE or instruction.opcode in _CONTROL:
            return 0
        if instruction.opcode.endswith("-done"):
            return 0
        sizes = [hlo.bytes_in_memory(instruction.result)]
        results = self._operand_types(instruction, computation)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * hlo.bytes_in_memory(results[1])
        if instruction.opcode in ("dynamic-slice", "slice"):
            return 2 * sizes[0]
        if instruction.opcode.endswith("-start"):  # its result names the operand as well
            return 2 * sum(map(hlo.bytes_in_memory, results))
        if instruction.opcode == "fusion":
            return self._traffic_of_fusion(instruction, results)
        return sum(sizes) + sum(map(hlo.bytes_in_memory, results))

    def _traffic_of_fusion(self, fusion: Instruction, operands: Sequence[str]) -> int:
        fused = self.computations[fusion.called[0]]
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in fused.values():
            for name in instruction.operands:
                users[name].append(instruction)
        total = 0
        for instruction in fused.values():
            if instruction.opcode != "parameter":
                continue
            in_memory = hlo.bytes_in_memory(operands[int(instruction.operands[0])])
            total += min(in_memory, _bytes_read(instruction, users))
        root = next(inner for inner in fused.values() if inner.is_root)
        results = [root], [fusion.result]
        if root.opcode == "tuple":
            results = [fused[name] for name in root.operands], hlo.split_types(fusion.result)
        for result, result_type in zip(*results, strict=True):
            total += min(hlo.bytes_in_memory(result_type), _bytes_written(result, fused))
        return total


def cost(compiled: Any) -> Cost:
    """Returns what a `jax.stages.Compiled` costs on one device."""
    program, memory = Program(compiled.as_text()), compiled.memory_analysis()
    cycles = program.cycles_by_kind()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Cost(
        cycles=sum(cycles.values()),
        cycles_by_kind=cycles,
        unestimated=program.unestimated(),
        flops=program.flops(),
        traffic=program.traffic(),
        temporary=memory.temp_size_in_bytes,
        arguments=arguments - memory.alias_size_in_bytes,
        collectives=program.collectives(),
    )


def _constant(instruction: Instruction | None) -> int | None:
    """Returns the value of an integer constant, and None of anything else."""
    if instruction is None or instruction.opcode != "constant":
        return None
    value = instruction.operands[0]
    return int(value) if value.lstrip("-").isdigit() else None


def _bytes_read(parameter: Instruction, users: Mapping[str, list[Instruction]]) -> int:
    """Returns the bytes of a fusion's parameter that the fusion reads."""
    total = 0
    for user in users[parameter.name]:
        if user.opcode in ("dynamic-slice", "slice"):
            total += hlo.bytes_of_type(user.result)
        elif user.opcode == "bitcast":
            total += _bytes_read(user, users)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
            return hlo.bytes_of_type(parameter.result)
    return total


def _bytes_written(result: Instruction, fused: Mapping[str, Instruction]) -> int:
    """Returns the bytes of a fusion's result that the fusion writes."""
    if result.opcode == "dynamic-update-slice":
        return hlo.bytes_of_type(fused[result.operands[1]].result)
    if result.opcode == "bitcast" and result.operands[0] in fused:
        return _bytes_written(fused[result.operands[0]], fused)
    return hlo.bytes_of_type(result.result)


def _bytes_of_results(instruction: Instruction, operands: int) -> int:
    """Returns the bytes of a collective's results, given those of its operands."""
    total = hlo.bytes_of_type(instruction.result)
    # The result of an asynchronous start may name the operands too.
    return total - operands if instruction.opcode.endswith("-start") and total > operands else total
