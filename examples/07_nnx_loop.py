"""LoRA+ on a Flax NNX model, in place: trained, saved and merged: python examples/07_nnx_loop.py"""

import tempfile

import jax
import jax.numpy as jnp
from flax import nnx

from loraplus_jax import LoRAPlusConfig, describe, lora_plus_adamw, save_adapter
from loraplus_jax.nnx import apply_lora_plus, lora_tree, merge


@nnx.jit
def step(model, optimizer, x, y):
    def mse(model):
        return jnp.mean((model(x) - y) ** 2)

    loss, grads = nnx.value_and_grad(mse, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return loss


def main():
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.sin(x.sum(1, keepdims=True))
    model = nnx.Sequential(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), nnx.gelu, nnx.Linear(64, 1, rngs=nnx.Rngs(1)))
    config = LoRAPlusConfig(target_modules=["layers/0", "layers/2"], rank=1, lr_ratio=8.0)
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(2))
    tx = lora_plus_adamw(3e-3, lr_ratio=config.lr_ratio, specs=specs)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    print(describe(lora_tree(model), optimizer.tx, specs))
    losses = [float(step(model, optimizer, x, y)) for _ in range(200)]
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(f"{directory}/adapter", lora_tree(model), specs, config)
    difference = float(jnp.abs(merge(model)(x) - model(x)).max())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; merged differs by {difference:.1e}")
    return losses[0], losses[-1], difference


if __name__ == "__main__":
    main()
