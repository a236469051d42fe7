"""GGUF adapters: names, layouts and keys against values worked out by hand; logits; what has no form there."""

import json

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
from loraplus_jax.inference.gguf_adapter import save_gguf_adapter
from loraplus_jax.inference.verify_conversion import gguf_changes
from loraplus_jax.interop.peft_files import WEIGHTS, save_peft
from loraplus_jax.models.checkpoints import transformers_class
from loraplus_jax.models.families import family_of
from loraplus_jax.models.files import open_files
from loraplus_jax.models.llama.config import KINDS

from .. import tiny
from ..messages import mentions
from ..models.checkpoints.gguf.files import gguf_of
from ..models.golden import IDS, load, run, write_golden
from .conversions import modules_of, write_peft

TINY = tiny.config(vocab_size=6, hidden_size=4, head_dim=4, num_attention_heads=1, intermediate_size=3)
Q, V, LAYER = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0"


def base(folder, **changes):
    """The files of a directory with a config alone."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    return open_files(folder)


def numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def pair(name, out=4, inner=4, rank=2, embedding=False):
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    return {f"{name}.{a}": numbers(rank, inner), f"{name}.{b}": numbers(out, rank)}


def peft(folder, tensors, **options):
    folder.mkdir()
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": None} | options
    (folder / "adapter_config.json").write_text(json.dumps(content))
    names = {f"base_model.model.{name}": np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    return folder


def contents(path):
    """The keys of a file, and of its tensors the type, the shape and the values, by the package's reader."""
    reader = package.GGUFReader(path)
    keys = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    quants = package.quants
    return keys, {
        t.name: (t.tensor_type.name, t.shape.tolist(), quants.dequantize(t.data, t.tensor_type))
        for t in reader.tensors
    }


def test_a_file_has_llama_cpps_keys_names_and_layouts(tmp_path):
    tensors = pair(Q) | pair(V) | pair("lm_head", out=6) | pair("model.embed_tokens", inner=6, embedding=True)
    source = peft(tmp_path / "peft", tensors)
    saved = save_gguf_adapter(tmp_path / "a.gguf", source, base(tmp_path / "base"), dtype="float32")
    keys, found = contents(tmp_path / "a.gguf")
    assert keys == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
        "general.quantization_version": 2,
    }
    # llama.cpp writes the shortest axis first: the reverse of numpy's.
    assert {name: tensor[:2] for name, tensor in found.items()} == {
        "blk.1.attn_q.weight.lora_a": ("F32", [4, 2]),
        "blk.1.attn_q.weight.lora_b": ("F32", [2, 4]),
        "blk.0.attn_v.weight.lora_a": ("F32", [4, 2]),
        "blk.0.attn_v.weight.lora_b": ("F32", [2, 4]),
        "output.weight.lora_a": ("F32", [4, 2]),
        "output.weight.lora_b": ("F32", [2, 6]),
        "token_embd.weight.lora_a": ("F32", [2, 6]),
        "token_embd.weight.lora_b": ("F32", [2, 4]),
    }
    values = {name: tensor[2].tolist() for name, tensor in found.items()}
    assert values["blk.1.attn_q.weight.lora_a"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # The two halves of a head are interleaved: rows 0 2 1 3.
    assert values["blk.1.attn_q.weight.lora_b"] == [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert values["blk.0.attn_v.weight.lora_b"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert values["token_embd.weight.lora_a"] == [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]
    assert values["token_embd.weight.lora_b"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert (saved.architecture, saved.modules, saved.alpha, saved.factors) == ("llama", 4, 4.0, {})
    embed = "model.embed_tokens"
    again = dict(gguf_changes(tmp_path / "a.gguf", TINY, ["model.norm", "lm_head", embed, V, Q]))
    assert again.keys() == {Q, V, "lm_head", embed}
    np.testing.assert_array_equal(again[Q], 2 * numbers(4, 2) @ numbers(2, 4))
    np.testing.assert_array_equal(again[embed], 2 * (numbers(4, 2) @ numbers(2, 6)).T)
    with pytest.raises(ValueError, match=mentions("a.gguf", "blk.1.attn_q.weight.lora_a", "no module")):
        dict(gguf_changes(tmp_path / "a.gguf", TINY, ["lm_head", embed, V]))


@pytest.mark.parametrize(
    ("dtype", "kinds", "tolerance"),
    [("float16", ("F16", "F16"), 1e-3), ("q8_0", ("Q8_0", "F16"), 1e-2)],
)
def test_factors_have_the_type_that_was_asked_for_where_rows_divide_into_blocks(
    tmp_path, dtype, kinds, tolerance
):
    source = peft(tmp_path / "peft", pair(V, 32, 32))
    files = base(tmp_path / "base", hidden_size=32, head_dim=32)
    save_gguf_adapter(tmp_path / "a.gguf", source, files, dtype=dtype)
    found = contents(tmp_path / "a.gguf")[1]
    for x, shape, kind in zip("ab", ((2, 32), (32, 2)), kinds, strict=True):
        own, _, values = found[f"blk.0.attn_v.weight.lora_{x}"]
        assert own == kind
        np.testing.assert_allclose(values, numbers(*shape), rtol=0, atol=63 * tolerance)


@pytest.mark.parametrize(
    ("options", "alpha", "factors"),
    [
        ({"alpha_pattern": {"q_proj": 8}}, 4, {Q: 2}),
        ({"rank_pattern": {"q_proj": 1}}, 4, {}),
        ({"use_rslora": True}, 4 * 2**0.5, {}),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 1}}, 4 * 2**0.5, {Q: 0.5**0.5}),
        ({"alpha_pattern": {"(q|v)_proj": 8}}, 8, {f"{LAYER}.mlp.up_proj": 0.5}),
    ],
)
def test_scales_that_one_alpha_cannot_say_are_in_b(tmp_path, options, alpha, factors):
    rank = options.get("rank_pattern", {}).get("q_proj", 2)
    tensors = pair(Q, rank=rank) | pair(V) | pair(f"{LAYER}.mlp.up_proj", out=3)
    files = base(tmp_path / "base")
    saved = save_gguf_adapter(
        tmp_path / "a.gguf", peft(tmp_path / "p", tensors, **options), files, dtype="float32"
    )
    assert saved.alpha == pytest.approx(alpha, 1e-7)
    assert saved.factors == pytest.approx(factors, 1e-7)
    assert ("exactly" in saved.describe()) == (set(factors.values()) <= {2, 0.5} and bool(factors))
    found = dict(gguf_changes(tmp_path / "a.gguf", TINY, [Q, V, f"{LAYER}.mlp.up_proj"]))
    assert len(found) == 3
    for name, change in found.items():
        r = rank if name == Q else 2
        # PEFT's: alpha / r, or alpha / sqrt(r).
        own = options.get("alpha_pattern", {}).get("q_proj" if name == Q else "", 4)
        if "(q|v)_proj" in options.get("alpha_pattern", {}) and name in (Q, V):
            own = 8
        wanted = own / r ** (0.5 if options.get("use_rslora") else 1)
        out, inner = change.shape
        np.testing.assert_allclose(change, wanted * numbers(out, r) @ numbers(r, inner), rtol=3e-7)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].gguf])
