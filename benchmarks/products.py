"""What does an adapter cost by the product its weight is in: on Linen, on NNX and on plain functions?

    python benchmarks/products.py

FLOPs and temporary memory of the compiled gradient for inputs and factors, over those of the base's for inputs.
1 + 3 r (in + out) / (2 in out) is a product's own and two thin ones, here 1.09; the gradient of W takes half a base
more. Compiled for the CPU, where `ragged_dot` multiplies all rows with every expert; nothing runs.

The second table: blocks of a transformer whose layers Linen's interceptor adapts, against the same weights adapted
in the whole model by the interpreter. Trace times are medians of a ratio, as the two take turns.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from common import interleaved, median_ratio, parse_options, report, table, use_cpu
from flax import nnx

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, functions, init_lora
from loraplus_jax import nnx as loraplus_nnx

EXPERTS, ROWS, SIZE, RANK = 4, 512, 256, 8
SHAPES = {
    "experts": (EXPERTS, SIZE, SIZE),
    "up": (SIZE, SIZE),
    "gate": (SIZE, SIZE),
    "window": (3, SIZE, SIZE),
}
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
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        return self.f({n: self.param(n, nn.initializers.normal(), SHAPES[n]) for n in self.names}, x)


class Nnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, f: Any, names: tuple[str, ...]) -> None:
        self.f, self.names = f, names
        for name in names:
            setattr(self, name, nnx.Param(jnp.zeros(SHAPES[name])))

    def __call__(self, x: jax.Array) -> Any:
        return self.f({name: getattr(self, name)[...] for name in self.names}, x)


def linen(f: Any, names: tuple[str, ...], config: LoRAPlusConfig, x: Any) -> tuple[Any, Any]:
    """The factors, and the adapted function of factors, weights and inputs."""
    model = apply_lora_plus(Linen(f, names), config)
    lora, _ = init_lora(model, jax.random.key(0), x)
    return lora, lambda lora, params, x: model.apply({"params": params, "lora": lora}, x)


def nnx_model(f: Any, names: tuple[str, ...], config: LoRAPlusConfig, x: Any) -> tuple[Any, Any]:
    """As `linen`."""
    model = Nnx(f, names)
    loraplus_nnx.apply_lora_plus(model, config, rngs=nnx.Rngs(0))
    apply = loraplus_nnx.functional(model)
    return loraplus_nnx.lora_tree(model), lambda lora, params, x: apply({"params": params, "lora": lora}, x)


def function(f: Any, names: tuple[str, ...], config: LoRAPlusConfig, x: Any) -> tuple[Any, Any]:
    """As `linen`."""
    lora, _ = functions.init_lora(
        jax.random.key(0), {n: jax.ShapeDtypeStruct(SHAPES[n], "f") for n in names}, config
    )
    g = functions.apply_lora_plus(f, config)
    return lora, lambda lora, params, x: g(params, lora, x)


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
    other, _ = functions.init_lora(jax.random.key(0), params, config)
    g = functions.apply_lora_plus(lambda params, x: net.apply({"params": params}, x), config)
    layers = lambda lora, params, x: jnp.sum(model.apply({"params": params, "lora": lora}, x))  # noqa: E731
    whole = lambda lora, params, x: jnp.sum(g(params, lora, x))  # noqa: E731
    trace = {
        name: lambda f=f, lora=lora: jax.jit(jax.grad(lambda *args: f(*args))).trace(lora, params, x)
        for name, f, lora in (("layers", layers, lora), ("whole", whole, other))
    }
    seconds = interleaved({name: lambda call=call: call() and () for name, call in trace.items()}, 9)
    one, two = (trace[name]().lower().compile() for name in ("whole", "layers"))
    return {
        "model": "scanned blocks" if scanned else "blocks",
        "flops": round(one.cost_analysis()["flops"] / two.cost_analysis()["flops"], 4),
        "temporary": round(
            one.memory_analysis().temp_size_in_bytes / two.memory_analysis().temp_size_in_bytes, 3
        ),
        "trace_time": round(median_ratio(seconds["whole"], seconds["layers"]), 2),
    }


def main() -> None:
    parse_options(__doc__)
    use_cpu()
    rows, x = [], jax.ShapeDtypeStruct((ROWS, SIZE), "f")
    total = lambda y: sum(jnp.sum(jnp.sin(part)) for part in jax.tree.leaves(y))  # noqa: E731
    for name, (f, rules) in PRODUCTS.items():
        names = tuple(n for n in SHAPES if any(n in rule.split("|") for rule in rules))
        params = {n: jax.ShapeDtypeStruct(SHAPES[n], "f") for n in names}
        base = jax.jit(jax.grad(lambda x, params, f=f: total(f(params, x)))).lower(x, params).compile()
        row = {"product": name}
        for kind in (linen, nnx_model, function):
            lora, g = kind(f, names, LoRAPlusConfig(target_parameters=rules, rank=RANK), x)
            step = jax.grad(lambda lora, x, params, g=g: total(g(lora, params, x)), (0, 1))
            compiled = jax.jit(step).lower(lora, x, params).compile()
            row[f"{kind.__name__}_flops"] = round(
                compiled.cost_analysis()["flops"] / base.cost_analysis()["flops"], 3
            )
            sizes = [p.memory_analysis().temp_size_in_bytes for p in (compiled, base)]
            row[f"{kind.__name__}_temporary_mb"] = round((sizes[0] - sizes[1]) / 1e6, 2)
        rows.append(row)
    layers = [against_layers(scanned) for scanned in (False, True)]
    print(table(layers))
    report("products", rows, unprinted={"against_layers": layers}, shape=[EXPERTS, ROWS, SIZE], rank=RANK)


if __name__ == "__main__":
    main()
