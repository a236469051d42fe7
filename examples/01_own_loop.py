"""LoRA+ in your own training loop: an existing Flax model, plain optax, ten lines.

    python examples/01_own_loop.py

Pretrains a small network on one function, then adapts it to a related function with frozen weights.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, describe, init_lora, lora_plus_adamw, merge


class Net(nn.Module):
    """An existing model, without LoRA."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(64, name="hidden")(x))
        x = nn.gelu(nn.Dense(64, name="middle")(x))
        return nn.Dense(1, name="readout")(x)


def mse(model, variables, x, y):
    return jnp.mean((model.apply(variables, x)[:, 0] - y) ** 2)


def fit(tx, loss, params, steps):
    """A training loop for any optax optimizer and any loss of one tree of parameters."""

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    for _ in range(steps):
        params, state, value = step(params, state)
    return params, float(value)


def main():
    key = jax.random.key(0)
    x = jax.random.uniform(key, (256, 4), minval=-1.0)
    old, new = jnp.sin(3 * x[:, 0]) * x[:, 1], jnp.cos(3 * x[:, 0]) * x[:, 1]
    net = Net()
    params = net.init(key, x)["params"]
    params, pretrained = fit(optax.adam(3e-3), lambda p: mse(net, {"params": p}, x, old), params, 500)

    config = LoRAPlusConfig(target_modules=["hidden", "middle"], rank=4, lr_ratio=4.0)
    model = apply_lora_plus(net, config)
    lora, specs = init_lora(model, key, x)
    tx = lora_plus_adamw(3e-3, lr_ratio=config.lr_ratio)
    before = float(mse(net, {"params": params}, x, new))
    lora, after = fit(tx, lambda lora: mse(model, {"params": params, "lora": lora}, x, new), lora, 500)

    print(describe({"lora": lora}, tx, specs, frozen=params))
    merged = merge({"params": params}, lora, specs)
    difference = float(jnp.abs(net.apply(merged, x) - model.apply({"params": params, "lora": lora}, x)).max())
    print(f"loss on the old function after pretraining: {pretrained:.5f}")
    print(f"loss on the new function: {before:.4f} before, {after:.5f} after")
    print(f"merged and unmerged outputs differ by {difference:.1e}")
    return before, after, difference


if __name__ == "__main__":
    main()
