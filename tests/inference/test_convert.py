"""`loraplus convert`: sources x targets at tiny size, read back by this package; PEFT's turn is marked slow."""

import json
import re
import shutil
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, load_adapter
from loraplus_jax.adapter.target_rules import config_of
from loraplus_jax.adapter.tree import flatten, unflatten
from loraplus_jax.cli.commands import main
from loraplus_jax.inference import convert, verify_conversion
from loraplus_jax.inference.named_base import named_base
from loraplus_jax.interop.adapter_directory import save_adapter
from loraplus_jax.interop.peft_files import save_peft
from loraplus_jax.models.checkpoints import transformers_class
from loraplus_jax.models.checkpoints.params import load_params
from loraplus_jax.models.families import family_of
from loraplus_jax.models.files import open_files
from loraplus_jax.tasks.causal_lm import model_config

from .. import tiny
from ..integration import language_world
from ..integration.gpt2_world import write_gpt2
from ..interop.models import factors, spec_of
from ..messages import assert_mentions
from .conftest import with_adapter
from .conversions import (
    BIG,
    expected_weights,
    modules_of,
    write_base,
    write_library,
    write_openpi_base,
    write_peft,
)

GGUF = "gguf and loraplus"
"""Who verifies a GGUF adapter: its package reads the file, and this one computes."""
BY = {"peft": "PEFT", "merged": "transformers", "loraplus": "loraplus", "gguf": GGUF}
"""Who verifies each target, where torch and PEFT are installed."""
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def by_us(monkeypatch):
    """Verifies by this package alone, as where torch and PEFT are not installed."""
    monkeypatch.setattr(verify_conversion, "has_peft", lambda: False)


def run(*words):
    return main(["convert", *map(str, words)])


