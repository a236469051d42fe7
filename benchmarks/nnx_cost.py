"""What an adapter on an NNX model costs: FLOPs beside `nnx.LoRALinear`, and the time to trace a step.

    python benchmarks/nnx_cost.py

A transformer of eight layers. FLOPs are XLA's, of loss and gradient of the factors. Traces are interleaved, each
from empty caches; the ratio is the median over rounds of an adapted model's time over the plain one's in the same
round.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from common import interleaved, median_ratio, report
from flax import nnx

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.nnx import apply_lora_plus

WIDTH, HEADS, DEPTH, RANK = 64, 4, 8, 4


class Block(nnx.Module):
    """Attention and two layers; `linear` makes the layers that stand for the adapted ones."""

    def __init__(self, linear: Any, rngs: nnx.Rngs) -> None:
        self.norm_a, self.norm_b = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = linear(WIDTH, 4 * WIDTH, rngs=rngs), linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_a(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm_b(x))))


class Model(nnx.Module):
    """A stack of blocks."""

    def __init__(self, linear: Any = nnx.Linear) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(linear, rngs) for _ in range(DEPTH)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


def adapted(target_modules: Any) -> Model:
    model = Model()
    apply_lora_plus(model, LoRAPlusConfig(target_modules=target_modules, rank=RANK), rngs=nnx.Rngs(1))
    return model


def step_of(model: Model, wrt: Any) -> tuple[Any, tuple[Any, ...]]:
    """Loss and gradient of the variables of a type, as a function of arrays, and its arguments."""
    graph, trained, rest = nnx.split(model, wrt, ...)

    def loss(trained: Any, rest: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, trained, rest, copy=True)(x) ** 2)

    return jax.value_and_grad(loss), (trained, rest, jnp.ones((8, 16, WIDTH)))


def flops(model: Model) -> float:
    function, arguments = step_of(model, nnx.LoRAParam)
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    lora_linear = Model(lambda n, m, rngs: nnx.LoRALinear(n, m, lora_rank=RANK, rngs=rngs))
    ours, theirs = flops(adapted(["up", "down"])), flops(lora_linear)
    models = {
        "plain": (Model(), nnx.Param),
        "query, value": (adapted(["query", "value"]), nnx.Param),
        "all-linear": (adapted("all-linear"), nnx.Param),
    }

    def trace(model: Model, wrt: Any) -> None:
        function, arguments = step_of(model, wrt)
        jax.clear_caches()
        jax.make_jaxpr(function)(*arguments)

    runs = {name: lambda m=model, w=wrt: trace(m, w) for name, (model, wrt) in models.items()}
    seconds = interleaved(runs, rounds)
    ratios = {
        name: round(median_ratio(seconds[name], seconds["plain"]), 2) for name in runs if name != "plain"
    }
    rows = [
        {
            "measured": "FLOPs of a step over nnx.LoRALinear's, up and down adapted",
            "ratio": f"{ours / theirs:.4f}",
        },
        *(
            {"measured": f"time to trace a step over the plain model's, {n}", "ratio": r}
            for n, r in ratios.items()
        ),
    ]
    report("nnx_cost", rows)


if __name__ == "__main__":
    main()
