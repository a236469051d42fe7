"""Whole runs with tiny Gemmas and Phi-3s: several devices, evaluation, generation, export, a quantized base."""

import json
import re
import shlex

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from loraplus_jax.models.checkpoints.name_table import expand, shape_in_file
from loraplus_jax.models.families import family_of

from ..marks import long
from ..pages import blocks
from .language_world import PRODUCTS
from .runs import (
    MESH,
    SHORT_TALK,
    assert_exports_answer_the_same,
    assert_same_losses,
    evaluated,
    flags,
    printed,
    summary_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

GEMMA = {"head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 12}
FAMILIES = {
    "gemma2": (GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 9.0}, PRODUCTS),
    "gemma3_text": (GEMMA, PRODUCTS),
    "qwen3": ({"head_dim": 8, "tie_word_embeddings": True}, PRODUCTS),
    "phi3": ({"partial_rotary_factor": 0.5}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
}


def write_family(directory, kind):
    """The tiny language world's directory with another family's config and random weights."""
    config = json.loads((directory / "config.json").read_text()) | {"model_type": kind} | FAMILIES[kind][0]
    (directory / "config.json").write_text(json.dumps(config))
    family, rng = family_of(kind), np.random.default_rng(2)
    ours = family.config.from_hf(config)
    ids = jax.ShapeDtypeStruct((1, 2), np.int32)
    shapes = jax.eval_shape(family.model(ours).init, jax.random.key(0), ids)["params"]
    content = {}
    for rule in family.name_table(ours).rules:
        leaf = shapes
        for part in rule.path.split("/"):
            leaf = leaf[part]
        shape = shape_in_file(rule, leaf)
        for name in expand(rule, leaf):
            values = rng.normal(size=shape) / np.sqrt(shape[-1]) * (1 + rule.path.startswith("lm_head"))
            name = name if name.startswith("lm_head") else f"model.{name}"
            content[name] = (
                values if len(shape) > 1 else 0 * values + (not kind.startswith("gemma"))
            ).astype(np.float32)
    save_file(content, directory / "model.safetensors")


@pytest.fixture
def tiny(request, talk):
    write_family(talk.model, request.param)
    talk.change_config("lora", target_modules=FAMILIES[request.param][1])
    return talk


@pytest.mark.parametrize("tiny", [long("phi3"), long("gemma3_text"), long("gemma2")], indirect=True)
def test_a_run_on_eight_devices_and_its_exports(tiny, tmp_path, capsys):
    one = tiny.trained(*SHORT_TALK, out=tmp_path / "one")
    other = tiny.trained(*SHORT_TALK, *MESH, *("--model.remat", "dots", "--model.loss_chunk", "7"))
    assert_same_losses(other, one)
    exact = assert_exports_answer_the_same(capsys, one, tmp_path)
    assert exact["loss"] < summary_of(one)["before"]["loss"]
    options = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    names = {name.rpartition(".")[2] for name in options["target_modules"]}
    assert names == set(yaml.safe_load(tiny.config.read_text())["lora"]["target_modules"])
    # The adapter starts a new run, also without our own notes, as PEFT would have written it.
    (tmp_path / "peft/loraplus.json").unlink()
    more = tiny.trained(*SHORT_TALK, "--init_adapter", str(tmp_path / "peft"), out=tmp_path / "more")
    assert summary_of(more)["before"]["loss"] == pytest.approx(exact["loss"], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("tiny", ["gemma3_text", "gemma2", "phi3"], indirect=True)
def test_a_quantized_base_trains_and_merges_as_the_run_saw_it(tiny, tmp_path, capsys):
    tiny.trained(*SHORT_TALK, "--model.quantize", "nf4")
    assert summary_of(tiny.out)["after"]["loss"] < summary_of(tiny.out)["before"]["loss"]
    exact = evaluated(capsys, tiny.out)
    printed(capsys, "export", tiny.out, "--merged", "--dequantized", "--to", tmp_path / "same")
    assert evaluated(capsys, tmp_path / "same")["loss"] == pytest.approx(exact["loss"], rel=1e-5)


TINY = flags("--data.max_length 64 --optimizer.warmup_steps 2 --train.epochs 1 --train.prompt_tokens 8")


@pytest.mark.parametrize("tiny", ["qwen3"], indirect=True)
def test_the_commands_of_the_page_on_one_gpu_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.model.rename("Qwen3-0.6B")
    (config,) = blocks("one_gpu", "yaml")[""]
    (tmp_path / "chat.yaml").write_text(config)
    # The tiny model takes 64 tokens. A plan would compile for longer than all else takes; tests/plan has them.
    text = "".join(blocks("one_gpu", "bash")[""]).replace("--max_tokens 200", "--max_tokens 32")
    commands = re.findall(r"^loraplus (?!plan)(.*)", text, flags=re.M)
    for command in (shlex.split(line, comments=True) for line in commands):
        printed(capsys, *command, *(TINY if command[1] == "chat.yaml" else ()))
    assert len(commands) == 7
    assert (tmp_path / "lora/adapter.gguf").exists()
    summary = summary_of(tmp_path / "runs/chat")
    assert summary["after"]["loss"] < summary["before"]["loss"]
    options = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (options["r"], options["base_model_name_or_path"]) == (16, "Qwen/Qwen3-0.6B")
    assert (tmp_path / "merged/config.json").exists()
