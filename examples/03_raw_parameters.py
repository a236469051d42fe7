"""Adapters for weights outside Flax layers: a mixture of experts with raw parameters.

    python examples/03_raw_parameters.py

A regular expression selects each weight, with one letter per axis: i input, o output, any other letter a batch axis
kept in both factors. Flax layers are adapted in the same config, as usual.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, describe, init_lora, lora_plus_adamw, merge


class Experts(nn.Module):
    """An existing model: einsums with raw parameters, one of which has its output axis first."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        gate = nn.softmax(nn.Dense(3, name="gate")(x))
        up = self.param("up", init, (3, 4, 32))  # expert, input, output
        down = self.param("down", init, (8, 32))  # output, input
        h = nn.gelu(jnp.einsum("bi,eio->beo", x, up))
        return jnp.einsum("beh,be,oh->bo", h, gate, down)


CONFIG = LoRAPlusConfig(
    target_modules=["gate"],
    target_parameters={"up": "eio", "down": "oi"},
    rank=2,
    rank_pattern={"down": 4},
    lr_ratio=4.0,
)


def main():
    key = jax.random.key(0)
    x = jax.random.normal(key, (256, 4))
    y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (4, 8)))
    net = Experts()
    base = net.init(jax.random.key(2), x)
    model = apply_lora_plus(net, CONFIG)
    lora, specs = init_lora(model, jax.random.key(3), x)
    tx = lora_plus_adamw(5e-3, lr_ratio=CONFIG.lr_ratio, specs=specs)
    print(describe({"lora": lora}, tx, specs, frozen=base))

    def loss(lora):
        return jnp.mean((model.apply({**base, "lora": lora}, x) - y) ** 2)

    @jax.jit
    def step(lora, state):
        value, grads = jax.value_and_grad(loss)(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    state, losses = tx.init(lora), []
    for _ in range(400):
        lora, state, value = step(lora, state)
        losses.append(float(value))
    merged = merge(base, lora, specs)
    difference = float(jnp.abs(net.apply(merged, x) - model.apply({**base, "lora": lora}, x)).max())
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after")
    print(f"merged and unmerged outputs differ by {difference:.1e}")
    return losses[0], losses[-1], difference


if __name__ == "__main__":
    main()
