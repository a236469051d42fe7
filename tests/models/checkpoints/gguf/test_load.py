"""GGUF files: every quantisation, names and order of the rows, config, and what is wrong with a file."""

import dataclasses
import json
import re
import sys

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplus_jax.models.checkpoints.gguf import load as gguf
from loraplus_jax.models.checkpoints.gguf.header import read
from loraplus_jax.models.checkpoints.params import check_params, load_params
from loraplus_jax.models.files import open_files
from loraplus_jax.models.gpt2.config import GPT2Config
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama, name_table

from ....messages import assert_mentions, mentions
from ....refusals import refusals
from ...golden import IDS, write_golden
from ...golden import load as load_golden
from .files import HEADS, KEY_HEADS, KINDS, gguf_of, metadata, tensors, write


def model(path, **changes):
    config = LlamaConfig.from_hf(open_files(path).config | changes)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return name_table(config), shapes


# Where a block's halves stand.
HALVES = {"F16": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("dtype", gguf.DTYPES)
def test_every_type_is_read_whole_and_in_parts(tmp_path, dtype):
    """What a block means is proved by `quantization/test_formats.py`, of the package's reader and of ours."""
    values, size = package.GGML_QUANT_SIZES[KINDS[dtype]]
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (3, 512 // values, size), np.uint8)
    for at in HALVES.get(dtype, ()):
        blocks[..., at : at + 2] = rng.normal(size=(*blocks.shape[:2], 1)).astype("<f2").view("u1")
    if dtype in ("F32", "BF16"):  # no infinities
        blocks[..., -1] &= 0xBF
    data = blocks.reshape(3, -1)
    path = write(tmp_path / "m.gguf", {"x": data}, dtypes={"x": dtype})
    view = gguf.views(read(path))["x"]
    assert (view.get_shape(), view.get_dtype(), view[:].dtype) == ([3, 512], dtype, np.float32)
    np.testing.assert_array_equal(view[:], package.quants.dequantize(data, KINDS[dtype]))
    np.testing.assert_array_equal(view[1:2], view[:][1:2])
    for columns in (slice(3, 9), slice(31, 300), slice(256, 512)):
        np.testing.assert_array_equal(view[1:3, columns], view[:][1:3, columns])


def interleaved(rows, heads):
    """The order of llama.cpp's converter, by its definition: the pair (j, j + half) of a head stands together."""
    size = len(rows) // heads
    return np.stack(
        [rows[h * size + i % 2 * (size // 2) + i // 2] for h in range(heads) for i in range(size)]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "options"),
    [("llama", {}), ("llama", {"attention__sliding_window": 32}), ("qwen2", {}), ("qwen3", {})],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)
def test_tensors_arrive_under_hugging_faces_names_and_in_its_order(tmp_path, arch, options):
    content = tensors(head=True, bias=arch == "qwen2", qk_norm=arch == "qwen3")
    stored = dict(content)
    for name in content:
        if arch == "llama" and re.search(r"attn_[qk]\.", name):
            stored[name] = interleaved(content[name], HEADS if "attn_q" in name else KEY_HEADS)
    path = write(tmp_path / "m.gguf", stored, metadata(arch, **options), arch)
    params = load_params(open_files(tmp_path), *model(path))
    layers = params["layers"]
    for layer in range(2):
        expected = {"ffn_norm.weight": layers["post_attention_layernorm"]["scale"]}
        for name, part in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
            expected[f"attn_{name}.weight"] = layers["self_attn"][part]["kernel"]
        for name in ("gate", "up", "down"):
            expected[f"ffn_{name}.weight"] = layers["mlp"][f"{name}_proj"]["kernel"]
        if arch == "qwen2":
            expected["attn_k.bias"] = layers["self_attn"]["k_proj"]["bias"]
        if arch == "qwen3":
            expected["attn_q_norm.weight"] = layers["self_attn"]["q_norm"]["scale"]
        for name, leaf in expected.items():
            np.testing.assert_array_equal(leaf[layer], content[f"blk.{layer}.{name}"].T)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], content["output.weight"].T)
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], content["token_embd.weight"])


def test_biases_of_llamas_queries_and_keys_are_put_in_order_too(tmp_path):
    content = tensors(bias=True)
    stored = content | {"blk.1.attn_q.bias": interleaved(content["blk.1.attn_q.bias"], HEADS)}
    file = read(write(tmp_path / "m.gguf", stored))
    assert gguf.config(file)["attention_bias"] is True
    found = gguf.views(file)["model.layers.1.self_attn.q_proj.bias"][:]
    np.testing.assert_array_equal(found, content["blk.1.attn_q.bias"])


def test_pieces_make_the_same_leaves(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", tensors(head=True))
    whole = load_params(open_files(path), *model(path), param_dtype=jnp.bfloat16)
    monkeypatch.setattr("loraplus_jax.models.checkpoints.params._PIECE", 4 * 64 * 7)
    jax.tree.map(
        np.testing.assert_array_equal,
        whole,
        load_params(open_files(path), *model(path), param_dtype=jnp.bfloat16),
    )


def test_config_is_hugging_faces(tmp_path):
    path = write(tmp_path / "m.gguf", tensors(), metadata() | {"tokenizer.ggml.eos_token_id": 7})
    config = open_files(path).config
    assert config == {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 7,
    }


def test_options_that_some_files_have(tmp_path):
    values = metadata("qwen3", attention__key_length=32, attention__value_length=32, rope__freq_base=None)
    values |= {"qwen3.attention.head_count_kv": 4, "tokenizer.ggml.bos_token_id": 3}
    wider = tensors(head=True) | {"blk.0.attn_q.weight": np.ones((128, 64), np.float32)}
    config = open_files(write(tmp_path / "m.gguf", wider, values, "qwen3")).config
    assert (config["model_type"], config["head_dim"], config["num_key_value_heads"]) == ("qwen3", 32, 4)
    assert (config["rope_theta"], config["bos_token_id"]) == (10_000.0, 3)
    assert config["tie_word_embeddings"] is False
    window = metadata(attention__sliding_window=32, attention__head_count_kv=None)
    config = open_files(write(tmp_path / "m.gguf", tensors(), window)).config
    assert (config["sliding_window"], config["num_key_value_heads"]) == (32, 4)
    assert config["model_type"] == "mistral"


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, None),
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
        (
            {"type": "yarn", "factor": 1.0, "attn_factor": 0.5, "finetuned": True},
            {"rope_type": "yarn", "factor": 1.0, "attention_factor": 0.5},
        ),
    ],
)
def test_rope_scaling(tmp_path, changes, scaling):
    values = metadata(**{f"rope__scaling__{key}": value for key, value in changes.items()})
    assert open_files(write(tmp_path / "m.gguf", tensors(), values)).config.get("rope_scaling") == scaling


