"""GPT-2 against golden files that transformers made (tests/golden/make_gpt2.py), its config, its files."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, merge
from loraplus_jax.adapter.tree import flatten, unflatten
from loraplus_jax.models.checkpoints.export import causal_lm_class, write_hf
from loraplus_jax.models.checkpoints.gguf import load as gguf
from loraplus_jax.models.checkpoints.gguf.export import write_gguf
from loraplus_jax.models.checkpoints.hf import check_params, load_config, load_params
from loraplus_jax.models.checkpoints.merge import CheckpointMerge
from loraplus_jax.models.checkpoints.quantized import choose_formats, pack_shapes
from loraplus_jax.models.decoding.generate import Sampling, make_generate
from loraplus_jax.models.families import family_of
from loraplus_jax.models.gpt2.config import GPT2Config
from loraplus_jax.models.gpt2.model import GPT2, name_table
from loraplus_jax.models.tokenizer import special_tokens

from ...messages import mentions
from ..checkpoints.gguf.files import write
from ..llama.test_parity import IDS, error, greedy, logits, run

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = ("tied", "scaled", "untied")


def write_golden(name, folder):
    golden = np.load(GOLDEN / f"gpt2_{name}.npz")
    weights = {key.removeprefix("weights/"): golden[key] for key in golden if key.startswith("weights/")}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(str(golden["config"]))
    return golden


def load(path, **fields):
    model = GPT2(GPT2Config.from_hf(load_config(path)), **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    return model, load_params(path, name_table(model.config), shapes)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Golden file, model and parameters, loaded once each."""
    loaded = {}

    def get(name):
        if name not in loaded:
            folder = tmp_path_factory.mktemp(name)
            loaded[name] = (write_golden(name, folder), *load(folder))
        return loaded[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_continuations_equal_transformers(name, models):
    golden, model, params = models(name)
    for key in ("right", "left", "long"):
        given = logits(model, params, golden[key], (golden[key] != 0).astype(np.int32))
        assert error(given, golden[f"float64/{key}"]) <= 1e-5, key  # transformers' own float32: up to 7e-7
    new_tokens = golden["greedy"].shape[1]
    np.testing.assert_array_equal(greedy(model, params, golden["prompts"], new_tokens), golden["greedy"])


@pytest.mark.parametrize("name", ["scaled", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES[::2])])
def test_continuations_with_a_cache_equal_transformers(name, models):
    golden, model, params = models(name)
    generate = make_generate(model, model.config, new_tokens=golden["greedy"].shape[1], stop=())
    segments = (golden["prompts"] != 0).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), len(segments))
    given = generate({"params": params}, golden["prompts"], segments, Sampling(), keys)
    np.testing.assert_array_equal(given, golden["greedy"])


def test_packed_sequences_equal_each_alone(models):
    _, model, params = models("scaled")
    ids = np.random.default_rng(0).integers(1, 96, (1, 40)).astype(np.int32)
    segments = np.repeat([[0, 1, 2, 0]], [4, 16, 17, 3], axis=1).astype(np.int32)
    packed = np.asarray(run(model, {"params": params}, ids, segments))[0]
    for number in (1, 2):
        mask = segments[0] == number
        alone = logits(model, params, ids[:, mask], np.ones((1, mask.sum()), np.int32))[0]
        assert error(packed[mask], alone) <= 1e-5


def test_a_position_beyond_the_table_gives_nan(models):
    _, model, params = models("tied")
    ids = np.ones((1, 2), np.int32)
    for last, is_known in ((63, True), (64, False)):
        given = run(model, {"params": params}, ids, None, np.array([[0, last]], np.int32))
        assert np.isfinite(given[0, 1]).all() == is_known
        assert np.isnan(given[0, 1]).all() != is_known


@pytest.mark.slow
def test_adapters_of_every_product_equal_merged_weights(models):
    golden, model, params = models("tied")
    adapted = apply_lora_plus(model, LoRAPlusConfig(target_modules="all-linear", rank=4))
    lora, specs = init_lora(adapted, jax.random.key(1), IDS)
    assert set(specs) == {f"layers/{n}" for n in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")}
    assert jax.tree.map(np.shape, lora["layers"]["attn"]["c_attn"]) == {
        "lora_a": (2, 32, 4),
        "lora_b": (2, 4, 96),
    }
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), lora)
    plain = np.asarray(run(model, {"params": params}, golden["long"]))
    np.testing.assert_array_equal(run(adapted, {"params": params, "lora": lora}, golden["long"]), plain)
    given = np.asarray(run(adapted, {"params": params, "lora": moved}, golden["long"]))
    assert error(given, plain) > 0.1
    merged = merge({"params": params}, moved, specs)
    assert error(given, np.asarray(run(model, merged, golden["long"]))) <= 1e-5


