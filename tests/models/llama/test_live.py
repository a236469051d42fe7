"""The Llama family against transformers, where it and torch are installed: more cases than the golden files."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.models.checkpoints.hf import load_config, load_params
from loraplus_jax.models.decoding.generate import Sampling, make_generate
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama, name_table

from ...marks import every

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
GEMMA = {
    "head_dim": 24,
    "num_hidden_layers": 5,
    "sliding_window": 40,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 16,
}
CASES = {
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
    "dynamic": (
        "llama",
        {"rope": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}, "max_position_embeddings": 20},
    ),
    "linear_qwen3": (
        "qwen3",
        {"rope": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}, "head_dim": 20},
    ),
    "window_that_llama_does_not_know": ("llama", {"sliding_window": 4}),
    "window_of_one": ("mistral", {"sliding_window": 1}),
    "window_of_two_tied": ("mistral", {"sliding_window": 2, "tie_word_embeddings": True}),
    "qwen2_windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen2_windows_above": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3_windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3_windows_in_some_layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "gemma2_one_key_head": (
        "gemma2",
        GEMMA | {"num_key_value_heads": 1, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "gemma2_without_bounds": (
        "gemma2",
        GEMMA | {"attention_bias": True, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", GEMMA | {"rope": {"full_attention": {"rope_theta": 1e6}}}),
    "gemma3_untied": (
        "gemma3_text",
        GEMMA
        | {
            "tie_word_embeddings": False,
            "final_logit_softcapping": 5.0,
            "num_key_value_heads": 4,
            "sliding_window_pattern": 2,
            "rope": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
        },
    ),
    "phi3_partial": (
        "phi3",
        {"num_key_value_heads": 1, "rope": {"partial_rotary_factor": 0.5}, "sliding_window": 70},
    ),
    "phi3_beyond_its_context": (
        "phi3",
        {
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.5],
                "long_factor": [1.5, 3.0, 7.0, 11.0],
                "original_max_position_embeddings": 64,
            },
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen3_biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
}


def golden_maker():
    path = Path(__file__).parents[2] / "golden" / "make_llama.py"
    spec = importlib.util.spec_from_file_location("make_llama", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = golden_maker()


def both(case, folder, seed=1, **fields):
    """The reference model, and ours and its parameters as loaded from the several shards that it saved."""
    reference = maker.make(*case, seed=seed)
    reference.save_pretrained(folder, max_shard_size="20KB")
    model = Llama(LlamaConfig.from_hf(load_config(folder)), **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]
    return reference, model, load_params(folder, name_table(model.config), shapes)


def batch():
    """Rows (8, 150) of four lengths, padded on the right and then on the left."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, maker.TINY["vocab_size"], n).astype(np.int32) for n in (33, 150, 1, 17)]
    return np.concatenate([maker.padded(rows), maker.padded(rows, left=True)])


# Of each kind of check a third of the models in turn.
@pytest.mark.parametrize("name", every(3, CASES))
def test_logits_equal_transformers(name, tmp_path):
    reference, model, params = both(CASES[name], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = batch()
    mask = (ids != 0).astype(np.int32)
    wanted = maker.logits64(reference, ids)
    print(f"{name}: transformers' float32 is off by {maker.error(maker.logits(reference, ids), wanted):.1e}")
    for attention in ("xla", "blocked"):
        given = jax.jit(model.clone(attention=attention).apply)({"params": params}, ids, mask)
        off = maker.error(np.where(mask[:, :, None], given, 0), wanted)
        print(f"{name}: {attention} is off by {off:.1e}")
        assert off <= 1e-4


@pytest.mark.parametrize("name", every(3, maker.CASES, 1))
def test_gradients_equal_torch(name, tmp_path):
    reference, model, params = both(maker.CASES[name], tmp_path)
    ids = maker.inputs()["long"]
    given = torch.from_numpy(ids).long()
    reference(given, labels=given, use_cache=False).loss.backward()
    wanted = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}

    def loss(params):
        scores = jax.nn.log_softmax(model.apply({"params": params}, ids)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1))

    gradient = jax.jit(jax.grad(loss))(params)
    table = name_table(model.config)
    rules = {rule.name: rule for rule in table.rules}
    for key, expected in wanted.items():
        name, layer = table.canonical(key), None
        if name not in rules:
            _, layer, rest = name.split(".", 2)
            name = f"layers.{{layer}}.{rest}"
        leaf = gradient
        for part in rules[name].path.split("/"):
            leaf = leaf[part]
        leaf = leaf if layer is None else leaf[int(layer)]
        assert maker.error(leaf.T if rules[name].transposed else leaf, expected) <= 1e-4, key


@pytest.mark.parametrize("name", every(len(CASES), CASES, 2))
def test_generated_continuations_equal_transformers(name, tmp_path):
    reference, model, params = both(CASES[name], tmp_path, seed=2)
    prompts, new_tokens = maker.inputs()["prompts"], 24
    generate = make_generate(model, model.config, new_tokens=new_tokens, stop=())
    segments = (prompts != 0).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), len(prompts))
    given = generate({"params": params}, prompts, segments, Sampling(), keys)
    # transformers' cache keeps all tokens for a window of one (it slices from -0), and because it reads
    # config.sliding_window it drops tokens of a Llama, whose attention has no window: compare without a cache.
    uncached = name in ("window_of_one", "window_that_llama_does_not_know")
    options = {"use_cache": False} if uncached else {}
    np.testing.assert_array_equal(given, maker.greedy(reference, prompts, new_tokens, **options))


def test_bf16_is_as_near_as_transformers_bf16(tmp_path):
    reference, model, params = both(maker.CASES["llama3"], tmp_path, dtype=jnp.bfloat16)
    ids = maker.inputs()["long"]
    wanted = maker.logits64(reference, ids)
    given = maker.error(np.asarray(jax.jit(model.apply)({"params": params}, ids)), wanted)
    with torch.no_grad():
        low = reference.bfloat16()(torch.from_numpy(ids).long(), use_cache=False).logits.float().numpy()
    print(f"bfloat16: {given:.1e}, transformers {maker.error(low, wanted):.1e}")
    assert given <= 2 * maker.error(low, wanted)
