"""LoRA+ on an Equinox model, which is a tree of arrays and a function of it.

pip install equinox
python examples/11_equinox.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from loraplus_jax import LoRAPlusConfig, describe, lora_plus_adamw, merge
from loraplus_jax.functions import apply_lora_plus, init_lora

# Paths are the model's fields and the numbers in its lists; Equinox's weights are (out, in).
CONFIG = LoRAPlusConfig(target_parameters={"layers/[01]/weight": "oi"}, rank=4, lr_ratio=4.0)


def main():
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.sin(2 * x[:, :1])
    model = eqx.nn.MLP(8, 1, width_size=64, depth=2, key=jax.random.key(1))

    # Any function whose first argument is the tree; its other leaves may be anything, such as activations.
    apply = apply_lora_plus(lambda model, x: jax.vmap(model)(x), CONFIG)
    lora, specs = init_lora(jax.random.key(2), model, CONFIG)
    tx = lora_plus_adamw(5e-3, lr_ratio=CONFIG.lr_ratio, specs=specs)
    print(describe(lora, tx, specs, frozen=eqx.filter(model, eqx.is_array)))

    @jax.jit
    def step(lora, state):
        loss, grads = jax.value_and_grad(lambda lora: jnp.mean((apply(model, lora, x) - y) ** 2))(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    state, losses = tx.init(lora), []
    for _ in range(300):
        lora, state, loss = step(lora, state)
        losses.append(float(loss))

    merged = merge({"params": model}, lora, specs)["params"]  # an eqx.nn.MLP again
    same = float(jnp.abs(jax.vmap(merged)(x) - apply(model, lora, x)).max())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}; merged differs by {same:.1e}")
    return losses[0], losses[-1], same


if __name__ == "__main__":
    main()
