"""Writes llama_*.npz, one for each family of `CASES`, with transformers as the reference.

    pip install torch transformers safetensors numpy
    python tests/golden/make_llama.py

A file holds the config, the weights as `save_pretrained` names them (rounded to bfloat16, so that they take half
the space), the inputs, the logits of each input in float32 and in float64, and greedy continuations. The float64
logits are stored rounded to float32, which costs 6e-8 of each. Made with torch 2.13.0 and transformers 5.24.0.
"""

import contextlib
import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ORIGINAL = 16
"""The context that the tiny models were "trained" on; the long input is longer."""
LENGTHS, LONG, PROMPTS, NEW_TOKENS = (12, 7, 3), 26, (9, 4, 1), 12

TINY = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 128}
TINY |= {"rms_norm_eps": 1e-5, "initializer_range": 0.3, "tie_word_embeddings": False}
TINY |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
# theta is small where rope is scaled, so that the few frequencies of a small head fall on all sides of each bound.
_SHORT = {"original_max_position_embeddings": ORIGINAL}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.1, "rope_theta": 100.0}
_LONG = {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75}
_LONG |= {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 5.0, 9.0]}
_FULL = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e3}
_SLIDING = {"rope_type": "default", "rope_theta": 30.0}
# Bounds so low that scores and logits reach them.
_GEMMA = {"head_dim": 12, "sliding_window": 5, "tie_word_embeddings": True, "query_pre_attn_scalar": 9}
_GEMMA2 = {"num_hidden_layers": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_GEMMA3 = {"num_hidden_layers": 4, "sliding_window_pattern": 3}
_GEMMA3 |= {"rope": {"full_attention": _FULL, "sliding_attention": _SLIDING}}
_OLMO3 = {
    "full_attention": _YARN | _SHORT,
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 4, "max_position_embeddings": ORIGINAL}),
    "llama3": ("llama", {"rope": _LLAMA3 | {"rope_theta": 10.0} | _SHORT}),
    "linear": ("llama", {"rope": {"rope_type": "linear", "factor": 2.5, "rope_theta": 100.0}}),
    "yarn": ("llama", {"rope": _YARN | _SHORT, "max_position_embeddings": 4 * ORIGINAL}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope": {"rope_theta": 1e5}}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral_full": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {"rope": {"rope_theta": 1e6}}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 4}),
    "qwen3": ("qwen3", {"head_dim": 12, "rope": {"rope_theta": 1e6}}),
    "gemma2": ("gemma2", _GEMMA | _GEMMA2),
    "gemma3": ("gemma3_text", _GEMMA | _GEMMA3),
    "olmo2": ("olmo2", {"rope": {"rope_theta": 5e5}}),
    "olmo3": ("olmo3", {"num_hidden_layers": 4, "sliding_window": 5, "rope": _OLMO3}),
    "smollm3": (
        "smollm3",
        {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "rope": {"rope_theta": 1e3}},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": 5}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3_long": ("phi3", {"rope": _LONG | _SHORT, "max_position_embeddings": 4 * ORIGINAL} | _SHORT),
}
# transformers keeps cached keys as an earlier, shorter context rotated them; within the context all agree.
SHORT = {"phi3_long": ORIGINAL - max(PROMPTS)}


def main() -> None:
    for name in sys.argv[1:] or CASES:
        write(f"llama_{name}", make(*CASES[name]), greedy_tokens=SHORT.get(name, NEW_TOKENS))


def write(name, model, *, greedy_tokens=NEW_TOKENS):
    """The golden file of a model."""
    config, weights = saved(model)
    weights = {f"weights/{key}": value for key, value in weights.items()}
    outputs = reference(model, greedy_tokens=greedy_tokens)
    for key in ("right", "left", "long"):
        off = error(outputs[f"float32/{key}"], outputs[f"float64/{key}"])
        print(f"{name} {key}: float32 is off by {off:.1e}")
    np.savez_compressed(HERE / f"{name}.npz", config=json.dumps(config), **inputs(), **outputs, **weights)


