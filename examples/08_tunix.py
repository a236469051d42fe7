"""LoRA+ on tunix's Qwen 3 in tunix's trainer, and a PEFT directory: python examples/08_tunix.py"""

import tempfile

import jax.numpy as jnp
import optax
from flax import nnx
from tunix.models.qwen3.model import ModelConfig, Qwen3
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from loraplus_jax import LoRAPlusConfig, lora_plus_adamw, save_peft
from loraplus_jax.interop.name_maps import TUNIX_LLAMA
from loraplus_jax.nnx import apply_lora_plus, lora_tree

SIZES = {"num_layers": 2, "vocab_size": 64, "embed_dim": 16, "hidden_dim": 32, "num_heads": 2, "head_dim": 8}
IDS = POSITIONS = jnp.tile(jnp.arange(16), (4, 1))


def loss_fn(model, tokens):
    logits, _ = model(tokens, POSITIONS, None, jnp.tril(jnp.ones((4, 16, 16), bool)))
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def main():
    model = Qwen3(ModelConfig(**SIZES, num_kv_heads=1, rope_theta=10_000, norm_eps=1e-6), rngs=nnx.Rngs(0))
    config = LoRAPlusConfig(target_modules=["q_proj", "v_proj", "o_proj"], rank=4, lr_ratio=8.0)
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    before = float(loss_fn(model, IDS))
    tx = optax.inject_hyperparams(lora_plus_adamw)(learning_rate=3e-3, lr_ratio=8.0)  # tunix logs the rate
    trainer = PeftTrainer(model, tx, TrainingConfig(eval_every_n_steps=100, max_steps=50))
    trainer.with_loss_fn(loss_fn).with_gen_model_input_fn(lambda batch: {"tokens": batch.input_tokens})
    trainer.train([TrainingInput(input_tokens=IDS, input_mask=IDS >= 0)] * 50, None)
    with tempfile.TemporaryDirectory() as directory:
        save_peft(f"{directory}/peft", lora_tree(model), specs, config, TUNIX_LLAMA)
    print(f"loss {before:.3f} -> {(after := float(loss_fn(model, IDS))):.3f}")
    return before, after


if __name__ == "__main__":
    main()
