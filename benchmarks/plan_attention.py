"""What attention and its gradient need on a TPU chip, by implementation and by the TPU compiler alone.

python benchmarks/plan_attention.py    # one sequence, 32 heads of 128, bfloat16, on a v5e
"""

from typing import Any

import jax
import jax.numpy as jnp
from common import report

from loraplus_jax.models.attention import causal_attention
from loraplus_jax.plan.devices import target_devices
from loraplus_jax.plan.kernel_costs import kernel_work

HEADS, HEAD = 32, 128
LENGTHS = (128, 256, 512, 1024, 2048, 4096)


def compiled(length: int, implementation: Any, device: Any) -> jax.stages.Compiled:
    """The gradient of the sum of an attention's outputs, by queries, keys and values."""

    def total(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        found = causal_attention(query, key, value, segments, implementation=implementation)
        return jnp.sum(found.astype(jnp.float32))

    place = jax.sharding.SingleDeviceSharding(device)
    states = jax.ShapeDtypeStruct((1, length, HEADS, HEAD), jnp.bfloat16, sharding=place)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place)
    return jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(states, states, states, segments).compile()


def main() -> None:
    chip, (device,) = target_devices("v5e:1x1")
    rows = []
    for length in LENGTHS:
        for implementation in ("xla", "blocked", "splash"):
            program: Any = compiled(length, implementation, device)
            cost, memory = program.cost_analysis(), program.memory_analysis()
            kernels = kernel_work(program.as_text())
            flops, size = cost["flops"] + kernels.flops, cost["bytes accessed"] + kernels.bytes
            rows.append(
                {
                    "tokens": length,
                    "attention": implementation,
                    "GFLOP": round(flops / 1e9, 1),
                    "bytes accessed, MB": round(size / 1e6, 1),
                    "temporaries, MB": round(memory.temp_size_in_bytes / 1e6, 1),
                    "ms, compute": round(1e3 * flops / chip.flops, 3),
                    "ms, memory": round(1e3 * size / chip.memory_rate, 3),
                }
            )
    report("plan_attention", rows)


if __name__ == "__main__":
    main()
