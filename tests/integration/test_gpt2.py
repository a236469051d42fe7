"""Whole runs with a tiny GPT-2: training, resuming, devices, evaluation, generation, export, a packed base."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..marks import long
from ..messages import assert_mentions
from ..models.checkpoints.gguf.files import gguf_of
from .gpt2_world import PRODUCTS, write_gpt2
from .language_world import vocabulary
from .test_export import evaluated, near, printed
from .test_language import PROMPT, SHORT
from .test_run import column, interrupt_at, summary_of, tensor_bytes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

ASKED = ("--prompt", PROMPT, "--max_tokens", "8")


@pytest.fixture
def gpt2(talk):
    """The tiny language world with a GPT-2."""
    write_gpt2(talk.model)
    talk.change_config("lora", target_modules=list(PRODUCTS))
    talk.change_config("data", template="plain", max_length=48)
    return talk


def test_a_run_learns_and_its_exports_answer_the_same(gpt2, tmp_path, capsys):
    gpt2.trained("--train.steps", "60", "--train.prompt_tokens", "8")
    summary = summary_of(gpt2.out)
    assert summary["after"]["loss"] < 1 < 2 < summary["before"]["loss"]
    assert summary["answers"]["after"] == "it is white"
    assert summary["trainable"] == 2 * 4 * (32 + 96 + 32 + 32 + 32 + 48 + 48 + 32)
    run, exact = printed(capsys, "generate", gpt2.out, *ASKED), evaluated(capsys, gpt2.out)
    assert exact["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)
    for name, flags in (("peft", ()), ("merged", ("--merged",))):
        printed(capsys, "export", gpt2.out, "--to", tmp_path / name, *flags)
        assert near(evaluated(capsys, tmp_path / name), exact)
        assert printed(capsys, "generate", tmp_path / name, *ASKED) == run
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
    out = gpt2.trained(*SHORT, "--init_adapter", str(tmp_path / "peft"), out=tmp_path / "more")
    assert summary_of(out)["before"]["loss"] == pytest.approx(exact["loss"], rel=1e-4)


def test_an_interrupted_run_resumes_bit_identical(gpt2, tmp_path):
    straight = gpt2.trained(*SHORT, out=tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6)
        assert gpt2.train(*SHORT) == 130
    assert gpt2.train(*SHORT) == 0
    assert tensor_bytes(gpt2.out) == tensor_bytes(straight)


@pytest.mark.parametrize(
    "args",
    [
        ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"),
        long(("--mesh.data", "8")),
        long(("--model.unroll", "true", "--model.remat", "dots", "--model.attention", "blocked")),
        long(("--model.remat", "full", "--model.loss_chunk", "7")),
    ],
    ids=" ".join,
)
def test_the_same_run_computed_otherwise(gpt2, tmp_path, args):
    one, other = gpt2.trained(*SHORT, out=tmp_path / "one"), gpt2.trained(*SHORT, *args)
    for step, loss in column(one, "loss").items():
        assert column(other, "loss")[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("args", [(), long(("--model.quantize_exclude", "[]"))], ids=["default", "all"])
def test_a_packed_base_trains_and_merges_as_the_run_saw_it(gpt2, tmp_path, capsys, args):
    gpt2.trained(*SHORT, "--model.quantize", "nf4", *args)
    summary = summary_of(gpt2.out)
    assert summary["after"]["loss"] < 0.9 * summary["before"]["loss"]
    exact = evaluated(capsys, gpt2.out)
    printed(capsys, "export", gpt2.out, "--merged", "--dequantized", "--to", tmp_path / "same")
    assert evaluated(capsys, tmp_path / "same")["loss"] == pytest.approx(exact["loss"], rel=1e-5)
    printed(capsys, "export", gpt2.out, "--merged", "--to", tmp_path / "merged")
    assert evaluated(capsys, tmp_path / "merged")["loss"] != pytest.approx(exact["loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["F32", long("Q8_0")])
def test_a_gguf_file_gives_the_run_of_its_directory_and_goes_out_again(gpt2, tmp_path, capsys, kind):
    tokens, merges = vocabulary()
    config = json.loads((gpt2.model / "config.json").read_text())
    straight = gpt2.trained(*SHORT, out=tmp_path / "straight")
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.add_bos_token": False,
    }
    path = gguf_of(gpt2.model, tmp_path / "base.gguf", **values)
    gpt2.trained(*SHORT, "--model.path", str(path))
    assert tensor_bytes(gpt2.out) == tensor_bytes(straight)
    exact = evaluated(capsys, gpt2.out)
    dtype, rel = {"F32": ("float32", 1e-4), "Q8_0": ("q8_0", 5e-2)}[kind]
    for name, flags, limit in (
        ("hf", (), 1e-4),
        ("gguf", ("--format", "gguf", "--dtype", dtype), rel),
    ):
        printed(capsys, "export", gpt2.out, "--to", tmp_path / name, "--merged", *flags)
        assert evaluated(capsys, tmp_path / name)["loss"] == pytest.approx(exact["loss"], rel=limit)
    if kind == "Q8_0":  # a run on the file's blocks equals one on their values
        stored = ("--model.path", str(tmp_path / "gguf/model.gguf"))
        wide = gpt2.trained(*SHORT, *stored, out=tmp_path / "wide")
        packed = gpt2.trained(*SHORT, *stored, "--model.quantize", "file", out=tmp_path / "packed")
        for step, loss in column(wide, "loss").items():
            assert column(packed, "loss")[step] == pytest.approx(loss, rel=1e-4)


SPLIT = ("--model.split_fused", "true", "--lora.target_modules", "[q_attn,v_attn]")


def test_adapters_on_queries_and_values_alone(gpt2, tmp_path, capsys):
    gpt2.trained(*SHORT, *SPLIT)
    summary = summary_of(gpt2.out)
    assert summary["trainable"] == 2 * 4 * 2 * (32 + 32)
    assert summary["after"]["loss"] < summary["before"]["loss"]
    run, exact = printed(capsys, "generate", gpt2.out, *ASKED), evaluated(capsys, gpt2.out)
    for name, flags in (("peft", ()), ("merged", ("--merged",))):
        printed(capsys, "export", gpt2.out, "--to", tmp_path / name, *flags)
        assert near(evaluated(capsys, tmp_path / name), exact)
        assert printed(capsys, "generate", tmp_path / name, *ASKED) == run
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
    out = gpt2.trained(*SHORT, *SPLIT, "--init_adapter", str(tmp_path / "peft"), out=tmp_path / "on")
    assert summary_of(out)["before"]["loss"] == pytest.approx(exact["loss"], rel=1e-5)


def test_split_layers_on_several_devices_and_a_packed_base(gpt2, tmp_path, capsys):
    one = gpt2.trained(*SHORT, *SPLIT, out=tmp_path / "one")
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    other = gpt2.trained(*SHORT, *SPLIT, *mesh, out=tmp_path / "other")
    for step, loss in column(one, "loss").items():
        assert column(other, "loss")[step] == pytest.approx(loss, rel=1e-4)
    gpt2.trained(*SHORT, *SPLIT, "--model.quantize", "nf4", "--lora.init", "loftq")
    assert summary_of(gpt2.out)["after"]["loss"] < summary_of(gpt2.out)["before"]["loss"]
    exact = evaluated(capsys, gpt2.out)
    printed(capsys, "export", gpt2.out, "--merged", "--dequantized", "--to", tmp_path / "same")
    assert evaluated(capsys, tmp_path / "same")["loss"] == pytest.approx(exact["loss"], rel=1e-5)


def test_targets_of_the_other_layout_name_the_setting(gpt2, capsys):
    for layout, target in (("false", "[q_attn]"), ("false", ".*(q|v)_attn"), ("true", "[c_attn]")):
        capsys.readouterr()
        flags = ("--model.split_fused", layout, "--lora.target_modules", target)
        assert gpt2.train(*SHORT, *flags) == 2
        words = ("lora.target_modules", target.strip("[]"), "model.split_fused", "c_attn as q_attn", layout)
        assert_mentions(capsys.readouterr().err, *words)
    assert not gpt2.out.exists()


def test_a_model_without_a_chat_template_says_what_to_set(gpt2, capsys):
    capsys.readouterr()
    assert gpt2.train(*SHORT, "--data.template", "model") == 2
    assert_mentions(capsys.readouterr().err, "no chat template", "data.template", "plain")
    assert gpt2.train(*SHORT, "--data.max_length", "65") == 2
    assert_mentions(capsys.readouterr().err, "data.max_length", 64, 65)


@pytest.mark.long
def test_questions_with_choices(gpt2, capsys):
    rows = gpt2.directory / "questions.jsonl"
    out = gpt2.trained(*SHORT, "--task", "multiple_choice", "--data.path", str(rows))
    after = summary_of(out)["after"]
    assert after["loss"] < summary_of(out)["before"]["loss"] - 1
    assert evaluated(capsys, out)["loss"] == pytest.approx(after["loss"], rel=1e-5)
