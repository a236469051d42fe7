"""Collectives of a compiled program: kinds, sizes and execution counts.

Parses XLA's text of an optimised program, from `jax.stages.Compiled.as_text()` on CPU, GPU or TPU.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# XLA prints a % before names or not, by version and by how the program was made.
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:called_computations|branch_computations)=\{([^}]*)\}"
)
_OPERAND = re.compile(r"%([\w.\-]+)")
_BITS = {"pred": 8, "token": 0}
_WITH_INPUTS = ("all-gather-start", "all-to-all-start", "collective-permute-start", "reduce-scatter-start")


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: one of `KINDS`.
      bytes: size of the full array or arrays: the output of an all-gather, the input of a reduce-scatter.
      group: devices per group.
      times: executions per step, loop iterations included.
      shape: shape of the full array or arrays, as XLA writes it, `"bf16[4096,11008]"`.
      where: the model's operation that it belongs to, from XLA's metadata; may be empty.
      hosts: hosts that the devices of a group are on.
    """

    kind: str
    bytes: int
    group: int
    times: int
    shape: str
    where: str
    hosts: int = 1

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device receives per execution.

        Ring algorithms: (n - 1) / n of the full size, twice that for an all-reduce.
        """
        if self.kind == "collective-permute":
            return float(self.bytes)
        return self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


class Instruction(NamedTuple):
    """One line of a computation: its name, its result's type, its opcode, and the rest of the line."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return _OPERAND.findall(_take_parentheses(self.rest))


Program = Mapping[str, list[Instruction]]
"""Maps a computation's name to its instructions, root last; the entry computation comes last."""


def collectives(text: str, hosts: Sequence[int] = ()) -> list[Collective]:
    """All collectives of a program; pieces of one collective (same channel) count once.

    Args:
      text: the program.
      hosts: host of each device, in the order of the program's devices; by default all are on one.

    Raises:
      ValueError: the trip count of a loop is unknown.
    """
    program = parse_hlo(text)
    counts = execution_counts(program)
    by_key: dict[str, Collective] = {}
    devices = _number(r"num_partitions=(\d+)", text) or 1
    for computation, instructions in program.items():
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or not counts[computation]:
                continue
            channel = _number(r"channel_id=(\d+)", instruction.rest)
            # The TPU compiler spreads a collective over several fusions; its pieces share the channel.
            key = instruction.name if channel is None else f"channel {channel}"
            collective = _parse_collective(kind, instruction, counts[computation], devices, hosts)
            # A piece in a loop runs more often than the collective that it is a part of.
            if key not in by_key or collective.times < by_key[key].times:
                by_key[key] = collective
    return list(by_key.values())


def parse_hlo(text: str) -> Program:
    """Parses the instructions of every computation."""
    program: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            current = program[head[1]] = []
        elif (match := _INSTRUCTION.match(line)) is not None:
            text = match[2]
            shape = _take_parentheses(text) if text.startswith("(") else text.partition(" ")[0]
            opcode, _, rest = text.removeprefix(shape).lstrip().partition("(")
            current.append(Instruction(match[1], shape, opcode, "(" + rest))
    return program


def execution_counts(program: Program) -> dict[str, int]:
    """How often each computation runs when the program runs once.

    Raises:
      ValueError: the trip count of a loop is unknown.
    """
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for computation, instructions in program.items():
        for instruction in instructions:
            trips = 1
            if instruction.opcode == "while":
                trips = trip_count(program, computation, instruction)
            for callee in _called_computations(instruction):
                callers[callee].append((computation, trips))
    # XLA prints a computation after those that it calls, so the entry comes last.
    counts: dict[str, int] = {list(program)[-1]: 1}

    def count(name: str) -> int:
        if name not in counts:
            counts[name] = sum(count(caller) * trips for caller, trips in callers[name])
        return counts[name]

    return {name: count(name) for name in program}


def count_looped_matmuls(text: str) -> int:
    """Number of loops with matmuls and several iterations; XLA's cost analysis counts one iteration of each.

    Raises:
      ValueError: the trip count of a loop is unknown.
    """
    program = parse_hlo(text)

    def has_matmul(name: str) -> bool:
        return any(
            i.opcode in ("dot", "convolution") or any(map(has_matmul, _called_computations(i)))
            for i in program[name]
        )

    return sum(
        trip_count(program, computation, i) > 1
        for computation, instructions in program.items()
        for i in instructions
        if i.opcode == "while" and has_matmul(_attribute(i.rest, "body"))
    )


