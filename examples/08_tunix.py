"""LoRA+ on tunix's Qwen 3 in tunix's trainer, in two runs, and a PEFT directory: python examples/08_tunix.py"""

import tempfile

import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tunix.models.qwen3.model import ModelConfig, Qwen3
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from loraplus_jax import LoRAPlusConfig, describe, lora_plus_adamw, save_peft
from loraplus_jax.interop import TUNIX_LLAMA
from loraplus_jax.nnx import apply_lora_plus, lora_tree

SIZES = {"num_layers": 2, "vocab_size": 64, "embed_dim": 16, "hidden_dim": 32, "num_heads": 2, "head_dim": 8}
IDS = POSITIONS = jnp.tile(jnp.arange(16), (4, 1))
CONFIG = LoRAPlusConfig(target_modules=["q_proj", "v_proj", "o_proj"], rank=4, lr_ratio=8.0)
STEPS = 50


def loss_fn(model, tokens):
    logits, _ = model(tokens, POSITIONS, None, jnp.tril(jnp.ones((4, 16, 16), bool)))
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def make_model():
    model = Qwen3(ModelConfig(**SIZES, num_kv_heads=1, rope_theta=10_000, norm_eps=1e-6), rngs=nnx.Rngs(0))
    return model, apply_lora_plus(model, CONFIG, rngs=nnx.Rngs(1))


def make_optimizer():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, warmup_steps=5, decay_steps=STEPS)
    # The trainer logs an injected learning rate, that of A.
    return optax.inject_hyperparams(lora_plus_adamw)(schedule, lr_ratio=CONFIG.lr_ratio, max_grad_norm=1.0)


def train(model, checkpoints, steps):
    """Trains up to a step, from the newest checkpoint in the directory."""
    every = ocp.checkpoint_managers.FixedIntervalPolicy(10)
    config = TrainingConfig(
        eval_every_n_steps=100,
        max_steps=steps,
        checkpoint_root_directory=checkpoints,
        checkpointing_options=ocp.CheckpointManagerOptions(save_decision_policy=every),
    )
    trainer = PeftTrainer(model, make_optimizer(), config)
    trainer.with_loss_fn(loss_fn).with_gen_model_input_fn(lambda batch: {"tokens": batch.input_tokens})
    start = trainer.train_steps
    trainer.train([TrainingInput(input_tokens=IDS, input_mask=IDS >= 0)] * STEPS, None)
    print(f"steps {start} to {trainer.train_steps}")


def main():
    with tempfile.TemporaryDirectory() as directory:
        model, specs = make_model()
        print(describe(lora_tree(model), make_optimizer(), specs, step=5))  # after the warmup
        before = float(loss_fn(model, IDS))
        train(model, f"{directory}/checkpoints", 20)
        model, specs = make_model()  # as in a new process
        train(model, f"{directory}/checkpoints", STEPS)
        save_peft(f"{directory}/peft", lora_tree(model), specs, CONFIG, TUNIX_LLAMA)
    print(f"loss {before:.3f} -> {(after := float(loss_fn(model, IDS))):.3f}")
    return before, after


if __name__ == "__main__":
    main()
