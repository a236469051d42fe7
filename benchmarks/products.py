"""What does an adapter cost by the product its weight is in: on Linen, on NNX and on plain functions?

    python benchmarks/products.py

FLOPs and temporary memory of the compiled gradient for inputs and factors, over those of the base's for inputs.
1 + 3 r (in + out) / (2 in out) is a product's own and two thin ones, here 1.09; the gradient of W takes half a base
more. Compiled for the CPU, where `ragged_dot` multiplies all rows with every expert; nothing runs.

The second table: blocks of a transformer whose layers Linen's interceptor adapts, against the same weights adapted
in the whole model by the interpreter. Trace times are medians of a ratio, as the two take turns.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from common import interleaved, median_ratio, parse_options, report, table, use_cpu
from flax import nnx

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, functions, init_lora
from loraplus_jax import nnx as loraplus_nnx

EXPERTS, ROWS, SIZE, RANK = 4, 512, 256, 8
SHAPES = {
    "experts": (EXPERTS, SIZE, SIZE),
    "window": (3, SIZE, SIZE),
    "up": (SIZE, SIZE),
    "gate": (SIZE, SIZE),
}
PARAMS = {name: jax.ShapeDtypeStruct(shape, "f") for name, shape in SHAPES.items()}
GROUPS, CHOSEN = jnp.full(EXPERTS, ROWS // EXPERTS), jnp.arange(ROWS) % EXPERTS
E, U = {"experts": "eio"}, {"up": "io"}
PRODUCTS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "dot_general": (lambda p, x: x @ p["up"], U),
    "batched over experts": (
        lambda p, x: jnp.einsum("eti,eio->eto", x.reshape(EXPERTS, -1, SIZE), p["experts"]),
        E,
    ),
    "ragged_dot": (lambda p, x: jax.lax.ragged_dot(x, p["experts"], GROUPS), E),
    "w[e] in a Python loop": (lambda p, x: sum(x @ p["experts"][e] for e in range(EXPERTS)), E),
    "w[e] in a scan": (
        lambda p, x: jax.lax.scan(lambda y, e: (y + x @ p["experts"][e], None), x, jnp.arange(EXPERTS))[0],
        E,
    ),
    "gather of each row's expert": (lambda p, x: jnp.einsum("ti,tio->to", x, p["experts"][CHOSEN]), E),
    "heads, by a reshape": (lambda p, x: jnp.einsum("ti,ihd->thd", x, p["up"].reshape(SIZE, 4, -1)), U),
    "gate and up, joined": (lambda p, x: x @ jnp.concatenate([p["gate"], p["up"]], -1), {"up|gate": "io"}),
    "convolution": (
        lambda p, x: jax.lax.conv_general_dilated(
            x[None], p["window"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        {"window": "iio"},
    ),
    "masked": (lambda p, x: x @ jnp.tril(p["up"]), U),
}


class Linen(nn.Module):
    """A product with raw parameters."""

    f: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        return self.f({n: self.param(n, nn.initializers.normal(), shape) for n, shape in SHAPES.items()}, x)


class Nnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, f: Any) -> None:
        self.f = f
        for name, shape in SHAPES.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))

    def __call__(self, x: jax.Array) -> Any:
        return self.f({name: getattr(self, name)[...] for name in SHAPES}, x)


def adapt(f: Any, config: LoRAPlusConfig, x: Any) -> dict[str, tuple[Any, Any]]:
    """By kind of model the factors, and the adapted function of variables and inputs."""
    model, net = apply_lora_plus(Linen(f), config), Nnx(f)
    loraplus_nnx.apply_lora_plus(net, config, rngs=nnx.Rngs(0))
    return {
        "linen": (init_lora(model, jax.random.key(0), x)[0], model.apply),
        "nnx_model": (loraplus_nnx.lora_tree(net), loraplus_nnx.functional(net)),
        "function": adapt_function(f, PARAMS, config),
    }


def adapt_function(f: Any, params: Any, config: LoRAPlusConfig) -> tuple[Any, Any]:
    """The same of a function of weights and inputs."""
    lora, _ = functions.init_lora(jax.random.key(0), params, config)
    g = functions.apply_lora_plus(f, config)
    return lora, lambda variables, x: g(variables["params"], variables["lora"], x)


def costs(program: Any) -> tuple[float, int]:
    """FLOPs and bytes of temporaries of a traced program."""
    compiled = program.lower().compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


class Block(nn.Module):
    """Attention and an MLP; the body of a scan, or one of several."""

    scanned: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(h)
        x = x + nn.Dense(SIZE, name="down")(nn.gelu(nn.Dense(4 * SIZE, name="up")(nn.LayerNorm()(x))))
        return (x, None) if self.scanned else x


class Blocks(nn.Module):
    """Eight of them."""

    scanned: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.scanned:
            return nn.Sequential([Block(False, name=f"block_{n}") for n in range(8)])(x)
        lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 8}
        return nn.scan(nn.remat(Block), **lift)(True, name="blocks")(x, None)[0]


def against_layers(scanned: bool) -> dict[str, Any]:
    """A row of the second table: the interpreter's cost over that of the layers."""
    net, x = Blocks(scanned), jax.ShapeDtypeStruct((4, 64, SIZE), "f")
    params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    model = apply_lora_plus(net, LoRAPlusConfig(target_modules=["query", "value", "up", "down"], rank=RANK))
    lora, specs = init_lora(model, jax.random.key(0), x)
    rules = {spec.leaf.removeprefix("params/"): spec.rule_letters for spec in specs.values()}
    config = LoRAPlusConfig(target_parameters=rules, rank=RANK)
    whole = adapt_function(lambda params, x: net.apply({"params": params}, x), params, config)
    adapted = {"layers": (lora, model.apply), "whole": whole}

    def trace(name: str) -> Any:
        # The gradient of a new function: JAX keeps the trace of one that it has seen.
        factors, apply = adapted[name]
        loss = lambda lora, params, x: jnp.sum(apply({"params": params, "lora": lora}, x))  # noqa: E731
        return jax.jit(jax.grad(loss)).trace(factors, params, x)

    seconds = interleaved({name: functools.partial(trace, name) for name in adapted}, 9)
    flops, temporary = np.divide(*(costs(trace(name)) for name in ("whole", "layers")))
    return {
        "model": "scanned blocks" if scanned else "blocks",
        "flops": round(flops, 4),
        "temporary": round(temporary, 3),
        "trace_time": round(median_ratio(seconds["whole"], seconds["layers"]), 2),
    }


