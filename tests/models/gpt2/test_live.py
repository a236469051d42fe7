"""GPT-2 against transformers, where it and torch are installed: other shapes and options than the golden files."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.models.decoding.generate import Sampling, make_generate

from ...marks import every
from ..llama.test_live import maker
from .test_model import load

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CASES = {
    "deep": {"n_layer": 6, "n_embd": 48, "n_head": 12, "scale_attn_by_inverse_layer_idx": True},
    "one_head_tanh": {"n_head": 1, "activation_function": "tanh", "n_inner": 72},
    "silu_unscaled": {"activation_function": "silu", "scale_attn_weights": False},
    "quick_gelu": {"activation_function": "quick_gelu", "tie_word_embeddings": False},
    "gelu_fast": {"activation_function": "gelu_fast", "reorder_and_upcast_attn": True},
    "swish": {"activation_function": "swish", "layer_norm_epsilon": 1e-2},
}


def golden_maker():
    path = Path(__file__).parents[2] / "golden" / "make_gpt2.py"
    spec = importlib.util.spec_from_file_location("make_gpt2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both(case, folder, seed=1):
    """The reference model, and ours and its parameters as loaded from the several shards that it saved."""
    reference = golden_maker().make({"n_positions": 160} | case, seed=seed)
    reference.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return reference, *load(folder)


def batch():
    """Rows (8, 150) of four lengths, padded on the right and then on the left."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, 96, n).astype(np.int32) for n in (33, 150, 1, 17)]
    return np.concatenate([maker.padded(rows), maker.padded(rows, left=True)])


@pytest.mark.parametrize("name", every(2, CASES))
def test_logits_equal_transformers(name, tmp_path):
    reference, model, params = both(CASES[name], tmp_path)
    ids = batch()
    mask = (ids != 0).astype(np.int32)
    wanted = maker.logits64(reference, ids)
    for attention in ("xla", "blocked"):
        given = jax.jit(model.clone(attention=attention).apply)({"params": params}, ids, mask)
        assert maker.error(np.where(mask[:, :, None], given, 0), wanted) <= 1e-4, attention


@pytest.mark.parametrize("name", every(3, CASES, 1))
def test_gradients_equal_torch(name, tmp_path):
    reference, model, params = both(CASES[name], tmp_path)
    ids = maker.inputs()["long"]
    given = torch.from_numpy(ids).long()
    reference(given, labels=given, use_cache=False).loss.backward()

    def loss(params):
        logits: Any = model.apply({"params": params}, ids)
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1))

    gradient = jax.jit(jax.grad(loss))(params)
    for part, name in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
        for leaf, theirs in (("kernel", "weight"), ("bias", "bias")):
            layers = [getattr(getattr(layer, part), name) for layer in reference.transformer.h]
            expected = np.stack([layer.get_parameter(theirs).grad for layer in layers])
            assert maker.error(gradient["layers"][part][name][leaf], expected) <= 1e-4, (part, name, leaf)
    for ours, theirs in (("embed_tokens", "wte"), ("embed_positions", "wpe")):
        expected = getattr(reference.transformer, theirs).weight.grad.numpy()
        assert maker.error(gradient[ours]["embedding"], expected) <= 1e-4, ours


@pytest.mark.parametrize("name", every(3, CASES, 2))
def test_generated_continuations_equal_transformers(name, tmp_path):
    reference, model, params = both(CASES[name], tmp_path, seed=2)
    prompts, new_tokens = maker.inputs()["prompts"], 24
    generate = make_generate(model, model.config, new_tokens=new_tokens, stop=())
    keys = jax.random.split(jax.random.key(0), len(prompts))
    given = generate({"params": params}, prompts, (prompts != 0).astype(np.int32), Sampling(), keys)
    np.testing.assert_array_equal(given, maker.greedy(reference, prompts, new_tokens))