def test_heads_of_queries_and_keys_are_read_back_in_their_order(tmp_path, kind):
    """Also of a config that leaves the number of keys' heads to its type."""
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": None,
        "intermediate_size": 24,
    }
    folder = tiny.write(tmp_path / "base", kind, **sizes)
    modules = modules_of(folder, "q_proj", "k_proj", "qkv_proj")
    source = write_peft(tmp_path / "peft", modules, folder)
    save_gguf_adapter(tmp_path / "a.gguf", source, open_files(folder), dtype="float32")
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(source / WEIGHTS)
    changes = dict(gguf_changes(tmp_path / "a.gguf", config, modules))
    assert changes.keys() == modules.keys()
    for module, change in changes.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        np.testing.assert_allclose(change, 1.5 * b @ a, rtol=0, atol=1e-6)


CAUSAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = {
    "llama_llama3": (*CAUSAL, "embed_tokens", "lm_head"),
    "llama_qwen2": CAUSAL,
    "gpt2_untied": ("c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj", "embed_tokens", "lm_head"),
}


def exported(folder, name):
    """A base, our adapter on it with random values as a GGUF adapter, and the logits of both here."""
    folder.mkdir()
    golden = write_golden(name, folder)
    model, params = load(folder)
    config = LoRAPlusConfig(
        target_modules=LAYERS[name], rank=4, alpha=8.0, rank_pattern={f".*/{LAYERS[name][2]}": 2}
    )
    adapted = apply_lora_plus(model, config)
    lora, specs = init_lora(adapted, jax.random.key(0), IDS, base={"params": params})
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), lora)
    table = family_of(model.config.model_type).name_table(model.config)
    path_map = transformers_class.path_map(table, transformers_class.causal_lm_class(model.config))
    save_peft(folder / "peft", lora, specs, config, path_map)
    ids, base = golden["right"], {"params": params}
    return model, ids, run(adapted, base | {"lora": lora}, ids), run(model, base, ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_the_base_with_the_factors_read_back_has_our_logits(name, tmp_path):
    folder = tmp_path / "base"
    model, ids, wanted, without = exported(folder, name)
    source = gguf_of(folder, tmp_path / "base.gguf") if name == "gpt2_untied" else folder
    save_gguf_adapter(tmp_path / "a.gguf", folder / "peft", open_files(source), dtype="float32")
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    modules = [name.removesuffix(".weight") for name in weights]
    for module, change in gguf_changes(tmp_path / "a.gguf", config, modules):
        # Conv1D stores the weight as (in, out).
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + (change.T if ".c_" in module else change)
    save_file(weights, folder / "model.safetensors")
    found = run(model, {"params": load(folder)[1]}, ids)
    largest = np.abs(wanted).max()
    assert np.abs(wanted - without).max() > 1e-2 * largest
    assert np.abs(found - wanted).max() <= 1e-5 * largest


@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        ({f"{V}.lora_magnitude_vector": numbers(4)}, {"use_dora": True}, [V, "use_dora", "DoRA"]),
        ({"lm_head.weight": numbers(6, 4)}, {"modules_to_save": ["lm_head"]}, ["lm_head.weight", "full"]),
        ({f"{V}.base_layer.bias": numbers(4)}, {"bias": "all"}, [f"{V}.base_layer.bias", "full"]),
        (pair("model.layers.7.self_attn.q_proj"), {}, ["model.layers.7.self_attn.q_proj", "no such layer"]),
        (pair(f"{LAYER}.self_attn.qkv_proj"), {}, [f"{LAYER}.self_attn.qkv_proj", "no such layer"]),
        ({f"{LAYER}.mlp.up_proj.lora_A.weight": numbers(2, 4)}, {}, [f"{LAYER}.mlp.up_proj", "B", "missing"]),
        (pair(Q, out=5), {}, [Q, "(4, 2)", "(5, 2)"]),
        (pair(Q, rank=1), {}, [Q, "(2, 4)", "(1, 4)"]),
    ],
)
def test_what_has_no_form_there_is_named_with_the_remedy(tmp_path, tensors, options, words):
    source = peft(tmp_path / "peft", pair(V) | tensors, **options)
    with pytest.raises(ValueError, match=mentions("--merged", *words)):
        save_gguf_adapter(tmp_path / "a.gguf", source, base(tmp_path / "base"))
    assert {path.name for path in tmp_path.iterdir()} == {"peft", "base"}


