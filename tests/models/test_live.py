"""The families against transformers, where it and torch are installed: more cases than the golden files."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.models.families import family_of

from ..marks import every
from .golden import load, maker

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 8.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}
LONG = {
    "rope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.5],
        "long_factor": [1.5, 3.0, 7.0, 11.0],
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 64,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5}
GEMMA = {"head_dim": 24, "num_hidden_layers": 5, "sliding_window": 40, "query_pre_attn_scalar": 16}
GEMMA |= {"tie_word_embeddings": True}
PARTIAL = {"rope": {"partial_rotary_factor": 0.5}}
UNTIED = {
    "final_logit_softcapping": 5.0,
    "tie_word_embeddings": False,
    "num_key_value_heads": 4,
    "sliding_window_pattern": 2,
}


def bounds(attention, final):
    return {"attn_logit_softcapping": attention, "final_logit_softcapping": final}


LLAMAS = {
    "as_llama_3.1": ("llama", {"head_dim": 64, "rope": LLAMA31, "max_position_embeddings": 131072}),
    "one_key_head": ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 5}),
    "wide_heads": ("llama", {"head_dim": 24}),
    "attention_bias_alone": ("llama", {"attention_bias": True}),
    "mlp_bias_alone": ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
    "large_epsilon": ("llama", {"rms_norm_eps": 1e-2}),
    "yarn": ("llama", {"head_dim": 64, "rope": YARN | {"factor": 4.0}, "max_position_embeddings": 256}),
    "yarn_temperature": ("qwen2", {"head_dim": 64, "rope": YARN | {"factor": 4.0, "attention_factor": 0.7}}),
    "yarn_by_mscale": ("llama", {"rope": YARN | {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "yarn_not_truncated": ("qwen3", {"rope": YARN | {"factor": 8.0, "truncate": False}}),
    "dynamic": ("llama", {"rope": DYNAMIC, "max_position_embeddings": 20}),
    "linear_qwen3": ("qwen3", {"rope": LINEAR | {"factor": 3.0, "rope_theta": 1e4}, "head_dim": 20}),
    "window_that_llama_does_not_know": ("llama", {"sliding_window": 4}),
    "window_of_one": ("mistral", {"sliding_window": 1}),
    "window_of_two_tied": ("mistral", {"sliding_window": 2, "tie_word_embeddings": True}),
    "qwen2_windows": ("qwen2", WINDOWS | {"max_window_layers": 0}),
    "qwen2_windows_above": ("qwen2", WINDOWS | {"max_window_layers": 2}),
    "qwen3_windows": ("qwen3", WINDOWS | {"max_window_layers": 0}),
    "qwen3_windows_in_some_layers": ("qwen3", WINDOWS | {"max_window_layers": 1, "num_hidden_layers": 3}),
    "gemma2_one_key_head": ("gemma2", GEMMA | bounds(1.5, 2.0) | {"num_key_value_heads": 1}),
    "gemma2_without_bounds": ("gemma2", GEMMA | bounds(None, None) | {"attention_bias": True}),
    "gemma3": ("gemma3_text", GEMMA | {"rope": {"full_attention": {"rope_theta": 1e6}}}),
    "gemma3_untied": (
        "gemma3_text",
        GEMMA | UNTIED | {"rope": {"full_attention": {"rope_theta": 1e6} | LINEAR}},
    ),
    "phi3_partial": ("phi3", PARTIAL | {"num_key_value_heads": 1, "sliding_window": 70}),
    "phi3_beyond_its_context": ("phi3", LONG | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3_biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
}
GPT2S = {
    "deep": {"n_layer": 6, "n_embd": 48, "n_head": 12, "scale_attn_by_inverse_layer_idx": True},
    "one_head_tanh": {"n_head": 1, "activation_function": "tanh", "n_inner": 72},
    "silu_unscaled": {"activation_function": "silu", "scale_attn_weights": False},
    "quick_gelu": {"activation_function": "quick_gelu", "tie_word_embeddings": False},
    "gelu_fast": {"activation_function": "gelu_fast", "reorder_and_upcast_attn": True},
    "swish": {"activation_function": "swish", "layer_norm_epsilon": 1e-2},
}


llama, gpt2 = maker("llama"), maker("gpt2")
CASES = {
    **{name: lambda seed, case=case: llama.make(*case, seed=seed) for name, case in LLAMAS.items()},
    **{
        f"gpt2_{name}": lambda seed, case=case: gpt2.make({"n_positions": 160} | case, seed=seed)
        for name, case in GPT2S.items()
    },
}
# The cases of the golden files have every option of Llama's.
FOR_GRADIENTS = {name: make for name, make in CASES.items() if name.startswith("gpt2_")} | {
    name: lambda seed, case=case: llama.make(*case, seed=seed) for name, case in llama.CASES.items()
}


def both(make, folder, seed=1, **fields):
    """The reference model, and ours and its parameters as loaded from the several shards that it saved."""
    reference = make(seed)
    reference.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return reference, *load(folder, **fields)


def batch():
    """Rows (8, 150) of four lengths, padded on the right and then on the left."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, llama.TINY["vocab_size"], n).astype(np.int32) for n in (33, 150, 1, 17)]
    return np.concatenate([llama.padded(rows), llama.padded(rows, left=True)])