def main() -> None:
    parse_options(__doc__)
    use_cpu()
    rows, x = [], jax.ShapeDtypeStruct((ROWS, SIZE), "f")
    total = lambda y: sum(jnp.sum(jnp.sin(part)) for part in jax.tree.leaves(y))  # noqa: E731
    for name, (f, rules) in PRODUCTS.items():
        base, size = costs(jax.jit(jax.grad(lambda x, params, f=f: total(f(params, x)))).trace(x, PARAMS))
        row = {"product": name}
        for kind, (lora, apply) in adapt(f, LoRAPlusConfig(target_parameters=rules, rank=RANK), x).items():
            loss = lambda v, x, params, apply=apply: total(apply({"params": params, "lora": v}, x))  # noqa: E731
            flops, temporary = costs(jax.jit(jax.grad(loss, (0, 1))).trace(lora, x, PARAMS))
            row[f"{kind}_flops"] = round(flops / base, 3)
            row[f"{kind}_temporary_mb"] = round((temporary - size) / 1e6, 2)
        rows.append(row)
    layers = [against_layers(scanned) for scanned in (False, True)]
    print(table(layers))
    report("products", rows, unprinted={"against_layers": layers}, shape=[EXPERTS, ROWS, SIZE], rank=RANK)


if __name__ == "__main__":
    main()
