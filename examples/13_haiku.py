"""LoRA+ on a Haiku model: the transformed function and its parameters.

pip install dm-haiku
python examples/13_haiku.py
"""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from loraplus_jax import LoRAPlusConfig, describe, lora_plus_adamw, merge
from loraplus_jax.functions import apply_lora_plus, init_lora

# Paths are the names of modules, with "/~/" between nested ones, and of their parameters.
CONFIG = LoRAPlusConfig(target_parameters={r"mlp/~/linear_[01]/w": "io"}, rank=4, lr_ratio=4.0)


def main():
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.sin(2 * x[:, :1])
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([64, 64, 1], name="mlp")(x)))
    params = net.init(jax.random.key(1), x)

    apply = apply_lora_plus(net.apply, CONFIG)
    lora, specs = init_lora(jax.random.key(2), params, CONFIG)
    tx = lora_plus_adamw(5e-3, lr_ratio=CONFIG.lr_ratio, specs=specs)
    print(describe(lora, tx, specs, frozen=params))

    @jax.jit
    def step(lora, state):
        loss, grads = jax.value_and_grad(lambda lora: jnp.mean((apply(params, lora, x) - y) ** 2))(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    state, losses = tx.init(lora), []
    for _ in range(300):
        lora, state, loss = step(lora, state)
        losses.append(float(loss))

    merged = merge({"params": params}, lora, specs)["params"]
    same = float(jnp.abs(net.apply(merged, x) - apply(params, lora, x)).max())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}; merged differs by {same:.1e}")
    return losses[0], losses[-1], same


if __name__ == "__main__":
    main()