def converted(capsys, *words):
    assert run(*words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def rejected(capsys, *words, out):
    assert run(*words, "--out", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("loraplus: error: ")
    assert "Traceback" not in error
    assert not out.exists()
    assert not list(out.parent.glob(".loraplus-*"))
    return error


def differences(text):
    """Of the verification's line: by whom, the largest difference, the largest output, the adapter's effect."""
    match = re.search(r"verified by ([\w ]+): .* at most (\S+) .* up to (\S+); .* up to (\S+)\)", text)
    assert match, text
    return match[1], *(float(match[n]) for n in (2, 3, 4))


def check(text, by):
    found, difference, size, effect = differences(text)
    assert found == by
    assert difference <= 1e-5 * size
    assert effect > BIG * size


def flags(options):
    return [word for name, value in options.items() for word in (f"--{name}", value)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwix", "openpi"])
def test_a_library_merged(name, base, tmp_path, capsys, by_us):
    """Two libraries stand for all: `test_convert_sources.py` reads every one."""
    if name == "openpi":
        base = write_openpi_base(tmp_path / "base")
    source, out = tmp_path / "source.safetensors", tmp_path / "out"
    changes, options = write_library(name, source)
    check(
        converted(capsys, source, "--to", "merged", "--base", base, "--out", out, *flags(options)), "loraplus"
    )
    found, expected = load_file(out / "model.safetensors"), expected_weights(base, changes)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=5e-6, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["gguf", "peft", "loraplus"])
def test_a_library_for_others(to, base, tmp_path, capsys):
    _, options = write_library("qwix", tmp_path / "source.safetensors")
    out, more = tmp_path / "out", ("--dtype", "float32") if to == "gguf" else ()
    words = ("--base", base, "--out", out, *flags(options), *more)
    check(converted(capsys, tmp_path / "source.safetensors", "--to", to, *words), BY[to])
    if to == "gguf":
        assert (out / "adapter.gguf").is_file()
        return
    if to == "loraplus":  # it has no data, and a row of the data has as many tokens as the model takes
        rows = [{"instruction": "say many words", "output": "here are all of them"}] * 3
        (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["eval", str(out), "--data", str(tmp_path / "chat.jsonl")]) == 0
        assert main(["eval", str(out)]) == 2
        assert_mentions(capsys.readouterr().err, out, "--data", "--tasks")
        return
    # And from there on, with the same logits.
    check(converted(capsys, out, "--to", "merged", "--out", tmp_path / "again"), BY["merged"])


def test_openpi_leaves_jax_with_its_factors(tmp_path, capsys):
    """What its own script drops: the weights without the factors are not those of the model."""
    base = write_openpi_base(tmp_path / "base")
    changes, options = write_library("openpi", tmp_path / "source.safetensors")
    words = (tmp_path / "source.safetensors", "--base", base, *flags(options))
    check(converted(capsys, *words, "--to", "peft", "--out", tmp_path / "peft"), "loraplus")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    # Ranks and scales of a head's factors, and of layers that ignore alpha, are PEFT's patterns.
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    for module, change in changes.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        end = [key for key in config["rank_pattern"] if re.fullmatch(rf"(.*\.)?({key})", module)]
        rank = config["rank_pattern"][end[0]] if end else config["r"]
        end = [key for key in config["alpha_pattern"] if re.fullmatch(rf"(.*\.)?({key})", module)]
        alpha = config["alpha_pattern"][end[0]] if end else config["lora_alpha"]
        assert rank == len(a)
        np.testing.assert_allclose(alpha / rank * b @ a, change, rtol=0, atol=5e-6, err_msg=module)
    assert len(tensors) == 2 * len(changes)


PEFT = {"use_rslora": True, "rank_pattern": {"up_proj": 4}, "alpha_pattern": {"q_proj": 7.0}}
"""All that changes PEFT's scales."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "dora", "by"),
    [
        ("merged", False, "loraplus"),
        ("merged", True, "transformers"),
        ("peft", True, "PEFT"),
        ("gguf", False, GGUF),
    ],
)
def test_adapters_of_peft(to, dora, by, base, tmp_path, capsys, request):
    if by == "loraplus":
        request.getfixturevalue("by_us")
    source = write_peft(tmp_path / "peft", modules_of(base, "q_proj", "up_proj"), base, dora=dora, **PEFT)
    words, out = (source, "--to", to, "--out"), tmp_path / "out"
    check(converted(capsys, *words, out, *(("--dtype", "float32") if to == "gguf" else ())), by)
    if to == "peft":
        name = "adapter_model.safetensors"
        assert (out / name).read_bytes() == (source / name).read_bytes()
    if to == "gguf":
        _, difference, size, effect = differences(converted(capsys, *words, tmp_path / "again"))
        assert difference <= 5e-3 * size < effect  # float16, the default


@pytest.mark.slow
def test_attention_and_experts_of_peft(tmp_path, capsys, monkeypatch):
    base = write_base(tmp_path / "base", model_type="qwen3_moe", **tiny.OPTIONS["qwen3_moe"])
    config, family = model_config(open_files(base)), family_of("qwen3_moe")
    model, table = family.model(config), family.name_table(config)
    leaves = {"layers/mlp/experts/.*/kernel": "leio"}
    adapted = LoRAPlusConfig(target_modules=["q_proj"], target_parameters=leaves, rank=2, alpha=3.0)
    ids = np.zeros((1, 4), np.int32)
    params = model.init(jax.random.key(0), ids)
    lora, specs = init_lora(apply_lora_plus(model, adapted), jax.random.key(0), ids, base=params)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), lora)
    path_map = transformers_class.path_map(table, transformers_class.causal_lm_class(config))
    save_peft(tmp_path / "peft", lora, specs, adapted, path_map, base_model="somewhere/else")
    (tmp_path / "peft/loraplus.json").unlink()
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["target_parameters"]
    out, words = tmp_path / "out", (tmp_path / "peft", "--base", base, "--to", "loraplus")
    told = converted(capsys, *words, "--out", out)
    if verify_conversion.has_peft():
        check(told, "PEFT")
    else:
        assert_mentions(told, "not verified", "PEFT", "not installed")
    jax.tree.map(np.testing.assert_allclose, load_adapter(out).lora, lora)
    assert main(["generate", str(out), "--prompt", "a", "--max_tokens", "1"]) == 0
    assert_mentions(
        rejected(capsys, tmp_path / "peft", "--base", base, "--to", "merged", out=tmp_path / "no"), "loraplus"
    )
    without_logits(monkeypatch, free := logits_bytes(base, {}, "loraplus") - 1)
    with monkeypatch.context() as installed:
        installed.setattr(verify_conversion, "has_peft", lambda: True)
        assert_mentions(rejected(capsys, *words, out=tmp_path / "no"), "--no_verify", f"{free / 1e9:.2f} GB")
    assert_mentions(converted(capsys, *words, "--no_verify", "--out", tmp_path / "no"), "--no_verify")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "config", "change"),
    [
        ("peft", "adapter_config.json", {"lora_alpha": 7}),
        ("merged", "config.json", {"rms_norm_eps": 1e-3}),
        ("merged", "tokenizer_config.json", {"eos_token": language_world.TURN}),
    ],
)
def test_a_config_that_was_changed_is_named(to, config, change, base, tmp_path, capsys):
    source = write_peft(tmp_path / "peft", modules_of(base, "q_proj"), base)
    out = tmp_path / "out"
    converted(capsys, source, "--to", to, "--out", out, "--no_verify")
    asked = ("generate", str(out), "--prompt", "a", "--max_tokens", "1")
    assert main([*asked]) == 0
    content = json.loads((out / config).read_text())
    (out / config).write_text(json.dumps(content | change))
    assert main([*asked]) == 2
    assert_mentions(capsys.readouterr().err, out / config, "changed", "digest")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["peft", "merged"])
def test_damage_to_what_was_written_is_named(to, base, tmp_path, capsys):
    source = write_peft(tmp_path / "peft", modules_of(base, "q_proj"), base)
    out = tmp_path / "out"
    converted(capsys, source, "--to", to, "--out", out, "--no_verify")
    (file,) = out.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["generate", str(out), "--prompt", "a", "--max_tokens", "1"]) == 2
    assert_mentions(capsys.readouterr().err, file, "changed", "digest")
    if to == "peft":
        assert_mentions(rejected(capsys, out, "--to", "merged", out=tmp_path / "again"), file, "changed")


def write_base_with_biases(directory):
    base = write_base(directory, model_type="qwen2")
    tensors = load_file(base / "model.safetensors")
    rng = np.random.default_rng(4)
    for name, x in list(tensors.items()):
        if re.search("[qkv]_proj.weight", name):
            tensors[name.replace("weight", "bias")] = rng.normal(size=len(x)).astype(np.float32)
    save_file(tensors, base / "model.safetensors")
    return base


@pytest.mark.slow
def test_fully_trained_modules_and_biases_of_peft(tmp_path, capsys, by_us):
    base, rng = write_base_with_biases(tmp_path / "base"), np.random.default_rng(4)
    options = {"modules_to_save": ["norm"], "bias": "lora_only"}
    source = write_peft(tmp_path / "peft", modules_of(base, "q_proj"), base, **options)
    adapter = load_file(source / "adapter_model.safetensors")
    adapter["base_model.model.model.norm.weight"] = 1 + rng.random(32, np.float32)
    for n in range(2):
        name = f"base_model.model.model.layers.{n}.self_attn.q_proj"
        adapter[f"{name}.base_layer.bias"] = rng.normal(size=32).astype(np.float32)
    save_file(adapter, source / "adapter_model.safetensors")
    for to in ("merged", "loraplus"):
        check(converted(capsys, source, "--to", to, "--out", tmp_path / to), "loraplus")
    merged = load_file(tmp_path / "merged/model.safetensors")
    np.testing.assert_array_equal(merged["model.norm.weight"], adapter["base_model.model.model.norm.weight"])


@pytest.mark.slow
def test_gpt2(tmp_path, capsys, by_us):
    """Its weights are (in, out), and its class puts a prefix before the file's names."""
    (tmp_path / "base").mkdir()
    write_gpt2(tmp_path / "base")
    modules = {f"transformer.h.{n}.attn.c_attn": (96, 32) for n in range(2)}
    source = write_peft(tmp_path / "adapter", modules, tmp_path / "base", fan_in_fan_out=True)
    check(converted(capsys, source, "--to", "merged", "--out", tmp_path / "out"), "loraplus")


@pytest.mark.slow
def test_a_tied_embedding(tmp_path, capsys, by_us):
    """PEFT saves its factors under the head's name, too: one weight all the same."""
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    vocabulary, size = load_file(base / "model.safetensors")["model.embed_tokens.weight"].shape
    source = write_peft(tmp_path / "peft", {"model.embed_tokens": (2, 2)}, base, ensure_weight_tying=True)
    rng, name = np.random.default_rng(3), "base_model.model.model.embed_tokens.lora_embedding_{}"
    a, b = (0.3 * rng.normal(size=shape).astype(np.float32) for shape in ((2, vocabulary), (size, 2)))
    head = {"base_model.model.lm_head.lora_A.weight": b.T, "base_model.model.lm_head.lora_B.weight": a.T}
    tensors = {name.format("A"): a, name.format("B"): b} | head
    tensors = {key: np.ascontiguousarray(x) for key, x in tensors.items()}
    save_file(tensors, source / "adapter_model.safetensors")
    check(converted(capsys, source, "--to", "merged", "--out", tmp_path / "out"), "loraplus")


@pytest.mark.slow
def test_weights_of_16_bits_are_compared_as_they_are_stored(tmp_path, capsys, by_us):
    base = write_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({k: x.astype(ml_dtypes.bfloat16) for k, x in tensors.items()}, base / "model.safetensors")
    _, options = write_library("qwix", tmp_path / "qwix.safetensors")
    words = ("--to", "merged", "--base", base, "--out", tmp_path / "out", *flags(options))
    _, difference, size, effect = differences(converted(capsys, tmp_path / "qwix.safetensors", *words))
    # An adapter of half the scale would not pass.
    assert difference <= 1e-3 * size < BIG * size < effect


@pytest.mark.slow
def test_levanter(base, tmp_path, capsys, by_us):
    """Its prefix is GPT-2's for every model, and PEFT finds none of a Llama's modules by it."""
    modules = modules_of(base, "q_proj", "down_proj")
    source = write_peft(tmp_path / "levanter", modules, base, prefix="transformer.", target_modules=None)
    check(converted(capsys, source, "--to", "peft", "--out", tmp_path / "out"), "loraplus")
    names = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in names} == modules.keys()
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]


