"""LoRA+ on bonsai's Qwen 3 and its own jitted forward (pip install git+https://github.com/jax-ml/bonsai)."""

import jax.numpy as jnp
import optax
from bonsai.models.qwen3.modeling import ModelConfig, Qwen3, forward, init_cache
from flax import nnx

from loraplus_jax import LoRAPlusConfig, lora_plus_adamw
from loraplus_jax.nnx import apply_lora_plus

SIZES = {"num_layers": 2, "vocab_size": 64, "emb_dim": 16, "mlp_dim": 32, "num_heads": 2, "head_dim": 8}
SIZES |= {"num_kv_heads": 1, "rope_theta": 10_000, "rope_scaling_factor": 8.0, "local_rope_theta": 1e4}
CONFIG = ModelConfig(**SIZES, norm_eps=1e-6, tie_word_embeddings=True)
IDS = (jnp.arange(32).reshape(4, 8) * 7) % 64 + 1  # 0 is padding


@nnx.jit
def step(model, optimizer):
    def loss_fn(model):
        cache = init_cache(CONFIG, 4, 8, 0, jnp.float32)
        logits, _ = forward(model, cache, IDS[:, :-1], 0)  # of the last token
        return optax.softmax_cross_entropy_with_integer_labels(logits, IDS[:, -1]).mean()

    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return loss


def main():
    model = Qwen3(CONFIG, rngs=nnx.Rngs(0))
    config = LoRAPlusConfig(target_modules=["q_proj", "v_proj", "o_proj"], rank=4, lr_ratio=8.0)
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    tx = lora_plus_adamw(3e-3, lr_ratio=config.lr_ratio, specs=specs)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    before, *_, after = (float(step(model, optimizer)) for _ in range(50))
    print(f"loss {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
