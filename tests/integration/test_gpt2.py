"""Whole runs with a tiny GPT-2 on its own files: training, resuming, export to all formats, a quantized base."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..marks import long
from ..messages import assert_mentions
from ..models.checkpoints.gguf.files import gguf_of
from .gpt2_world import PRODUCTS, write_gpt2
from .language_world import gguf_tokenizer
from .runs import (
    MESH,
    SHORT_TALK,
    assert_exports_answer_the_same,
    assert_resumes,
    assert_same_losses,
    evaluated,
    flags,
    printed,
    summary_of,
    tensor_bytes,
    undisturbed,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

SPLIT = (*SHORT_TALK, *flags("--model.split_fused true --lora.target_modules [q_attn,v_attn]"))


@pytest.fixture(scope="module")
def first_gpt2(first_talk, tmp_path_factory):
    """The tiny language world with a GPT-2, never changed."""
    world = first_talk.copy(tmp_path_factory.mktemp("gpt2"))
    write_gpt2(world.model)
    world.change_config("lora", target_modules=list(PRODUCTS))
    world.change_config("data", template="plain", max_length=48)
    return world


@pytest.fixture
def gpt2(talk, first_gpt2, tmp_path):
    return first_gpt2.copy(tmp_path)


@pytest.fixture(scope="module")
def short(first_gpt2, tmp_path_factory, cache):
    """A short run that others are compared with."""
    return undisturbed(first_gpt2, tmp_path_factory, SHORT_TALK)


@pytest.fixture(scope="module")
def split(first_gpt2, tmp_path_factory, cache):
    """One whose queries and values are adapted alone."""
    return undisturbed(first_gpt2, tmp_path_factory, SPLIT)


def test_a_run_learns_and_its_exports_answer_the_same(gpt2, tmp_path, capsys):
    gpt2.trained("--train.steps", "60", "--train.prompt_tokens", "8")
    summary = summary_of(gpt2.out)
    assert summary["after"]["loss"] < 1 < 2 < summary["before"]["loss"]
    assert summary["answers"]["after"] == "it is white"
    assert summary["trainable"] == 2 * 4 * (32 + 96 + 32 + 32 + 32 + 48 + 48 + 32)
    exact = assert_exports_answer_the_same(capsys, gpt2.out, tmp_path)
    assert exact["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)
    options = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert options["fan_in_fan_out"] is True
    factors = load_file(tmp_path / "peft/adapter_model.safetensors")
    name = "transformer.h.1.attn.c_attn"
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((4, 32), (96, 4))
    merged, base = (load_file(d / "model.safetensors") for d in (tmp_path / "merged", gpt2.model))
    weight = base[f"{name.removeprefix('transformer.')}.weight"]
    scale = options["lora_alpha"] / options["r"]
    key = next(key for key in merged if key.endswith(f"{name.removeprefix('transformer.')}.weight"))
    np.testing.assert_allclose(merged[key], weight + scale * (b @ a).T, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    # The adapter starts a new run, also without our own notes, as PEFT would have written it.
    (tmp_path / "peft/loraplus.json").unlink()
    out = gpt2.trained(*SHORT_TALK, "--init_adapter", str(tmp_path / "peft"), out=tmp_path / "more")
    assert summary_of(out)["before"]["loss"] == pytest.approx(exact["loss"], rel=1e-4)


@pytest.mark.long
def test_an_interrupted_run_resumes_bit_identical(gpt2, short):
    assert_resumes(gpt2, short, *SHORT_TALK)


@pytest.mark.parametrize(
    "args",
    [
        MESH,
        long(flags("--mesh.data 8")),
        long(flags("--model.unroll true --model.remat dots --model.attention blocked")),
        long(flags("--model.remat full --model.loss_chunk 7")),
    ],
    ids=" ".join,
)
def test_the_same_run_computed_otherwise(gpt2, short, args):
    assert_same_losses(gpt2.trained(*SHORT_TALK, *args), short)


@pytest.mark.parametrize("args", [(), long(("--model.quantize_exclude", "[]"))], ids=["default", "all"])
def test_a_quantized_base_trains_and_merges_as_the_run_saw_it(gpt2, tmp_path, capsys, args):
    gpt2.trained(*SHORT_TALK, "--model.quantize", "nf4", *args)
    summary = summary_of(gpt2.out)
    assert summary["after"]["loss"] < 0.9 * summary["before"]["loss"]
    exact = evaluated(capsys, gpt2.out)
    printed(capsys, "export", gpt2.out, "--merged", "--dequantized", "--to", tmp_path / "same")
    assert evaluated(capsys, tmp_path / "same")["loss"] == pytest.approx(exact["loss"], rel=1e-5)
    printed(capsys, "export", gpt2.out, "--merged", "--to", tmp_path / "merged")
    assert evaluated(capsys, tmp_path / "merged")["loss"] != pytest.approx(exact["loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["F32", long("Q8_0")])
def test_a_gguf_file_gives_the_run_of_its_directory_and_goes_out_again(gpt2, short, tmp_path, capsys, kind):
    end = json.loads((gpt2.model / "config.json").read_text())["eos_token_id"]
    path = gguf_of(gpt2.model, tmp_path / "base.gguf", **gguf_tokenizer(end, end))
    gpt2.trained(*SHORT_TALK, "--model.path", str(path))
    assert tensor_bytes(gpt2.out) == tensor_bytes(short)
    exact = evaluated(capsys, gpt2.out)
    dtype, rel = {"F32": ("float32", 1e-4), "Q8_0": ("q8_0", 5e-2)}[kind]
    for name, more, limit in (("hf", (), 1e-4), ("gguf", ("--format", "gguf", "--dtype", dtype), rel)):
        printed(capsys, "export", gpt2.out, "--to", tmp_path / name, "--merged", *more)
        assert evaluated(capsys, tmp_path / name)["loss"] == pytest.approx(exact["loss"], rel=limit)
    if kind == "Q8_0":  # a run on the file's blocks equals one on their values
        stored = ("--model.path", str(tmp_path / "gguf/model.gguf"))
        wide = gpt2.trained(*SHORT_TALK, *stored, out=tmp_path / "wide")
        packed = gpt2.trained(*SHORT_TALK, *stored, "--model.quantize", "file", out=tmp_path / "packed")
        assert_same_losses(packed, wide)


def test_adapters_on_queries_and_values_alone(gpt2, split, tmp_path, capsys):
    summary = summary_of(split)
    assert summary["trainable"] == 2 * 4 * 2 * (32 + 32)
    assert summary["after"]["loss"] < summary["before"]["loss"]
    exact = assert_exports_answer_the_same(capsys, split, tmp_path)
    options = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in options["target_modules"]} == {"c_attn"}
    assert (options["fan_in_fan_out"], options["r"], options["rank_pattern"]) == (True, 8, {})
    # Keys, and all other weights, are the base's.
    merged, base = (load_file(d / "model.safetensors") for d in (tmp_path / "merged", gpt2.model))
    for name, weight in base.items():
        columns = slice(32, 64) if name.endswith("c_attn.weight") else slice(None)
        np.testing.assert_array_equal(merged[name][..., columns], weight[..., columns])
        assert np.array_equal(merged[name], weight) != name.endswith("c_attn.weight")
    # The exported adapter starts a new run.
    out = gpt2.trained(*SPLIT, "--init_adapter", str(tmp_path / "peft"))
    assert summary_of(out)["before"]["loss"] == pytest.approx(exact["loss"], rel=1e-5)


@pytest.mark.long
def test_split_layers_on_several_devices(gpt2, split):
    assert_same_losses(gpt2.trained(*SPLIT, *MESH), split)


def test_split_layers_of_a_quantized_base(gpt2, tmp_path, capsys):
    gpt2.trained(*SPLIT, "--model.quantize", "nf4", "--lora.init", "loftq")
    assert summary_of(gpt2.out)["after"]["loss"] < summary_of(gpt2.out)["before"]["loss"]
    exact = evaluated(capsys, gpt2.out)
    printed(capsys, "export", gpt2.out, "--merged", "--dequantized", "--to", tmp_path / "same")
    assert evaluated(capsys, tmp_path / "same")["loss"] == pytest.approx(exact["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "target"), [("false", "[q_attn]"), ("false", ".*(q|v)_attn"), ("true", "[c_attn]")]
)
def test_targets_of_the_other_layout_name_the_setting(gpt2, capsys, layout, target):
    error = gpt2.rejected(capsys, "--model.split_fused", layout, "--lora.target_modules", target)
    words = ("lora.target_modules", target.strip("[]"), "model.split_fused", "c_attn as q_attn", layout)
    assert_mentions(error, *words)
    assert not gpt2.out.exists()


def test_a_model_without_a_chat_template_says_what_to_set(gpt2, capsys):
    error = gpt2.rejected(capsys, "--data.template", "model")
    assert_mentions(error, "no chat template", "data.template", "plain")
    assert_mentions(gpt2.rejected(capsys, "--data.max_length", "65"), "data.max_length", 64, 65)


@pytest.mark.long
def test_questions_with_choices(gpt2, capsys):
    rows = gpt2.directory / "questions.jsonl"
    out = gpt2.trained(*SHORT_TALK, "--task", "multiple_choice", "--data.path", str(rows))
    after = summary_of(out)["after"]
    assert after["loss"] < summary_of(out)["before"]["loss"] - 1
    assert evaluated(capsys, out)["loss"] == pytest.approx(after["loss"], rel=1e-5)