def trip_count(program: Program, computation: str, loop: Instruction) -> int:
    """Iterations of a while loop, from XLA's annotation or from a counter that rises in equal steps to a constant.

    Raises:
      ValueError: the loop has neither.
    """
    known = _number(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
    if known is not None:
        return known
    # TPU programs come without the annotation; after unrolling, their counters rise by more than one.
    body, condition = (_attribute(loop.rest, name) for name in ("body", "condition"))
    test = program[condition][-1]
    inside = {i.name: i for i in program[condition]}
    try:
        counter, limit = (inside[name] for name in test.operands)
        index = _number(r"index=(\d+)", counter.rest)
        outside = {i.name: i for i in program[computation]}
        start = _constant_value(outside, outside[loop.operands[0]].operands[index or 0])
        steps = {i.name: i for i in program[body]}
        step = _counter_step(steps, program[body][-1].operands[index or 0])
        last = _constant_value(inside, limit.name) + ("direction=LE" in test.rest)
        if index is None or "direction=L" not in test.rest or step < 1:
            raise KeyError
        return max(0, -(-(last - start) // step))
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"unsupported program: the trip count of loop {loop.name} is unknown") from None


def _parse_collective(
    kind: str, instruction: Instruction, count: int, devices: int, hosts: Sequence[int]
) -> Collective:
    arrays = [match[0] for match in _ARRAY.finditer(instruction.shape)]
    if instruction.opcode in _WITH_INPUTS and len(arrays) > 1:
        # The result of these starts is (inputs, outputs, contexts): the contexts are scalars of type u32.
        arrays = [array for array in arrays if array != "u32[]"]
        arrays = arrays[len(arrays) // 2 :]
    groups, shape = _groups(instruction.rest, devices), ", ".join(arrays)
    group = groups.shape[1]
    size = shape_bytes(shape) * (group if kind == "reduce-scatter" else 1)
    where = re.search(r'op_name="([^"]*)"', instruction.rest)
    # A permute names pairs of devices.
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", instruction.rest)
    together = groups if pairs is None else _lists(pairs[1])
    spanned = max(len({hosts[device] for device in one}) for one in together) if hosts else 1
    return Collective(kind, size, group, count, shape, where[1] if where else "", spanned)


def shape_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays in a tuple.

    >>> shape_bytes("(bf16[2,3]{1,0:T(8,128)}, /*index=1*/f32[])")
    16
    """
    return sum(math.prod(dims) * _bits(dtype) // 8 for dtype, dims in array_shapes(shape))


def array_shapes(shape: str) -> list[tuple[str, list[int]]]:
    """Element type and dimensions of an array, or of each array in a tuple.

    >>> array_shapes("(bf16[2,3]{1,0:T(8,128)}, /*index=1*/f32[])")
    [('bf16', [2, 3]), ('f32', [])]
    """
    return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in _ARRAY.findall(shape)]


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    number = re.search(r"\d+", dtype)
    if number is None:
        raise ValueError(f"unsupported program: the size of array type {dtype!r} is unknown")
    return int(number[0])


def _groups(rest: str, devices: int) -> np.ndarray:
    """Devices by group, (groups, size), from any of XLA's notations: lists, an iota, mesh axes.

    Raises:
      ValueError: the notation is unknown.
    """
    if (axes := re.search(rf"replica_groups=mesh\[([^\]]*)\]{_IDS} ?\{{([^}}]*)\}}", rest)) is not None:
        ids = _iota(axes[2], axes[3]) if axes[2] else None
        return _mesh_groups(axes[1], axes[5], _numbers(axes[4]) if axes[4] else ids)
    if (iota := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", rest)) is not None:
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
    if (listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest)) is not None:
        return _lists(listed[1])
    # Permutes name pairs, not groups; no group, or an empty one, means all devices.
    if (unknown := re.search(r"replica_groups=(?!\{\})[^ ]*", rest)) is not None:
        raise ValueError(f"unsupported program: unknown notation for a group of devices: {unknown[0]:.100}")
    return np.arange(devices)[None]


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_IDS = rf"(?:, device_ids=\((?:{_IOTA}|([\d,]+))\))?"


def _numbers(text: str) -> np.ndarray:
    return np.array([int(n) for n in text.split(",")])


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """The numbers from 0 in an array of these sizes, transposed to an order of axes."""
    shape = _numbers(sizes)
    return np.arange(shape.prod()).reshape(shape).transpose(_numbers(order) if order else None)


def _lists(text: str) -> np.ndarray:
    """`{0,1},{2,3}` as an array."""
    return np.array([_numbers(one) for one in re.findall(r"\{([\d,]+)\}", text)])


def _mesh_groups(mesh: str, axes: str, ids: np.ndarray | None) -> np.ndarray:
    """Groups along axes `'a','b':(2)4` of a mesh `'a'=2,'b'=16`; `:(2)4` are the 4 parts within each of 2 parts."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    chosen = defaultdict(list)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        chosen[name].append((int(before), int(part)) if part else (1, sizes[name]))
    shape, along = [], []
    for name, size in sizes.items():
        split = 1
        for before, part in sorted(chosen[name]):
            along.append(len(shape) + 1)
            shape += [before // split, part]
            split = before * part
        shape.append(size // split)
    grid = (np.arange(math.prod(shape)) if ids is None else ids).reshape(shape)
    size = math.prod(shape[axis] for axis in along)
    return np.moveaxis(grid, along, range(-len(along), 0)).reshape(-1, size)


def _called_computations(instruction: Instruction) -> Iterator[str]:
    for single, several in _CALLED.findall(instruction.rest):
        yield from [single] if single else _OPERAND.findall(several)


def _attribute(rest: str, attribute: str) -> str:
    match = re.search(rf"\b{attribute}=%?([\w.\-]+)", rest)
    return match[1] if match else ""


def _constant_value(known: Mapping[str, Instruction], name: str) -> int:
    # XLA inserts copies of constants, for their place in memory.
    instruction = known[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = known[instruction.operands[0]]
    if instruction.opcode != "constant":
        raise KeyError(name)
    return int(instruction.rest[1:].partition(")")[0])


def _counter_step(known: Mapping[str, Instruction], name: str) -> int:
    """The increment of a loop's counter per iteration."""
    instruction, total = known[name], 0
    while instruction.opcode in ("copy", "bitcast", "add"):
        if instruction.opcode == "add":
            left, right = instruction.operands
            if known[left].opcode == "constant":
                left, right = right, left
            total += _constant_value(known, right)
            instruction = known[left]
        else:
            instruction = known[instruction.operands[0]]
    if instruction.opcode != "get-tuple-element":
        raise KeyError(name)
    return total


def _number(pattern: str, text: str) -> int | None:
    match = re.search(pattern, text)
    return int(match[1]) if match else None


def _take_parentheses(text: str) -> str:
    """The text from an opening parenthesis to its closing one."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: index + 1]
    return text
