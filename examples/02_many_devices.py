"""The same training step with pmap and with jit over a mesh, on eight virtual CPU devices.

    python examples/02_many_devices.py

On a GPU or TPU machine, remove the first two lines of code; nothing else changes.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import jax_utils

from loraplus_jax import (
    LoRAPlusConfig,
    apply_lora_plus,
    init_lora,
    init_state,
    jit_step,
    lora_plus_adamw,
    make_mesh,
    pmap_step,
)
from loraplus_jax.step import replicate


def main():
    net = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(4)])
    config = LoRAPlusConfig(target_modules=["layers_0", "layers_2"], rank=2, init="gaussian", lr_ratio=4.0)
    model = apply_lora_plus(net, config)
    key = jax.random.key(0)
    x = jax.random.normal(key, (64, 16))
    batch = {"x": x, "y": jnp.tanh(x[:, :4])}
    frozen = net.init(key, x)
    lora, specs = init_lora(model, key, x)
    tx = lora_plus_adamw(3e-3, lr_ratio=config.lr_ratio, max_grad_norm=1.0, specs=specs)

    def loss_fn(variables, batch, rng):
        """Returns a sum and its weight, so that the mean is over all devices."""
        error = jnp.sum((model.apply(variables, batch["x"]) - batch["y"]) ** 2, axis=-1)
        return (jnp.sum(error), jnp.float32(error.size)), {}

    mesh = make_mesh()
    by_jit = replicate(mesh, init_state({"lora": lora}, tx, key))
    by_pmap = jax_utils.replicate(init_state({"lora": lora}, tx, key))
    step, pstep = jit_step(loss_fn, tx, mesh=mesh), pmap_step(loss_fn, tx)
    jit_frozen, pmap_frozen = replicate(mesh, frozen), jax_utils.replicate(frozen)
    devices = jax.local_device_count()
    pmap_batch = jax.tree.map(lambda a: a.reshape(devices, -1, *a.shape[1:]), batch)
    for _ in range(5):
        by_jit, metrics = step(by_jit, jit_frozen, batch)
        by_pmap, _ = pstep(by_pmap, pmap_frozen, pmap_batch)
        print(f"step {int(by_jit.step)}: loss {float(metrics['loss']):.4f}")
    trained = jax.device_get((jax_utils.unreplicate(by_pmap).trainable, by_jit.trainable))
    difference = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), *trained)))
    print(f"{devices} devices: jit and pmap differ by {difference:.1e} after 5 steps")
    return difference


if __name__ == "__main__":
    main()