def reference(model, *, greedy_tokens):
    """All outputs by name, as they stand in the file."""
    outputs = {"greedy": greedy(model, inputs()["prompts"], greedy_tokens)}
    for key in ("right", "left", "long"):
        outputs[f"float32/{key}"] = logits(model, inputs()[key])
        outputs[f"float64/{key}"] = logits64(model, inputs()[key])
    left, right = outputs["float64/left"], outputs["float64/right"]
    for i, n in enumerate(LENGTHS):  # so precise only where all of it is float64
        assert error(left[i, -n:], right[i, :n]) < 1e-13
    return {key: value if key == "greedy" else value.astype(np.float32) for key, value in outputs.items()}


def make(model_type, changes, seed=0):
    """A model with random weights, in which biases and norms show in the outputs too."""
    import transformers as tf

    changes = dict(changes)
    rope = changes.pop("rope", {})
    if "full_attention" not in rope:
        rope = {"rope_type": "default", "rope_theta": 10000.0} | rope
    return randomized(
        tf.AutoConfig.for_model(model_type, **(TINY | {"rope_parameters": rope} | changes)), seed
    )


def randomized(config, seed):
    """A model in bfloat16 values, with noise on its biases and norms."""
    import torch
    import transformers as tf

    torch.manual_seed(seed)
    config._experts_implementation = "eager"  # the others know no float64
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
            parameter.copy_(parameter.bfloat16().float())
    return model.eval()


def inputs():
    """Ids, 0 at padding: "right" and "left" pad the same rows, "long" has none, "prompts" are to be continued."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, TINY["vocab_size"], n) for n in LENGTHS]
    prompts = [rng.integers(1, TINY["vocab_size"], n) for n in PROMPTS]
    long = rng.integers(1, TINY["vocab_size"], (1, LONG)).astype(np.int32)
    return {
        "right": padded(rows),
        "left": padded(rows, left=True),
        "long": long,
        "prompts": padded(prompts, left=True),
    }


def padded(rows, *, left=False):
    width = max(len(row) for row in rows)
    pads = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
    return np.stack([np.pad(row, pad) for row, pad in zip(rows, pads, strict=True)]).astype(np.int32)


def logits(model, ids):
    """Logits (B, T, V), zero at padding, with the positions that `generate` gives the tokens."""
    import torch

    mask = ids != 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    fresh = copy.deepcopy(model)  # longrope remembers the longest input that it saw
    with torch.no_grad():
        out = fresh(**{key: torch.from_numpy(value).long() for key, value in given.items()}, use_cache=False)
    return np.where(mask[:, :, None], out.logits.numpy(), 0)


def logits64(model, ids):
    """As `logits`, all of it in float64."""
    with in_float64():
        precise = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")
        precise.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
        return logits(precise.eval(), ids)


def greedy(model, ids, new_tokens, **options):
    """The ids (B, new_tokens) with which `generate` goes on from left-padded prompts."""
    import torch

    prompts = torch.from_numpy(ids).long()
    out = copy.deepcopy(model).generate(
        prompts, attention_mask=(prompts != 0).long(), max_new_tokens=new_tokens, do_sample=False, **options
    )
    return out[:, ids.shape[1] :].numpy().astype(np.int32)


def saved(model):
    """Config and weights as they stand in a saved directory."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        return config, load_file(Path(folder) / "model.safetensors")


@contextlib.contextmanager
def in_float64():
    """Float64 also where transformers computes in float32 whatever the model's dtype: norms and rotary angles."""
    import torch

    patches = ((torch, "float32"), (torch, "float"), (torch.Tensor, "float"))
    before = [getattr(owner, name) for owner, name in patches]
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        for (owner, name), value in zip(patches, before, strict=True):
            setattr(owner, name, value)
        torch.set_default_dtype(torch.float32)


def error(given, wanted):
    """The largest difference, relative to the largest value."""
    return np.abs(given - wanted).max() / np.abs(wanted).max()


if __name__ == "__main__":
    main()
