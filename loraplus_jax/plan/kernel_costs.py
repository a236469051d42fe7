"""FLOPs and bytes of attention kernels, of which XLA's cost analysis counts no FLOPs and each operand once."""

import math
import re
from typing import NamedTuple

from .hlo import Instruction, array_shapes, execution_counts, parse_hlo, shape_bytes


class KernelWork(NamedTuple):
    """Work of a program's kernels beyond XLA's cost analysis.

    Attributes:
      flops: FLOPs of their matmuls.
      bytes: bytes that they read more than once.
      unknown: kernels that are not counted, such as cuDNN's.
    """

    flops: float
    bytes: float
    unknown: int


def kernel_work(text: str) -> KernelWork:
    """The work of the kernels in a compiled program's text, loop iterations included.

    Counts splash attention as `models.attention_kernels` sets it up: causal or in a sliding window, square blocks.
    """
    program = parse_hlo(text)
    counts = execution_counts(program)
    flops, size, unknown = 0.0, 0.0, 0
    for computation, instructions in program.items():
        for instruction in instructions:
            if instruction.opcode != "custom-call":
                continue
            if instruction.name.startswith("splash_"):
                one = _splash_work(instruction)
                flops += counts[computation] * one[0]
                size += counts[computation] * one[1]
            elif re.search(r'custom_call_target="(tpu_custom_call|__cudnn\$fmha)', instruction.rest):
                unknown += 1
    return KernelWork(flops, size, unknown)


def _splash_work(call: Instruction) -> tuple[float, float]:
    """FLOPs, and bytes read beyond once per operand, of one call."""
    # A kernel's metadata, which follow the layouts, hold braces of their own.
    layouts = call.rest.partition("operand_layout_constraints={")[2].partition("}, frontend_attributes")[0]
    operands, outputs = array_shapes(layouts), array_shapes(call.shape)
    states = [(dtype, dims) for dtype, dims in operands if dtype[0] != "s"]
    (dtype, query), (_, key) = states[:2]
    *batch, length, size = query
    block = outputs[0][1][-2]  # the first output is a block's scratch
    backward = "_dkv_" in call.name
    # The kernel visits the blocks that the mask leaves: in each row at most as many as its schedule has columns, or
    # for the gradients of keys and values, in each column at most as many as it has rows.
    blocks = length // block
    schedule = next(dims for dtype, dims in operands if dtype[0] == "s" and len(dims) == 3)
    visited = sum(min(n + 1, schedule[1 if backward else 2]) for n in range(blocks))
    if "_fwd_" in call.name:
        matmuls = 2  # scores, values
    elif not backward:
        matmuls = 3  # scores, gradient of the probabilities, of the queries
    else:
        matmuls = (
            4 if len(outputs) == 4 else 5
        )  # two as before, keys, values; in the fused kernel also queries
    heads = math.prod(batch)
    # Each visit reads a block of keys and of values; for their gradients, of queries and of upstream gradients.
    itemsize = shape_bytes(f"{dtype}[1]")
    once = math.prod(query if backward else key)
    read_again = 2 * itemsize * (heads * visited * block * size - once)
    return 2.0 * matmuls * heads * visited * block**2 * size, float(read_again)