@pytest.mark.slow
def test_embeddings_that_llama_cpp_does_not_adapt_are_named(tmp_path):
    files = base(tmp_path / "base", tie_word_embeddings=True)
    for name, tensors in (
        ("model.embed_tokens", pair("model.embed_tokens", inner=6, embedding=True)),
        ("lm_head", pair("lm_head", out=6)),
    ):
        source = peft(tmp_path / name, pair(V) | tensors)
        with pytest.raises(ValueError, match=mentions(name, "embedding is also the head", "--merged")):
            save_gguf_adapter(tmp_path / "a.gguf", source, files)
    (tmp_path / "gpt2").mkdir()
    write_golden("gpt2_untied", tmp_path / "gpt2")
    source = peft(tmp_path / "wpe", pair("transformer.wpe", 32, 32, embedding=True))
    with pytest.raises(ValueError, match=mentions("transformer.wpe", "positions", "--merged")):
        save_gguf_adapter(tmp_path / "a.gguf", source, open_files(tmp_path / "gpt2"))


def test_the_copy_of_the_bases_embedding_is_left_out(tmp_path):
    tensors = pair("model.embed_tokens", inner=6, embedding=True)
    copy = {"model.embed_tokens.base_layer.weight": numbers(6, 4)}
    save_gguf_adapter(tmp_path / "a.gguf", peft(tmp_path / "peft", tensors | copy), base(tmp_path / "base"))
    assert len(contents(tmp_path / "a.gguf")[1]) == 2


@pytest.mark.slow
def test_other_invalid_sources_are_rejected(tmp_path):
    files, source = base(tmp_path / "base"), peft(tmp_path / "peft", pair(V))
    with pytest.raises(ValueError, match=mentions("dtype", "float32, float16, q8_0", "int8")):
        save_gguf_adapter(tmp_path / "a.gguf", source, files, dtype="int8")
    with pytest.raises(ValueError, match=mentions("model_type", "llama", "gpt2", "gemma3_text", "phi3")):
        save_gguf_adapter(tmp_path / "a.gguf", source, base(tmp_path / "phi", model_type="phi3"))
    large = peft(tmp_path / "large", {name: 1e5 * x for name, x in pair(V).items()})
    with pytest.raises(ValueError, match=mentions("blk.0.attn_v.weight.lora_a", 65504, "float32")):
        save_gguf_adapter(tmp_path / "a.gguf", large, files)
    save_file({"params/head/bias": numbers(3)}, source / "loraplus.safetensors")
    with pytest.raises(ValueError, match=mentions("loraplus.safetensors", "full")):
        save_gguf_adapter(tmp_path / "a.gguf", source, files)
    assert not list(tmp_path.glob("*.gguf"))
    save_gguf_adapter(tmp_path / "a.gguf", large, files, dtype="float32")
    with pytest.raises(ValueError, match=mentions("a.gguf", "exists")):
        save_gguf_adapter(tmp_path / "a.gguf", large, files, dtype="float32")
