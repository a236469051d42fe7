"""LoRA+ on gemma's own adapters in kauldron's trainer, and a PEFT directory: python examples/09_gemma.py"""

import tempfile

import numpy as np
from gemma import gm
from kauldron import kd

from loraplus_jax import lora_plus_adamw, save_peft
from loraplus_jax.interop import GEMMA
from loraplus_jax.nnx import specs_of

SIZES = {"num_embed": 16, "embed_dim": 256, "hidden_dim": 64, "num_heads": 4, "head_dim": 8}
LAYERS = {"num_kv_heads": 1, "attention_types": [gm.nn.AttentionType.GLOBAL] * 2}
GEMMA_3 = {"use_post_attn_norm": True, "use_post_ffw_norm": True, "use_qk_norm": True}
ROWS = np.arange(8)[:, None] + np.arange(9)
BATCH = {"tokens": ROWS[:, :-1], "next": ROWS[:, 1:, None]}


def main():
    config = gm.nn.config.TransformerConfig(**SIZES, **LAYERS, **GEMMA_3, final_logit_softcap=None)
    model = gm.nn.LoRA(rank=4, model=gm.nn.Transformer(config=config, tokens="batch.tokens"))
    tx = kd.optim.partial_updates(lora_plus_adamw(1e-2, lr_ratio=8.0), mask=kd.optim.select("lora"))
    data = kd.data.InMemoryPipeline(loader=lambda: BATCH, batch_size=8)
    loss = kd.losses.SoftmaxCrossEntropyWithIntLabels(logits="preds.logits", labels="batch.next")
    with tempfile.TemporaryDirectory() as directory:
        run = {"workdir": directory, "writer": None, "num_train_steps": 50}
        trainer = kd.train.Trainer(
            model=model, optimizer=tx, train_ds=data, train_losses={"next": loss}, **run
        )
        first, (last, _) = trainer.init_state(), trainer.train()
        save_peft(f"{directory}/peft", *specs_of(last.params, scale=1.0), GEMMA)
    logits = [model.apply({"params": state.params}, BATCH["tokens"]).logits for state in (first, last)]
    before, after = (float(loss.get_values(x, BATCH["next"]).mean()) for x in logits)
    print(f"loss {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