def test_rope_factors_are_in_the_config_and_no_weight(tmp_path):
    factors = np.array([1, 1, 1, 1, 2, 4.5, 8, 8], np.float32)
    path = write(tmp_path / "m.gguf", tensors() | {"rope_freqs.weight": factors})
    assert open_files(path).config["rope_scaling"] == {"rope_type": "factors", "factors": factors.tolist()}
    check_params(open_files(path), *model(path))
    path = write(tmp_path / "ones.gguf", tensors() | {"rope_freqs.weight": np.ones(8, np.float32)})
    assert "rope_scaling" not in open_files(path).config


def llama(arch="llama", **changes):
    def call(tmp_path):
        path = write(tmp_path / "m.gguf", tensors(), metadata(arch, **changes), arch)
        check_params(open_files(path), *model(path))

    return call


def gpt2(**changes):
    def call(tmp_path):
        write_golden("gpt2_tied", tmp_path)
        assert open_files(
            gguf_of(tmp_path, tmp_path / "m.gguf", **{f"gpt2.{k}": v for k, v in changes.items()})
        ).config

    return call


YARN = {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0, "rope__scaling__yarn_ext_factor": 1.0}

test_unsupported_options = refusals(
    (
        llama(block_count=None, context_length=None),
        *("m.gguf", "num_hidden_layers", None, "max_position_embeddings"),
    ),
    (llama(attention__head_count=[4, 4]), "m.gguf", "llama.attention.head_count", 2),
    (llama(expert_count=8), "m.gguf", "llama.expert_count", 8, 0),
    (llama(rope__dimension_count=8), "m.gguf", "llama.rope.dimension_count", 8, 16),
    (llama(attention__layer_norm_rms_epsilon=None), "m.gguf", "llama.attention.layer_norm_rms_epsilon"),
    (llama(rope__scaling__type="longrope"), "m.gguf", "type", "'longrope'", "none", "linear", "yarn"),
    (llama(rope__scaling__type="linear"), "m.gguf", "llama.rope.scaling.factor"),
    (llama(**YARN), "m.gguf", "llama.rope.scaling.yarn_ext_factor", "yarn"),
    (llama("phi3"), "m.gguf", "'phi3'", "llama", "qwen2", "qwen3", "gemma2", "olmo2"),
    (llama("olmo2", attention__sliding_window=8), "m.gguf", "olmo2.attention.sliding_window", 8, 0),  # OLMo 3
    (gpt2(**{"attention.layer_norm_epsilon": None}), "gpt2.attention.layer_norm_epsilon", "positive"),
    (gpt2(**{"attention.head_count_kv": 2}), "gpt2.attention.head_count_kv", 2, 4),
    (gpt2(context_length=None), "max_position_embeddings"),
)


