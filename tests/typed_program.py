"""A user's program, which `.ci/run` checks by mypy --strict and pyright against the installed wheel, and runs."""

# mypy: disable-error-code="import-untyped"
# optax has no py.typed.

import tempfile
from collections.abc import Mapping
from typing import Any, assert_type, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import loraplus_jax.nnx as lora_nnx
from loraplus_jax import (
    LoRAPlusConfig,
    TrainState,
    apply_lora_plus,
    describe,
    init_lora,
    init_state,
    jit_step,
    load_adapter,
    lora_plus_adamw,
    make_eval,
    merge,
    save_adapter,
)
from loraplus_jax.adapter import AdapterStack, apply_rows, put_adapter, select_adapters, stack_adapters
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.interop import Adapter, combine_adapters


def linen(x: jax.Array, y: jax.Array) -> float:
    net = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(1)])
    params = net.init(jax.random.key(0), x)["params"]
    config = LoRAPlusConfig(target_modules=["layers_0"], rank=2, lr_ratio=4.0)
    assert_type(config.lr_ratio, float)
    model = apply_lora_plus(net, config)
    lora, specs = init_lora(model, jax.random.key(1), x)
    assert_type(lora, dict[str, Any])
    assert_type(specs, dict[str, AdapterSpec])
    stack = put_adapter(stack_adapters([Adapter(lora, specs, config, {})], slots=2), 1, None)
    assert_type(stack, AdapterStack)
    apply_rows(
        apply_lora_plus(net, stack.config).apply,
        {"params": params},
        select_adapters(stack, jnp.zeros(len(x), int)),
        x,
    )
    tx = lora_plus_adamw(optax.linear_schedule(1e-2, 0.0, 10), lr_ratio=config.lr_ratio, specs=specs)
    wrapped: optax.GradientTransformation = tx

    def loss_fn(
        variables: dict[str, Any], batch: Any, rng: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Mapping[str, tuple[jax.Array, jax.Array]]]:
        errors = (model.apply(variables, batch["x"]) - batch["y"]) ** 2
        return (errors.sum(), jnp.float32(errors.size)), {}

    state = init_state({"lora": lora}, wrapped, jax.random.key(2))
    step = jit_step(loss_fn, tx)
    for _ in range(2):
        state, metrics = step(state, {"params": params}, {"x": x, "y": y})
        assert_type(state, TrainState)
        assert_type(metrics, dict[str, jax.Array])
    totals = make_eval(loss_fn)(state.trainable, {"params": params}, {"x": x, "y": y})
    assert_type(totals["loss"], tuple[jax.Array, jax.Array])
    table = describe(state.trainable, tx, specs, frozen={"params": params})
    assert_type(table.rows[0].shape, tuple[int, ...])
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(f"{directory}/adapter", state.trainable, specs, config)
        adapter = load_adapter(f"{directory}/adapter")
    assert_type(adapter, Adapter)
    assert_type(adapter.config, LoRAPlusConfig | None)
    assert_type(combine_adapters({"a": adapter, "b": adapter}, [0.5, 0.5], "linear"), Adapter)
    merged = merge({"params": params}, adapter.lora, adapter.specs)
    outputs = cast(jax.Array, net.apply(merged, x))
    print(table.summary)
    return float(abs(outputs - model.apply({"params": params, **state.trainable}, x)).max())


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.readout = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.readout(jax.nn.relu(self.hidden(x)))


def with_nnx(x: jax.Array) -> float:
    model = Net(nnx.Rngs(0))
    config = LoRAPlusConfig(target_modules=["hidden"], rank=2)
    specs = lora_nnx.apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    assert_type(specs, dict[str, AdapterSpec])
    optimizer = nnx.Optimizer(model, lora_plus_adamw(1e-3, lr_ratio=4.0, specs=specs), wrt=nnx.LoRAParam)
    print(describe(lora_nnx.lora_tree(model), optimizer.tx, specs))
    merged = lora_nnx.merge(model)
    assert_type(merged, Net)
    return float(abs(merged(x) - model(x)).max())


if __name__ == "__main__":
    inputs = jnp.ones((8, 4))
    assert linen(inputs, jnp.zeros((8, 1))) < 1e-6
    assert with_nnx(inputs) < 1e-6