@pytest.mark.slow
def test_a_whole_checkpoint_must_hold_the_base(base, tmp_path, capsys, by_us):
    _, options = write_library("qwix", tmp_path / "factors.safetensors")
    tree, tensors = load_file(tmp_path / "factors.safetensors"), load_file(base / "model.safetensors")
    q = tensors["model.layers.0.self_attn.q_proj.weight"]
    tree |= {
        "layers/0/attn/q_proj/w/value": np.ascontiguousarray(q.T.reshape(32, 4, 8)),
        "layers/mlp/stacked/value": np.stack(
            [tensors[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(2)]
        ),
    }
    save_file(tree, tmp_path / "whole.safetensors")
    words = ("--to", "peft", "--base", base, *flags(options))
    check(converted(capsys, tmp_path / "whole.safetensors", *words, "--out", tmp_path / "out"), "loraplus")
    tree["layers/0/attn/q_proj/w/value"][0, 0, 0] += 1
    save_file(tree, tmp_path / "whole.safetensors")
    words = (tmp_path / "whole.safetensors", *words)
    error = rejected(capsys, *words, out=tmp_path / "no")
    assert_mentions(error, "layers/0/attn/q_proj/w", "--leave_out", base)
    text = converted(capsys, *words, "--leave_out", ".*/q_proj/w", "--no_verify", "--out", tmp_path / "left")
    assert_mentions(text, "layers/0/attn/q_proj/w", "--leave_out")


def test_bad_input(base, tmp_path, capsys, by_us):
    _, options = write_library("qwix", tmp_path / "qwix.safetensors")
    source, good = tmp_path / "qwix.safetensors", flags(options)
    out = tmp_path / "out"
    words = (source, "--to", "peft", "--base", base)
    assert_mentions(rejected(capsys, *words, out=out), "--scale", "--alpha", "qwix")
    assert_mentions(rejected(capsys, source, "--to", "peft", *good, out=out), "--base")
    assert_mentions(rejected(capsys, *words, "--scale", 0, out=out), "--scale", "0")
    assert_mentions(
        rejected(capsys, *words, *good, "--dtype", "float16", out=out), "--dtype", "merged", "gguf"
    )
    assert_mentions(rejected(capsys, *words, *good, "--leave_out", "(", out=out), "--leave_out", "(")
    error = rejected(capsys, tmp_path / "no", "--to", "peft", "--base", base, out=out)
    assert_mentions(error, tmp_path / "no")
    other = write_base(tmp_path / "other", hidden_size=32, num_attention_heads=4, model_type="llama")
    tensors = load_file(other / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, other / "model.safetensors")
    config = json.loads((other / "config.json").read_text()) | {"num_hidden_layers": 1}
    (other / "config.json").write_text(json.dumps(config))
    error = rejected(capsys, source, "--to", "peft", "--base", other, *good, out=out)
    assert_mentions(error, "model.layers.1.self_attn.k_proj", other)
    tree = load_file(source)
    stray = tree | {"layers/0/strange/lora/deep_lora_a": np.ones((4, 2), np.float32)}
    save_file(stray, source)
    assert_mentions(rejected(capsys, *words, *good, out=out), "layers/0/strange", "lora_b")
    save_file(tree | {"layers/0/unknown": np.ones(5, np.float32)}, source)
    assert_mentions(rejected(capsys, *words, *good, out=out), "layers/0/unknown", "(5,)", "--leave_out")
    save_file(tree, source)
    out.mkdir()
    assert run(*words, *good, "--out", out) == 2
    assert_mentions(capsys.readouterr().err, "--out", out)
    assert list(out.iterdir()) == []
    out.rmdir()
    peft = write_peft(tmp_path / "peft", modules_of(base, "q_proj"), base)
    tensors = load_file(peft / "adapter_model.safetensors")
    lonely = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors.pop(lonely)
    save_file(tensors, peft / "adapter_model.safetensors")
    assert_mentions(
        rejected(capsys, peft, "--to", "merged", out=out), lonely.removeprefix("base_model.model.")
    )
    save_file(tensors | {lonely: np.full((32, 2), np.nan, np.float32)}, peft / "adapter_model.safetensors")
    words = ("--to", "gguf", "--no_verify")
    dora = write_peft(tmp_path / "dora", modules_of(base, "q_proj"), base, dora=True)
    assert_mentions(rejected(capsys, dora, *words, out=out), "DoRA", "--to merged")
    assert_mentions(rejected(capsys, peft, *words, out=out), peft, "layers/1/self_attn/q_proj", "finite")
    assert_mentions(rejected(capsys, peft, *words, "--from", "qwix", out=out), peft, "PEFT", "--from qwix")
    assert_mentions(rejected(capsys, peft, *words, out=peft / "x"), "--out", peft / "x", "outside")
    assert_mentions(rejected(capsys, peft, *words, out=tmp_path / "x.gguf"), "--out", "x.gguf", "directory")
    error = rejected(capsys, peft, *words, "--allow_different", "data", out=out)
    assert_mentions(error, "--allow_different", "'data'", "base.weights")
    error = rejected(capsys, peft, *words, "--allow_different", "base.config", out=out)
    assert_mentions(error, "--allow_different", peft)
    write_openpi_base(tmp_path / "pi")
    write_library("openpi", tmp_path / "pi.safetensors")
    words = (tmp_path / "pi.safetensors", "--to", "loraplus", "--base", tmp_path / "pi", "--scale", 1)
    assert_mentions(rejected(capsys, *words, out=out), "--to", "loraplus", "peft", "merged")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["q_proj"]}, ("layers.0.self_attn.v_proj", "target_modules")),
        (
            {"target_modules": ["q_proj", "v_proj", "up_proj"]},
            ("layers.0.mlp.up_proj", "adapter_config.json"),
        ),
        ({"peft_type": "LOHA"}, ("peft_type", "LOHA")),
    ],
)
def test_peft_computes_another_model_with_these_options(options, named, base, tmp_path, capsys):
    """Factors that the options leave out, or that they ask for and the file lacks: for each target alike."""
    source = write_peft(tmp_path / "peft", modules_of(base, "q_proj", "v_proj"), base, **options)
    for to in ("merged", "gguf", "peft", "loraplus"):
        assert_mentions(rejected(capsys, source, "--to", to, out=tmp_path / "out"), *named)
    assert main(["generate", str(source), "--prompt", "a", "--max_tokens", "8"]) == 2
    assert_mentions(capsys.readouterr().err, *named)