# files


def test_names_of_older_files_mean_the_same(models, tmp_path):
    """The model without its head, with the buffers that old files hold, and a config without newer options."""
    write_golden("tied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): value for name, value in weights.items()}
    old |= {f"h.{n}.attn.bias": np.tri(64, dtype=np.float32)[None, None] for n in range(2)}
    old["h.0.attn.masked_bias"] = np.full((), -1e4, np.float32)
    old["lm_head.weight"] = old["wte.weight"].copy()
    save_file(old, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    new_options = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
    kept = {key: value for key, value in config.items() if key not in (*new_options, "tie_word_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(kept | {"n_ctx": 64}))
    model, params = load(tmp_path)
    _, wanted, tensors = models("tied")
    assert model.config == wanted.config
    jax.tree.map(np.testing.assert_array_equal, params, tensors)


def gguf_of(folder, path, **changes):
    """The model of a directory as llama.cpp's converter writes it: it transposes the weights of Conv1D."""
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
    names |= {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv"}
    names |= {"attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    content = {}
    for name, value in load_file(folder / "model.safetensors").items():
        name = name.removeprefix("transformer.")
        is_conv1d = name.startswith("h.") and value.ndim == 2
        for old, new in names.items():
            name = name.replace(f"{old}.", f"{new}.")
        name = f"blk.{name.removeprefix('h.')}" if name.startswith("h.") else name
        content[name] = np.ascontiguousarray(value.T if is_conv1d else value)
    config = json.loads((folder / "config.json").read_text())
    values = {
        "gpt2.embedding_length": config["n_embd"],
        "gpt2.block_count": config["n_layer"],
        "gpt2.context_length": config["n_positions"],
        "gpt2.feed_forward_length": config["n_inner"] or 4 * config["n_embd"],
        "gpt2.attention.head_count": config["n_head"],
        "gpt2.attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        "tokenizer.ggml.eos_token_id": 7,
    }
    values = {key: value for key, value in (values | changes).items() if value is not None}
    return write(path, content, values, "gpt2")


def test_a_gguf_file_gives_the_weights_of_its_directory(models, tmp_path, monkeypatch):
    write_golden("tied", tmp_path)
    path = gguf_of(tmp_path, tmp_path / "m.gguf")
    monkeypatch.setattr("loraplus_jax.models.checkpoints.hf._PIECE", 4 * 32 * 7)
    model, params = load(path)
    _, wanted, tensors = models("tied")
    assert model.config == GPT2Config(**{**vars(wanted.config), "initializer_range": 0.02})
    assert load_config(path)["eos_token_id"] == 7
    jax.tree.map(np.testing.assert_array_equal, params, tensors)


def test_split_layers_are_the_parts_of_the_fused_one_and_are_written_as_it(models, tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    golden, fused, params = write_golden("tied", tmp_path / "hf"), *models("tied")[1:]
    model = GPT2(dataclasses.replace(fused.config, split_fused=True))
    table, shapes = name_table(model.config), jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    monkeypatch.setattr("loraplus_jax.models.checkpoints.hf._PIECE", 4 * 32 * 7)
    file = gguf_of(tmp_path / "hf", tmp_path / "m.gguf")
    for path in (tmp_path / "hf", file):
        loaded = load_params(path, table, shapes)
        layers = loaded["layers"]["attn"]
        for leaf, whole in params["layers"]["attn"]["c_attn"].items():
            parts = [layers[f"{name}_attn"][leaf] for name in "qkv"]
            np.testing.assert_array_equal(np.concatenate(parts, -1), whole)
    given = np.asarray(run(model, {"params": loaded}, golden["long"]))
    assert error(given, np.asarray(run(fused, {"params": params}, golden["long"]))) <= 1e-6
    # As if all weights had been trained.
    leaves, _ = check_params(tmp_path / "hf", table, shapes)
    merge = CheckpointMerge(table, leaves, {}, {}, flatten({"params": loaded}))
    (tmp_path / "out").mkdir()
    write_hf(tmp_path / "out", tmp_path / "hf", merge, causal_lm_class(model.config), new={}, config={})
    base, written = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    jax.tree.map(np.testing.assert_array_equal, written, base)
    assert "split_fused" not in json.loads((tmp_path / "out/config.json").read_text())
    write_gguf(tmp_path / "out.gguf", file, merge, "float32")
    for name, tensor in gguf.read(file).tensors.items():
        same = gguf.View(gguf.read(tmp_path / "out.gguf"), gguf.read(tmp_path / "out.gguf").tensors[name])
        np.testing.assert_array_equal(same[:], gguf.View(gguf.read(file), tensor)[:])
    # A file's blocks stay as they are.
    write_gguf(tmp_path / "q8.gguf", file, merge, "q8_0")
    formats = choose_formats(table, "file", None, tmp_path / "q8.gguf")
    assert {f"layers/attn/{name}_attn/kernel" for name in "qkv"} <= formats.keys()
    packed = unflatten(pack_shapes(flatten(shapes), formats, table))
    blocks, values = (load_params(tmp_path / "q8.gguf", table, tree) for tree in (packed, shapes))
    for name in "qkv":
        kernels = (tree["layers"]["attn"][f"{name}_attn"]["kernel"] for tree in (blocks, values))
        np.testing.assert_array_equal(next(kernels).dequantize(), next(kernels))


def test_a_missing_fused_tensor_is_listed_once(tmp_path):
    write_golden("tied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("h.0.attn.c_attn.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    config = dataclasses.replace(GPT2Config.from_hf(load_config(tmp_path)), split_fused=True)
    shapes = jax.eval_shape(GPT2(config).init, jax.random.key(0), IDS)["params"]
    with pytest.raises(ValueError, match=mentions("1 missing", "h.0.attn.c_attn.weight", [32, 96])):
        check_params(tmp_path, name_table(config), shapes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpt2.attention.layer_norm_epsilon": None}, ["gpt2.attention.layer_norm_epsilon", "positive"]),
        ({"gpt2.attention.head_count_kv": 2}, ["gpt2.attention.head_count_kv", 2, 4]),
        ({"gpt2.context_length": None}, ["max_position_embeddings"]),
    ],
)
def test_unsupported_gguf_files_are_rejected(changes, words, tmp_path):
    write_golden("tied", tmp_path)
    path = gguf_of(tmp_path, tmp_path / "m.gguf", **changes)
    with pytest.raises(ValueError, match=mentions(*words)):
        load_config(path)


# config

FILE = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}


def test_transformers_other_names_of_sizes_mean_the_same():
    other = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    config = GPT2Config.from_hf({"model_type": "gpt2", "vocab_size": 9} | other)
    assert config == GPT2Config.from_hf(FILE)
    assert (config.intermediate_size, config.head_dim, config.num_key_value_heads) == (32, 4, 2)
    assert GPT2Config.from_hf(FILE | {"n_inner": 24}).intermediate_size == 24
    assert GPT2Config.from_hf(FILE | {"split_fused": True}) == config  # no option of a file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": None}, ["n_embd", "missing"]),
        ({"n_head": 3}, ["n_head", 3, "n_embd", 8]),
        ({"n_layer": 0}, ["n_layer", 1, 0]),
        ({"n_embd": "8"}, ["n_embd", "'8'"]),
        ({"n_positions": 2.0}, ["n_positions", 2.0]),
        ({"activation_function": "mish"}, ["activation_function", "gelu_new", "tanh", "'mish'"]),
        ({"scale_attn_weights": "yes"}, ["scale_attn_weights", "true or false", "'yes'"]),
        ({"layer_norm_epsilon": 0}, ["layer_norm_epsilon", 0]),
        ({"add_cross_attention": True}, ["add_cross_attention", True, False]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"model_type": "gptj"}, ["model_type", "gpt2", "'gptj'"]),
    ],
)
def test_unsupported_configs_are_rejected(changes, words):
    with pytest.raises(ValueError, match=mentions(*words)):
        GPT2Config.from_hf(FILE | changes)


def test_sizes_above_the_files_are_rejected(tmp_path):
    write_golden("tied", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in (("n_embd", 2**20), ("n_inner", 2**20), ("n_positions", 2**20), ("n_layer", 3)):
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=mentions(name, value)):
            load_config(tmp_path)


def test_special_tokens_that_only_the_config_names(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    Tokenizer(kinds.BPE({"a": 0, "<end>": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    assert special_tokens(tmp_path) == {"bos_token": "<end>", "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "a"}))
    assert special_tokens(tmp_path) == {"eos_token": "a"}


def test_every_family_is_found_by_its_model_types():
    assert family_of("gpt2").model is GPT2
    assert family_of("qwen3").model.__name__ == "Llama"
