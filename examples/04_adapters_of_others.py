"""The LoRA+ optimizer with adapters of another library, `flax.nnx.LoRA`.

    python examples/04_adapters_of_others.py

`lora_plus` turns any optax optimizer into a LoRA+ one and labels factors by side. `probe` measures how much larger
B's steps are than A's.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from loraplus_jax import describe, label_params, lora_plus, probe


class Net(nnx.Module):
    """An existing NNX model with NNX's own adapters."""

    def __init__(self, rngs):
        self.hidden = nnx.LoRALinear(4, 64, lora_rank=4, rngs=rngs)
        self.readout = nnx.LoRALinear(64, 1, lora_rank=1, rngs=rngs)

    def __call__(self, x):
        return self.readout(nnx.gelu(self.hidden(x)))[:, 0]


def main():
    x = jax.random.uniform(jax.random.key(0), (256, 4), minval=-1.0)
    y = jnp.sin(3 * x[:, 0]) * x[:, 1]
    graph, adapters, rest = nnx.split(Net(nnx.Rngs(0)), nnx.LoRAParam, ...)
    adapters = nnx.to_pure_dict(adapters)
    tx = lora_plus(optax.adamw(3e-3), lr_ratio=4.0)
    print(describe(adapters, tx))

    def loss(adapters):
        state = nnx.merge(graph, _as_state(graph, adapters, rest), rest)
        return jnp.mean((state(x) - y) ** 2)

    @jax.jit
    def step(adapters, state):
        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = tx.init(adapters), []
    ratio = float(probe(tx, state, adapters)["b/a"])
    for _ in range(400):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    roles = jax.tree.leaves(label_params(adapters))
    print(f"B's steps are {ratio:.2f} times A's; loss {losses[0]:.4f} before, {losses[-1]:.4f} after")
    return roles, ratio, losses[0], losses[-1]


def _as_state(graph, adapters, rest):
    """Converts the plain dict to the state that `nnx.merge` expects."""
    shapes = nnx.eval_shape(lambda: nnx.state(Net(nnx.Rngs(0)), nnx.LoRAParam))
    nnx.replace_by_pure_dict(shapes, adapters)
    return shapes


if __name__ == "__main__":
    main()