@pytest.mark.slow
def test_an_expression_of_the_source_is_not_written(base, tmp_path, capsys):
    """PEFT would run it on every module of a model, for ever with the second one."""
    modules = modules_of(base, "q_proj")
    options = {
        "target_modules": r".*\.q_proj",
        "exclude_modules": r"a.*",
        "rank_pattern": {r"layers\.9\..*": 3},
    }
    source = write_peft(tmp_path / "peft", modules, base, **options)
    converted(capsys, source, "--to", "peft", "--out", tmp_path / "out", "--no_verify")
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (written["target_modules"], written["rank_pattern"]) == (["q_proj"], {})
    assert not written.get("exclude_modules")
    source = write_peft(tmp_path / "slow", modules, base, target_modules="((a+)+)+$|(.*)*q_proj")
    assert_mentions(
        rejected(capsys, source, "--to", "peft", out=tmp_path / "no"),
        "target_modules",
        "((a+)+)+$|(.*)*q_proj",
    )


@pytest.mark.slow
@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_a_tied_head_or_its_embedding_alone(end, tmp_path, capsys, by_us):
    """PEFT adapts one of the two without the other, and so does the merged model."""
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    name = {"lm_head": "lm_head", "embed_tokens": "model.embed_tokens"}[end]
    source = write_peft(tmp_path / "peft", {name: embedding.shape}, base)
    path = source / "adapter_model.safetensors"
    a, b = load_file(path).values()
    if end == "embed_tokens":
        keys = "base_model.model.model.embed_tokens.lora_embedding_{}"
        save_file(
            {keys.format("A"): np.ascontiguousarray(b.T), keys.format("B"): np.ascontiguousarray(a.T)}, path
        )
    check(converted(capsys, source, "--to", "merged", "--out", tmp_path / "out"), "loraplus")
    found = load_file(tmp_path / "out/model.safetensors")
    both = {key: found[f"{key}.weight"] for key in ("lm_head", "model.embed_tokens")}
    changed = both.pop(name)
    np.testing.assert_allclose(changed, embedding + 1.5 * b @ a, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(both.popitem()[1], embedding)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    check_again = converted(capsys, source, "--to", "peft", "--out", tmp_path / "again")
    assert differences(check_again)[1] <= 1e-5
    for to in ("gguf", "loraplus"):
        error = rejected(capsys, source, "--to", to, out=tmp_path / "no")
        assert re.search("tied|also the head", error)
        assert_mentions(error, "merged")


@pytest.mark.slow
def test_a_small_adapter_that_is_lost_on_the_way_is_no_rounding(base, tmp_path, capsys, monkeypatch):
    source = write_peft(tmp_path / "peft", modules_of(base, "q_proj"), base)
    tensors = load_file(source / "adapter_model.safetensors")
    small = {name: x * (1e-3 if "lora_B" in name else 1) for name, x in tensors.items()}
    save_file(small, source / "adapter_model.safetensors")
    words = (source, "--to", "gguf", "--dtype", "q8_0")
    converted(capsys, *words, "--out", tmp_path / "out")
    monkeypatch.setattr(verify_conversion, "gguf_changes", lambda *_: {})
    assert_mentions(rejected(capsys, *words, out=tmp_path / "no"), "logits", "changes")


@pytest.mark.slow
def test_a_target_that_computes_something_else_is_removed(base, tmp_path, capsys, by_us, monkeypatch):
    _, options = write_library("qwix", tmp_path / "qwix.safetensors")
    right = verify_conversion.our_logits
    monkeypatch.setattr(verify_conversion, "our_logits", lambda *a: right(*a) + (len(a) == 1))
    words = (tmp_path / "qwix.safetensors", "--to", "merged", "--base", base, *flags(options))
    assert_mentions(rejected(capsys, *words, out=tmp_path / "out"), "logits", "1")
    text = converted(capsys, *words, "--no_verify", "--out", tmp_path / "out")
    assert_mentions(text, "--no_verify")


def logits_bytes(base, modules, to):
    """Twice the base in float32, and the adapted weights, of a merged model of another dtype all of them."""
    whole = 4 * sum(x.size for x in load_file(base / "model.safetensors").values())
    adapted = 4 * sum(np.prod(shape) for shape in modules.values())
    return 2 * whole + {"gguf": 2 * adapted, "merged": whole}.get(to, adapted)


def without_logits(monkeypatch, free):
    """Sets the free memory; computing any logits fails."""

    def fail(*_, **__):
        raise AssertionError("logits do not fit into memory")

    for name in ("our_logits", "torch_logits", "opened_logits"):
        monkeypatch.setattr(verify_conversion, name, fail)
    monkeypatch.setattr(convert, "free_host_bytes", lambda: free)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["peft", "merged", "gguf", "loraplus"])