def test_every_problem_of_the_tensors_is_listed_at_once(tmp_path):
    content = tensors()
    del content["blk.0.attn_v.weight"]
    content["blk.1.ffn_up.weight"] = np.zeros((95, 64), np.float32)
    content["blk.1.attn_k.weight"] = np.zeros((33, 64), np.float32)
    content["blk.2.ffn_norm.weight"] = np.zeros(64, np.float32)
    content["blk.0.ffn_gate.weight"] = np.zeros((96, 2 * 24), np.uint8)
    path = write(tmp_path / "m.gguf", content, dtypes={"blk.0.ffn_gate.weight": "Q5_1"})
    with pytest.raises(ValueError, match=mentions(path)) as caught:
        check_params(open_files(path), *model(path))
    lines = str(caught.value).splitlines()
    assert_mentions(lines[0], "1 missing", "1 extra", "3 misshapen")
    listed = sorted([lines[0].rpartition("first: ")[2], *map(str.strip, lines[1:])])
    expected = [
        ("+ model.layers.2.post_attention_layernorm.weight", "[64]"),
        ("- layers.0.self_attn.v_proj.weight", "[32, 64]"),
        ("~ model.layers.0.mlp.gate_proj.weight", "Q5_1", *gguf.DTYPES),
        ("~ model.layers.1.mlp.up_proj.weight", "[95, 64]", "[96, 64]"),
        ("~ model.layers.1.self_attn.k_proj.weight", "[33, 64]", "[32, 64]"),
    ]
    for line, words in zip(listed, expected, strict=True):
        assert_mentions(line, *words)


def test_several_files_are_named_and_one_is_asked_for(tmp_path):
    for name in ("b.gguf", "a.GGUF"):
        write(tmp_path / name, tensors())
    with pytest.raises(ValueError, match=mentions(2, "a.GGUF", "b.gguf")):
        assert open_files(tmp_path).config
    assert open_files(tmp_path / "a.GGUF").config["hidden_size"] == 64