# Of each kind of check a third of the models in turn.
@pytest.mark.parametrize("name", every(3, CASES))
def test_logits_equal_transformers(name, tmp_path):
    reference, model, params = both(CASES[name], tmp_path)
    ids = batch()
    mask = (ids != 0).astype(np.int32)
    if name == "phi3_beyond_its_context":  # transformers chooses the factors for a whole batch
        wanted = np.concatenate([llama.logits64(reference, row[None]) for row in ids])
    else:
        wanted = llama.logits64(reference, ids)
    for attention in ("xla", "blocked"):
        given = jax.jit(model.clone(attention=attention).apply)({"params": params}, ids, mask)
        assert llama.error(np.where(mask[:, :, None], given, 0), wanted) <= 1e-4, attention


@pytest.mark.parametrize("name", every(3, FOR_GRADIENTS, 1))
def test_gradients_equal_torch(name, tmp_path):
    reference, model, params = both(FOR_GRADIENTS[name], tmp_path)
    ids = llama.inputs()["long"]
    given = torch.from_numpy(ids).long()
    reference(given, labels=given, use_cache=False).loss.backward()

    def loss(params):
        scores = jax.nn.log_softmax(model.apply({"params": params}, ids)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1))

    gradient = jax.jit(jax.grad(loss))(params)
    table = family_of(model.config.model_type).name_table(model.config)
    rules = {rule.name: rule for rule in table.rules}
    for key, parameter in reference.named_parameters():
        name = table.canonical(key)
        stacked = re.sub(r"\.(\d+)\.", ".{layer}.", name, count=1)
        rule = rules.get(name) or rules[stacked]
        leaf = functools.reduce(lambda tree, part: tree[part], rule.path.split("/"), gradient)
        leaf = leaf[int(re.search(r"\d+", name)[0])] if rule.name == stacked != name else leaf
        expected = parameter.grad.numpy()
        assert llama.error(leaf.T if rule.transposed else leaf, expected) <= 1e-4, key


def test_bf16_is_as_near_as_transformers_bf16(tmp_path):
    make = FOR_GRADIENTS["llama3"]
    reference, model, params = both(make, tmp_path, dtype=jnp.bfloat16)
    ids = llama.inputs()["long"]
    wanted = llama.logits64(reference, ids)
    given = llama.error(np.asarray(jax.jit(model.apply)({"params": params}, ids)), wanted)
    with torch.no_grad():
        low = reference.bfloat16()(torch.from_numpy(ids).long(), use_cache=False).logits.float().numpy()
    assert given <= 2 * llama.error(low, wanted)