def test_layers_are_compared_where_logits_do_not_fit(to, base, tmp_path, capsys, monkeypatch):
    modules, dtype = modules_of(base, "q_proj", "k_proj", "up_proj"), ()
    source = write_peft(tmp_path / "peft", modules, base)
    if to in ("merged", "gguf"):
        dtype = ("--dtype", {"merged": "bfloat16", "gguf": "float32"}[to])
    words, needed = (source, "--to", to, *dtype, "--out"), logits_bytes(base, modules, to)
    monkeypatch.setattr(convert, "free_host_bytes", lambda: needed)
    monkeypatch.setattr(verify_conversion, "has_peft", lambda: False)
    assert "logits differ" in converted(capsys, *words, tmp_path / "fits")
    without_logits(monkeypatch, needed - 1)
    names = []

    def watched(weights):
        alive = []
        for name, value in weights:
            names.append(name)
            alive.append(weakref.ref(value if value.base is None else value.base))
            assert len({id(each()) for each in alive if each() is not None}) <= 2  # with the one before
            yield name, value

    right = verify_conversion.layer_outputs
    monkeypatch.setattr(verify_conversion, "layer_outputs", lambda weights: right(watched(weights)))
    text = converted(capsys, *words, tmp_path / "out")
    found, difference, size, effect = differences(text)
    assert (found, difference <= 1e-5 * size, effect > BIG * size) == ("loraplus", True, True)
    assert_mentions(text, "outputs of the layers", "memory", f"{needed / 1e9:.2f} GB")
    compared = load_file(base / "model.safetensors") if to == "merged" else modules
    assert len(names) == 3 * len(compared)  # of the base, the source and the target


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_wrong_tensor_of_a_merged_model_is_found_without_logits(name, base, tmp_path, capsys, monkeypatch):
    source, right = write_peft(tmp_path / "peft", modules_of(base, "q_proj"), base), convert.write_hf

    def wrong(partial, *args, **kwargs):
        right(partial, *args, **kwargs)
        tensors = load_file(partial / "model.safetensors")
        save_file(tensors | {name: 1.01 * tensors[name]}, partial / "model.safetensors", {"format": "pt"})

    without_logits(monkeypatch, 0)
    monkeypatch.setattr(convert, "write_hf", wrong)
    assert_mentions(rejected(capsys, source, "--to", "merged", out=tmp_path / "out"), name)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["peft", "gguf"])