def test_safetensors_come_before_gguf(tmp_path):
    write(tmp_path / "m.gguf", tensors())
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert open_files(tmp_path).config == {"model_type": "bert"}


def test_a_file_of_another_name_goes_by_its_first_bytes(tmp_path):
    (tmp_path / "sha256-0").write_bytes(write(tmp_path / "m.gguf", tensors()).read_bytes())
    assert open_files(tmp_path / "sha256-0").config["hidden_size"] == 64
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path / "text", tmp_path / "nowhere", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=mentions(path, "directory", "GGUF")):
            assert open_files(path).config


def test_a_missing_package_is_asked_for(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", tensors())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'loraplus_jax\[train\]'"):
        assert open_files(path).config


def test_a_gpt2_in_gguf_gives_the_weights_of_its_directory(models, tmp_path, monkeypatch):
    write_golden("gpt2_tied", tmp_path)
    path = gguf_of(tmp_path, tmp_path / "m.gguf")
    monkeypatch.setattr("loraplus_jax.models.checkpoints.params._PIECE", 4 * 32 * 7)
    model, params = load_golden(path)
    _, wanted, tensors = models("gpt2_tied")
    assert model.config == GPT2Config(**{**vars(wanted.config), "initializer_range": 0.02})
    assert open_files(path).config["eos_token_id"] == 7
    jax.tree.map(np.testing.assert_array_equal, params, tensors)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "olmo2", "smollm3"])
def test_a_type_in_gguf_equals_its_directory(arch, models, tmp_path):
    """As llama.cpp's converter writes it, with the package's own names.

    In a Gemma 1 is added to the norms' scales, in a SmolLM3 the rotary halves are mixed.
    """
    golden, model, params = models(f"llama_{arch}")
    content, c = {}, model.config
    number = next(number for number, name in package.MODEL_ARCH_NAMES.items() if name == arch)
    names = package.get_tensor_name_map(number, c.num_hidden_layers)
    for key in golden:
        if key.startswith("weights/"):
            module, value = key.removeprefix("weights/").removesuffix(".weight"), golden[key]
            if arch == "smollm3" and module.endswith(("q_proj", "k_proj")):
                value = (
                    value.reshape(-1, 2, c.head_dim // 2, c.hidden_size).swapaxes(1, 2).reshape(value.shape)
                )
            is_shifted = arch.startswith("gemma") and value.ndim == 1
            content[f"{names.get_name(module)}.weight"] = value + 1 if is_shifted else value
    values = {
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.sliding_window": c.sliding_window or 0,
        "rope.freq_base": c.rope_theta,
    }
    if arch == "gemma2":
        values |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    elif arch == "gemma3":
        values |= {"attention.sliding_window_pattern": 3, "rope.freq_base_swa": c.rope_local_theta}
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    file = write(
        tmp_path / "m.gguf", content, {f"{arch}.{key}": value for key, value in values.items()}, arch
    )
    config = LlamaConfig.from_hf(open_files(file).config)
    # The file does not say what divides the scores: llama.cpp knows that it is the size of a head, but in 27B.
    read = {"rms_norm_eps": c.rms_norm_eps, "initializer_range": 0.3}
    if arch.startswith("gemma"):
        assert config.query_pre_attn_scalar == c.head_dim
        read["query_pre_attn_scalar"] = 9
    if arch == "smollm3":  # every fourth, which the file does not say either
        assert config.unrotated_layers == (3,)
        read["unrotated_layers"] = (1, 3)
    assert config.rms_norm_eps == pytest.approx(c.rms_norm_eps)
    assert dataclasses.replace(config, **read) == c
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), IDS)["params"]
    found = load_params(open_files(file), name_table(config), shapes)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-7), found, params)
    for name, view in open_files(file).tensors.items():
        np.testing.assert_allclose(
            view.restored(view[:]),
            content[next(k for k in content if gguf.to_hf_name(k, arch) == name)],
            atol=2e-7,
        )
