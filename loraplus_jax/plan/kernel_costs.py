"""FLOPs, bytes and workspace of attention kernels, of which XLA counts no FLOPs, and each operand once."""

import math
import re
from typing import NamedTuple

from .hlo import Instruction, array_shapes, execution_counts, parse_hlo, shape_bytes


class KernelWork(NamedTuple):
    """Work of a program's kernels beyond XLA's cost analysis.

    Attributes:
      flops: FLOPs of their matmuls.
      bytes: bytes that they read more than once.
      unknown: kernels that are not counted.
      workspace: bytes that the largest of them needs beyond XLA's temporaries, estimated.
    """

    flops: float
    bytes: float
    unknown: int
    workspace: int


def kernel_work(text: str) -> KernelWork:
    """The work of the kernels in a compiled program's text, loop iterations included.

    Counts splash attention as `models.attention_kernels` sets it up (causal or in a sliding window, square blocks),
    and cuDNN's attention.
    """
    program = parse_hlo(text)
    counts = execution_counts(program)
    flops, size, unknown, workspace = 0.0, 0.0, 0, 0
    for computation, instructions in program.items():
        for instruction in instructions:
            if instruction.opcode != "custom-call":
                continue
            if instruction.name.startswith("splash_"):
                one = _splash_work(instruction)
                flops += counts[computation] * one[0]
                size += counts[computation] * one[1]
            elif 'custom_call_target="__cudnn$fmha' in instruction.rest:
                one = _cudnn_work(instruction)
                flops += counts[computation] * one[0]
                workspace = max(workspace, one[1])
            elif 'custom_call_target="tpu_custom_call"' in instruction.rest:
                unknown += 1
    return KernelWork(flops, size, unknown, workspace)


def _cudnn_work(call: Instruction) -> tuple[float, int]:
    """FLOPs, and bytes of workspace, of one call."""
    layouts = call.rest.partition("operand_layout_constraints={")[2].partition("}, api_version")[0]
    (_, query), (_, key), *_ = array_shapes(layouts)
    rows, length, heads, size = query
    keys, window = key[1], re.search(r'"sliding_window_length": (\d+)', call.rest)
    pairs = length * keys
    if re.search(r'"mask_type": "\w*CAUSAL', call.rest):
        reach = int(window[1]) if window else 0
        pairs = sum(min(n + 1, reach or keys) for n in range(length))
    # Scores and values; backward also the gradients of the probabilities, queries and keys.
    is_backward = "Backward" in call.rest
    flops = 2.0 * (5 if is_backward else 2) * rows * heads * size * pairs
    # The backward pass sums the gradient of the queries in float32, and keeps one number per query. XLA asks cuDNN
    # for the size only on a machine with a GPU.
    return flops, 4 * rows * heads * length * (size + 1) if is_backward else 0


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