def test_a_wrong_module_of_an_adapter_is_found_without_logits(to, base, tmp_path, capsys, monkeypatch):
    source = write_peft(tmp_path / "peft", modules_of(base, "q_proj"), base)
    right, module = convert.save_peft, "model.layers.1.self_attn.q_proj"

    def wrong(directory, *args, **kwargs):
        right(directory, *args, **kwargs)
        path, name = directory / "adapter_model.safetensors", f"base_model.model.{module}.lora_B.weight"
        tensors = load_file(path)
        save_file(tensors | {name: 1.01 * tensors[name]}, path)

    without_logits(monkeypatch, 0)
    monkeypatch.setattr(convert, "save_peft", wrong)
    dtype = ("--dtype", "float32") if to == "gguf" else ()
    assert_mentions(rejected(capsys, source, "--to", to, *dtype, out=tmp_path / "out"), f"{module}.weight")


@pytest.mark.slow
def test_names_of_your_own(base, tmp_path, capsys, by_us):
    rng, tree = np.random.default_rng(2), {}
    for n in range(2):
        tree[f"blocks_{n}/query/lora_a"] = rng.normal(size=(32, 2)).astype(np.float32)
        tree[f"blocks_{n}/query/lora_b"] = rng.normal(size=(2, 32)).astype(np.float32)
    save_file(tree, tmp_path / "mine.safetensors")
    words = (tmp_path / "mine.safetensors", "--to", "peft", "--base", base)
    assert_mentions(
        rejected(capsys, *words, out=tmp_path / "out"), "--from", "--path_map", "blocks_0/query/lora_a"
    )
    rules = [["blocks_{layer}/query", "model.layers.{layer}.self_attn.q_proj"]]
    (tmp_path / "map.json").write_text(json.dumps({"rules": rules}))
    more = ("--from", "nnx", "--path_map", tmp_path / "map.json", "--out", tmp_path / "out")
    check(converted(capsys, *words, *more), "loraplus")
    (tmp_path / "map.json").write_text("[]")
    assert_mentions(rejected(capsys, *words, *more[:4], out=tmp_path / "no"), "map.json")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["peft", "loraplus", "merged", "gguf"])
