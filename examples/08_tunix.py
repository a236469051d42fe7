"""LoRA+ in tunix's trainer: a run that stops and resumes, and a directory for PEFT: python examples/08_tunix.py"""

import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tunix.models.qwen3.model import ModelConfig, Qwen3
from tunix.sft.metrics_logger import MetricsLoggerOptions
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

from loraplus_jax import LoRAPlusConfig, describe, lora_plus_adamw, save_peft
from loraplus_jax.interop import TUNIX_LLAMA
from loraplus_jax.nnx import apply_lora_plus, lora_tree

SIZES = {"num_layers": 2, "vocab_size": 64, "embed_dim": 16, "hidden_dim": 32, "num_heads": 2, "head_dim": 8}
CONFIG = LoRAPlusConfig(target_modules=["q_proj", "v_proj", "o_proj"], rank=4, lr_ratio=8.0)
STEPS, WARMUP = 50, 5


def make_model():
    # Tiny and random; docs/tunix.md loads weights. tunix's Qwen3 computes with no other rope_theta.
    model = Qwen3(ModelConfig(**SIZES, num_kv_heads=1, rope_theta=1_000_000, norm_eps=1e-6), rngs=nnx.Rngs(0))
    return model, apply_lora_plus(model, CONFIG, rngs=nnx.Rngs(1))


def make_batches():
    """All batches, from the first step on."""
    for n in range(STEPS):
        ids = (jnp.arange(16) + jax.random.randint(jax.random.key(n), (4, 1), 0, 47)) % 63 + 1
        yield TrainingInput(input_tokens=ids, input_mask=ids > 0)


def model_input(batch):
    mask = batch.input_tokens > 0  # 0 is padding
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,  # where the loss is computed
        "positions": build_positions_from_mask(mask),
        "attention_mask": make_causal_attn_mask(mask),
    }


def make_optimizer():
    return optax.inject_hyperparams(lora_plus_adamw)(
        optax.warmup_cosine_decay_schedule(0.0, 5e-3, WARMUP, STEPS),  # A's rate, logged as learning_rate
        lr_ratio=CONFIG.lr_ratio,
        weight_decay=0.01,
        max_grad_norm=1.0,
    )


def train(model, directory, steps):
    """Trains up to a step, from the newest checkpoint in the directory; returns the losses."""
    every_10 = ocp.checkpoint_managers.FixedIntervalPolicy(10)
    config = TrainingConfig(
        eval_every_n_steps=100,
        max_steps=steps,
        checkpoint_root_directory=f"{directory}/checkpoints",
        checkpointing_options=ocp.CheckpointManagerOptions(save_decision_policy=every_10),
        metrics_logging_options=MetricsLoggerOptions(log_dir=f"{directory}/tensorboard"),
    )
    trainer = PeftTrainer(model, make_optimizer(), config).with_gen_model_input_fn(model_input)
    start = trainer.train_steps
    trainer.train(make_batches())
    trainer.close()
    print(f"steps {start} to {trainer.train_steps}")
    return trainer.metrics_logger.get_metric_history("", "loss", "train")


def main():
    with tempfile.TemporaryDirectory() as directory:
        model, specs = make_model()
        print(describe(lora_tree(model), make_optimizer(), specs, step=WARMUP))
        straight = train(model, f"{directory}/straight", STEPS)
        expected = lora_tree(model)

        for steps in (20, STEPS):
            model, specs = make_model()  # as in a new process
            losses = train(model, f"{directory}/run", steps)
        differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), lora_tree(model), expected)

        save_peft(
            f"{directory}/peft",
            lora_tree(model),
            specs,
            CONFIG,
            TUNIX_LLAMA,
            base_model="Qwen/Qwen3-0.6B",
            task_type="CAUSAL_LM",
            check_for="vllm",
        )
    difference = max(jax.tree.leaves(differences))
    print(f"loss {straight[0]:.3f} -> {losses[-1]:.3f}; resumed differs by {difference:.1e}")
    return straight[0], losses[-1], difference


if __name__ == "__main__":
    main()
