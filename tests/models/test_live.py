"""The families against transformers, where it and torch are installed: more cases than the golden files."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.models.families import family_of

from .golden import load, maker

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 8.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.5, 3.0, 7.0, 11.0]}
ORIGINAL = {"original_max_position_embeddings": 64}
GEMMA = {"head_dim": 24, "sliding_window": 40, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
UNTIED = {"final_logit_softcapping": 5.0, "tie_word_embeddings": False, "sliding_window_pattern": 2}
TIED = {"tie_word_embeddings": True}
# Each has several options that no golden file has.
LLAMAS = {
    "as_llama_3.1": ("llama", {"head_dim": 64, "rope": LLAMA31, "max_position_embeddings": 131072}),
    "mlp_bias_and_yarn": (
        "llama",
        {"mlp_bias": True, "rms_norm_eps": 1e-2, "sliding_window": 4}  # a window that Llama does not know
        | {"rope": YARN | {"factor": 8.0}}
        | TIED,
    ),
    "qwen2_yarn_temperature": ("qwen2", {"rope": YARN | {"factor": 4.0, "attention_factor": 0.7}}),
    "qwen3_yarn_and_biases": (
        "qwen3",
        {"rope": YARN | {"factor": 8.0}, "attention_bias": True, "num_hidden_layers": 3} | TIED,
    ),
    "gemma2_one_key_head": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": 1.5, "num_key_value_heads": 1, "num_hidden_layers": 5},
    ),
    "gemma2_without_bounds": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma3_untied": (
        "gemma3_text",
        GEMMA | UNTIED | {"rope": {"full_attention": {"rope_theta": 1e6} | LINEAR}},
    ),
    "olmo2_one_key_head": ("olmo2", {"num_key_value_heads": 1, "attention_bias": True} | TIED),
    "olmo3_window": ("olmo3", {"num_hidden_layers": 5, "sliding_window": 40}),
    "smollm3_every_fourth": ("smollm3", {"num_hidden_layers": 5, "mlp_bias": True, "rope": LLAMA31}),
    "qwen3_moe_most_experts": (
        "qwen3_moe",
        {"num_experts": 5, "num_experts_per_tok": 4, "moe_intermediate_size": 20, "norm_topk_prob": True}
        | TIED,
    ),
    "mixtral_and_yarn": (
        "mixtral",
        {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 8, "rope": YARN | {"factor": 8.0}},
    ),
    "phi3_partial": (
        "phi3",
        {"rope": {"partial_rotary_factor": 0.5}, "num_key_value_heads": 1, "sliding_window": 70},
    ),
    "phi3_beyond_its_context": (
        "phi3",
        {"rope": LONG | ORIGINAL, "max_position_embeddings": 512, "num_key_value_heads": 4} | ORIGINAL | TIED,
    ),
}
GPT2 = {"n_positions": 160, "activation_function": "quick_gelu", "tie_word_embeddings": False}


llama, gpt2 = maker("llama"), maker("gpt2")
CASES = {
    **{name: lambda seed, case=case: llama.make(*case, seed=seed) for name, case in LLAMAS.items()},
    "gpt2_quick_gelu": lambda seed: gpt2.make(GPT2, seed=seed),
}
FOR_GRADIENTS = ("mlp_bias_and_yarn", "gemma2_one_key_head", "gpt2_quick_gelu")
FOR_GRADIENTS += ("olmo2_one_key_head", "olmo3_window", "smollm3_every_fourth")
FOR_GRADIENTS += ("qwen3_moe_most_experts", "mixtral_and_yarn")


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


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name, tmp_path):
    reference, model, params = both(CASES[name], tmp_path)
    ids = batch()
    mask = (ids != 0).astype(np.int32)
    if name == "phi3_beyond_its_context":  # transformers chooses the factors for a whole batch
        wanted = np.concatenate([llama.logits64(reference, row[None]) for row in ids])
    else:
        wanted = llama.logits64(reference, ids)
    given = jax.jit(model.clone(attention="blocked").apply)({"params": params}, ids, mask)
    assert llama.error(np.where(mask[:, :, None], given, 0), wanted) <= 1e-4
    if name in FOR_GRADIENTS:
        check_gradients(reference.float(), model, params)


def check_gradients(reference, model, params):
    """Every parameter's is PyTorch's."""
    ids = llama.inputs()["long"]
    given = torch.from_numpy(ids).long()
    reference(given, labels=given, use_cache=False).loss.backward()

    def loss(params):
        scores = jax.nn.log_softmax(model.apply({"params": params}, ids)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1))

    gradient = jax.jit(jax.grad(loss))(params)
    table = family_of(model.config.model_type).name_table(model.config)
    rules = {rule.parameter or rule.name: rule for rule in table.rules}
    for key, parameter in reference.named_parameters():
        name = table.canonical(key)
        stacked = re.sub(r"\.(\d+)\.", ".{layer}.", name, count=1)
        rule = rules.get(name) or rules[stacked]
        leaf = functools.reduce(lambda tree, part: tree[part], rule.path.split("/"), gradient)
        leaf = (
            leaf[int(re.search(r"\d+", name)[0])] if rules.get(stacked) is rule and stacked != name else leaf
        )
        expected = parameter.grad.numpy()
        assert llama.error(leaf.swapaxes(-1, -2) if rule.transposed else leaf, expected) <= 1e-4, key