def test_runs(to, untrained_talk, tmp_path, capsys):
    out = tmp_path / "out"
    more = ("--dtype", "float32") if to == "gguf" else ()  # its random factors are large
    text = converted(capsys, untrained_talk.out, "--to", to, "--out", out, *more)
    # Its base is quantized; all but our own form are compared on the original weights.
    found, difference, size, _ = differences(text)
    assert found == BY[to]
    assert difference <= 1e-5 * size
    files = {
        "peft": "adapter_config.json",
        "loraplus": "adapter.json",
        "merged": "config.json",
        "gguf": "adapter.gguf",
    }
    assert (out / files[to]).is_file()


@pytest.mark.slow
def test_a_run_on_a_gguf_base_is_held_to_what_its_adapter_changes(first_talk, tmp_path, capsys):
    gguf = language_world.write_gguf_of(first_talk.model, tmp_path / "tiny.gguf")
    made = with_adapter(first_talk, tmp_path / "world", "--model.path", str(gguf))
    parts = load_adapter(made.out / "adapter")
    trained = {"lora": jax.tree.map(lambda x: 0.04 * x, parts.lora), **parts.extras}
    notes = json.loads((made.out / "adapter/adapter.json").read_text())
    own = {name: notes[name] for name in ("base", "task", "identity", "settings")}
    save_adapter(made.out / "adapter", trained, parts.specs, parts.config, **own)
    words = (made.out, "--to", "gguf", "--dtype", "q8_0")
    _, difference, size, effect = differences(converted(capsys, *words, "--out", tmp_path / "out"))
    # Without the adapter the outputs would be within 5e-2 of the largest.
    assert difference <= 5e-2 * effect < effect < 5e-2 * size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "options"), [("merged", {"variant": "dora", "bias": "lora_only"}), ("loraplus", {})]
)
def test_an_adapter_of_a_loop_of_ones_own(to, options, tmp_path, capsys, by_us):
    """An adapter for this package's model of a base, written by `save_adapter` alone."""
    base = write_base_with_biases(tmp_path / "base")
    config = model_config(open_files(base))
    lora_config = LoRAPlusConfig(target_modules=["q_proj", "down_proj"], rank=2, alpha=3, **options)
    model = apply_lora_plus(family_of(config.model_type).model(config), lora_config)
    ids = verify_conversion.token_ids(config.vocab_size)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids)["params"])
    params = load_params(open_files(base), family_of(config.model_type).name_table(config), shapes)
    lora, specs = init_lora(model, jax.random.key(1), ids, base={"params": params})
    rng = np.random.default_rng(3)
    lora = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), lora)
    biases = {path: x + 1 for path, x in flatten(params).items() if path.endswith("q_proj/bias")}
    trained = {"lora": lora, "params": unflatten(biases)} if "bias" in options else {"lora": lora}
    save_adapter(tmp_path / "adapter", trained, specs, lora_config)
    words = ("--to", to, "--base", base, "--out", tmp_path / "out")
    check(converted(capsys, tmp_path / "adapter", *words), "loraplus")
    if to == "merged":
        variables = {"params": unflatten(flatten(params) | biases), "lora": lora}
        expected = jax.jit(model.apply)(variables, ids)
        found = verify_conversion.our_logits(named_base(open_files(tmp_path / "out")))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_an_adapter_with_names_and_axes_of_ones_own(base, tmp_path, capsys, by_us):
    """Stacked layers, heads on axes of their own, and keys and values in one weight."""
    specs = {
        "blocks/query": spec_of(
            "dense", "ioo", (2, 32, 4, 8), stacked=(0,), leaf="params/blocks/query/kernel"
        ),
        "blocks/kv": spec_of("einsum", "bioo", (2, 2, 32, 2, 8), stacked=(0,), leaf="params/blocks/kv/w"),
    }
    lora = {
        "blocks": {name: factors(specs[f"blocks/{name}"], n)["m"] for n, name in enumerate(("query", "kv"))}
    }
    lora = jax.tree.map(lambda x: 0.3 * x, lora)
    save_adapter(tmp_path / "adapter", lora, specs, config_of(specs))
    words = (tmp_path / "adapter", "--to", "merged", "--base", base)
    rules = [
        ["blocks/query", "model.layers.{n}.self_attn.q_proj"],
        ["blocks/kv", "model.layers.{n}.self_attn.{k_proj|v_proj}", "Linear"],
    ]
    (tmp_path / "map.json").write_text(json.dumps({"rules": rules}))
    error = rejected(capsys, *words, out=tmp_path / "out")
    assert_mentions(error, "path map", "blocks/query")
    assert_mentions(rejected(capsys, *words, "--scale", 1, out=tmp_path / "out"), "--scale")
    for rule, named in (
        (["nothing/x", "model.norm"], ("nothing/x", "bad.json", "no module")),
        ([1, 2], ("bad.json", "(1, 2)")),
        (["blocks/query", "model.layers.{n}.self_attn.q_proj", "Conv1D"], ("blocks/query", "Conv1D")),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({"rules": [rule, *rules]}))
        error = rejected(capsys, *words, "--path_map", tmp_path / "bad.json", out=tmp_path / "out")
        assert_mentions(error, *named)
    check(
        converted(capsys, *words, "--path_map", tmp_path / "map.json", "--out", tmp_path / "out"), "loraplus"
    )
    found, changes = load_file(tmp_path / "out/model.safetensors"), {}
    for n in range(2):
        start = f"model.layers.{n}.self_attn"
        a, b = (np.asarray(lora["blocks"]["query"][f"lora_{x}"][n]) for x in "ab")
        changes[f"{start}.q_proj"] = 1.5 * np.einsum("ir,rhd->hdi", a, b).reshape(32, 32)
        a, b = (np.asarray(lora["blocks"]["kv"][f"lora_{x}"][n]) for x in "ab")
        for part, name in enumerate(("k_proj", "v_proj")):
            changes[f"{start}.{name}"] = 1.5 * np.einsum("ir,rhd->hdi", a[part], b[part]).reshape(16, 32)
    for key, value in expected_weights(base, changes).items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=5e-6, err_msg=key)


