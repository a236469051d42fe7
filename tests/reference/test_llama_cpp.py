"""GGUF adapters in llama.cpp itself, by the package llama-cpp-python, give the logits of the adapters here."""

import json

import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
from loraplus_jax.inference.gguf_adapter import save_gguf_adapter
from loraplus_jax.interop.peft_files import save_peft
from loraplus_jax.models.checkpoints import transformers_class
from loraplus_jax.models.families import family_of
from loraplus_jax.models.files import open_files

from ..integration import language_world
from ..integration.gpt2_world import PRODUCTS, write_gpt2
from ..models.checkpoints.gguf.files import gguf_of
from ..models.golden import IDS, load, run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TOKENS = np.array([[5, 9, 30, 77, 120, 200, 240, 41, 17, 3]], np.int32)


def base(folder, name):
    """A model as a directory and as a GGUF file."""
    folder.mkdir()
    gguf = folder.with_suffix(".gguf")
    if name == "gpt2":
        write_gpt2(folder)
        end = json.loads((folder / "config.json").read_text())["eos_token_id"]
        gguf_of(folder, gguf, **language_world.gguf_tokenizer(end, end))
    else:
        language_world.write_model(folder)
        language_world.write_gguf_of(folder, gguf)
    return gguf


def theirs(model, adapter=None):
    # Keys and values in float32, as here.
    precise = {"type_k": 0, "type_v": 0, "flash_attn": False, "logits_all": True}
    path = None if adapter is None else str(adapter)
    llm = llama_cpp.Llama(str(model), lora_path=path, n_ctx=64, n_threads=1, verbose=False, **precise)
    llm.eval(TOKENS[0].tolist())
    return np.array(llm.scores[: TOKENS.shape[1]])


@pytest.mark.parametrize(
    ("name", "fields", "limit"),
    [
        ("llama", {"target_modules": (*language_world.PRODUCTS, "embed_tokens", "lm_head")}, 1e-5),
        ("llama", {"target_modules": language_world.PRODUCTS, "use_rslora": True}, 1e-5),
        (
            "llama",
            {
                "target_modules": language_world.PRODUCTS,
                "rank_pattern": {".*/q_proj": 2},
                "alpha_pattern": {".*/v_proj": 3.0},
            },
            1e-5,
        ),
        ("gpt2", {"target_modules": PRODUCTS}, 1e-3),  # llama.cpp looks GELU up in a table of float16
    ],
)
def test_an_adapter_has_our_logits_in_llama_cpp(name, fields, limit, tmp_path):
    folder = tmp_path / name
    gguf = base(folder, name)
    model, params = load(folder)
    config = LoRAPlusConfig(rank=4, alpha=8.0, **fields)
    adapted = apply_lora_plus(model, config)
    lora, specs = init_lora(adapted, jax.random.key(0), IDS, base={"params": params})
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), lora)
    table = family_of(model.config.model_type).name_table(model.config)
    path_map = transformers_class.path_map(table, transformers_class.causal_lm_class(model.config))
    save_peft(tmp_path / "peft", lora, specs, config, path_map)
    save_gguf_adapter(tmp_path / "adapter.gguf", tmp_path / "peft", open_files(folder), dtype="float32")
    without = run(model, {"params": params}, TOKENS)[0]
    ours = run(adapted, {"params": params, "lora": lora}, TOKENS)[0]
    largest = np.abs(ours).max()
    assert np.abs(without - ours).max() > 0.1 * largest
    assert np.abs(theirs(gguf) - without).max() <= limit * largest
    assert np.abs(theirs(gguf, tmp_path / "adapter.gguf") - ours).max() <= limit * largest
