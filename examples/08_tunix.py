"""LoRA+ in tunix's trainer (pip install google-tunix): our adapters on its Qwen 3, and a PEFT directory.

python examples/08_tunix.py
"""

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
IDS = jnp.tile(jnp.arange(16), (4, 1))


def loss_fn(model, tokens, positions, mask):
    logits, _ = model(tokens, positions, None, mask)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def inputs(batch):
    length = jnp.arange(16)
    mask = jnp.broadcast_to(length[:, None] >= length, (4, 16, 16))
    return {"tokens": batch.input_tokens, "positions": jnp.tile(length, (4, 1)), "mask": mask}


def main():
    model = Qwen3(ModelConfig(**SIZES, num_kv_heads=1, rope_theta=10_000, norm_eps=1e-6), rngs=nnx.Rngs(0))
    config = LoRAPlusConfig(target_modules=["q_proj", "v_proj", "o_proj"], rank=4, lr_ratio=8.0)
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    batch = TrainingInput(input_tokens=IDS, input_mask=IDS >= 0)
    before = float(loss_fn(model, **inputs(batch)))
    tx = optax.inject_hyperparams(lora_plus_adamw)(learning_rate=3e-3, lr_ratio=8.0)  # tunix logs the rate
    trainer = PeftTrainer(model, tx, TrainingConfig(eval_every_n_steps=100, max_steps=50))
    trainer.with_loss_fn(loss_fn).with_gen_model_input_fn(inputs).train([batch] * 50, None)
    with tempfile.TemporaryDirectory() as directory:
        save_peft(f"{directory}/peft", lora_tree(model), specs, config, TUNIX_LLAMA)
    after = float(loss_fn(model, **inputs(batch)))
    print(f"loss {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