@pytest.mark.slow
def test_a_run_whose_base_has_moved(untrained_talk, tmp_path, capsys, monkeypatch):
    base = tmp_path / "base"
    settings = json.loads((untrained_talk.out / "adapter/adapter.json").read_text())["settings"]
    shutil.copytree(settings["model"]["path"], base)
    words = (untrained_talk.out, "--to", "peft", "--base", base)
    converted(capsys, *words, "--no_verify", "--out", tmp_path / "out")
    options = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == str(base)
    # A copy of the run with a relative path, whose file is damaged afterwards.
    run_directory = shutil.copytree(untrained_talk.out, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    to = ("--to", "loraplus", "--base", "base", "--no_verify", "--out", tmp_path / "own")
    converted(capsys, run_directory, *to)
    assert json.loads((tmp_path / "own/adapter.json").read_text())["settings"]["model"]["path"] == str(base)
    tensors = run_directory / "adapter/adapter.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    error = rejected(capsys, run_directory, "--to", "loraplus", "--base", "base", out=tmp_path / "no")
    assert_mentions(error, "adapter.safetensors", "changed")
    tensors = load_file(base / "model.safetensors")
    save_file({key: x + 1 for key, x in tensors.items()}, base / "model.safetensors")
    error = rejected(capsys, *words, out=tmp_path / "no")  # it was made with another base
    assert_mentions(error, untrained_talk.out, "base.weights", "--allow_different")
    other = (untrained_talk.out, "--to", "loraplus", "--no_verify", "--allow_different", "wieghts")
    assert_mentions(rejected(capsys, *other, out=tmp_path / "no"), "--allow_different", "wieghts")
    words = (*words, "--allow_different", "base.weights", "--no_verify")
    converted(capsys, *words, "--out", tmp_path / "other")


@pytest.mark.slow
def test_a_run_of_an_encoder(untrained, tmp_path, capsys):
    text = converted(capsys, untrained.out, "--to", "peft", "--out", tmp_path / "out")
    assert differences(text)[1] <= 1e-5 * differences(text)[2]
    shutil.rmtree(tmp_path / "out")
    words = (untrained.out, "--to", "peft", "--base", untrained.out, "--scale", 1)
    assert_mentions(rejected(capsys, *words, out=tmp_path / "out"), "--scale")
