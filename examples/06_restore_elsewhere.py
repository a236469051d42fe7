"""Restores adapters into a plain Flax model with only orbax, without loraplus_jax.

    python examples/06_restore_elsewhere.py

`train` saves a checkpoint and the base weights. `restore_elsewhere` uses only orbax and Flax: it reads the adapters
and their metadata, and adds scale * A B to each adapted kernel.
"""

import json
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


class Net(nn.Module):
    """An existing model, without adapters."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="out")(nn.tanh(nn.Dense(32, name="hidden")(x)))


X = jax.random.normal(jax.random.key(0), (64, 16))


def train(directory):
    """Trains adapters and saves them; returns the adapted model's outputs, and the loss before and after."""
    from loraplus_jax import (
        LoRAPlusConfig,
        apply_lora_plus,
        init_lora,
        init_state,
        jit_step,
        lora_plus_adamw,
        open_manager,
        save_checkpoint,
    )
    from loraplus_jax.step import describe_run

    net, key = Net(), jax.random.key(1)
    frozen = net.init(key, X)
    config = LoRAPlusConfig(target_modules=["hidden", "out"], rank=4, lr_ratio=4.0)
    model = apply_lora_plus(net, config)
    lora, specs = init_lora(model, key, X)
    tx = lora_plus_adamw(1e-2, lr_ratio=config.lr_ratio, specs=specs)

    def loss_fn(variables, batch, rng):
        error = (model.apply(variables, batch) - jnp.sin(3 * batch[:, :4])) ** 2
        return (jnp.sum(error), jnp.float32(error.size)), {}

    step, state, losses = jit_step(loss_fn, tx), init_state({"lora": lora}, tx, key), []
    for _ in range(100):
        state, metrics = step(state, frozen, X)
        losses.append(float(metrics["loss"]))
    with open_manager(directory / "checkpoints") as manager:
        save_checkpoint(manager, state, metadata=describe_run(specs, config))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "base", frozen)
    return model.apply({**frozen, **state.trainable}, X), losses[0], losses[-1]


def restore_elsewhere(directory):
    """Computes the fine-tuned outputs of `Net` with only orbax and Flax."""
    with ocp.StandardCheckpointer() as checkpointer:
        variables = checkpointer.restore(directory / "base")
    steps = [path for path in (directory / "checkpoints").iterdir() if path.name.isdigit()]
    last = max(steps, key=lambda path: int(path.name))
    # Without a target, orbax restores arrays as saved, in nested dicts.
    with ocp.StandardCheckpointer() as checkpointer:
        lora = checkpointer.restore(last / "state")["trainable"]["lora"]
    specs = json.loads((last / "metadata" / "metadata").read_text())["specs"]
    for module, spec in specs.items():
        pair = lora
        for name in module.split("/"):
            pair = pair[name]
        *parents, leaf = spec["leaf"].split("/")  # "params/hidden/kernel"
        params = variables
        for name in parents:
            params = params[name]
        assert spec["axes"] == "io"  # a Dense kernel (in, out): A is (in, rank), B is (rank, out)
        params[leaf] = params[leaf] + spec["scale"] * pair["lora_a"] @ pair["lora_b"]
    return Net().apply(variables, X)


def main():
    with tempfile.TemporaryDirectory() as name:
        outputs, before, after = train(Path(name))
        restored = restore_elsewhere(Path(name))
    difference = float(jnp.max(jnp.abs(outputs - restored)))
    print(f"loss {before:.4f} before, {after:.4f} after")
    print(f"outputs before and after restoring differ by {difference:.1e}")
    return before, after, difference


if __name__ == "__main__":
    main()
