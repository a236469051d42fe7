"""Adapters with a fully trained head and fully trained biases, which have a separate learning rate.

python examples/05_trained_extras.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from loraplus_jax import (
    LoRAPlusConfig,
    apply_lora_plus,
    describe,
    init_lora,
    init_state,
    jit_step,
    lora_plus_adamw,
    make_schedule,
    split_trainable,
)

CLASSES, STEPS = 3, 300


class Classifier(nn.Module):
    """An existing model with a new head."""

    @nn.compact
    def __call__(self, x):
        for n in range(2):
            x = nn.gelu(nn.Dense(32, name=f"layers_{n}")(x))
        return nn.Dense(CLASSES, name="head")(x)


CONFIG = LoRAPlusConfig(
    target_modules="all-linear", modules_to_save=["head"], bias="lora_only", rank=4, lr_ratio=4.0
)


def main():
    x = jax.random.normal(jax.random.key(0), (512, 8))
    labels = jnp.argmax(jnp.sin(2 * x[:, :CLASSES]) + x[:, CLASSES : 2 * CLASSES], axis=1)
    net = Classifier()
    model = apply_lora_plus(net, CONFIG)
    lora, specs = init_lora(model, jax.random.key(1), x)
    variables = {**net.init(jax.random.key(2), x), "lora": lora}
    trainable, frozen = split_trainable(variables, CONFIG)
    schedule = make_schedule("wsd", 5e-3, STEPS, warmup_steps=20, final_fraction=0.1)
    tx = lora_plus_adamw(
        schedule, lr_ratio=CONFIG.lr_ratio, head_learning_rate=2e-2, weight_decay=0.01, specs=specs
    )
    print(describe(trainable, tx, specs, frozen=frozen, step=100))

    def loss_fn(variables, batch, rng):
        logits = model.apply(variables, batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        correct = jnp.sum(jnp.argmax(logits, 1) == batch["labels"])
        return (losses.sum(), losses.size), {"accuracy": (correct, losses.size)}

    step = jit_step(loss_fn, tx)
    state = init_state(trainable, tx, jax.random.key(3))
    for _ in range(STEPS):
        state, metrics = step(state, frozen, {"x": x, "labels": labels})
    heads = state.trainable["params"]["head"]["kernel"], trainable["params"]["head"]["kernel"]
    change = float(jnp.abs(heads[0] - heads[1]).max())
    print(f"accuracy {float(metrics['accuracy']):.3f}; largest change of the head's kernel {change:.2f}")
    return float(metrics["accuracy"]), change


if __name__ == "__main__":
    main()
