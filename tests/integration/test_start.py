"""Runs whose adapters start from the base: they begin with its function, and what they save is for all of it."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from loraplus_jax.interop.adapter_directory import load_adapter
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.training.setup import prepare

from ..marks import long
from ..messages import assert_mentions
from .runs import (
    MESH,
    NO_PROMPT,
    SHORT,
    assert_same_losses,
    evaluated,
    flags,
    interrupted,
    printed,
    result_of,
    summary_of,
    undisturbed,
)
from .test_quantized_base import assert_member_is_its_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

FIRST = (*NO_PROMPT, *SHORT, *flags("--lora.rank 4 --optimizer.learning_rate 1e-3"))
PISSA = (*FIRST, "--lora.init", "pissa")
NF4 = (*FIRST, "--model.quantize", "nf4")
LOFTQ = (*NF4, "--lora.init", "loftq")


@pytest.fixture(scope="module")
def before(first_talk, tmp_path_factory, cache):
    """The loss of the base, before training."""
    return summary_of(undisturbed(first_talk, tmp_path_factory, FIRST))["before"]["loss"]


@pytest.mark.parametrize("init", ["pissa", "lora_ga", long("olora"), long("orthogonal")])
def test_the_start_is_the_base_and_the_saved_adapter_what_was_trained(talk, tmp_path, capsys, before, init):
    run = talk.trained(*FIRST, "--lora.init", init)
    start, end = (summary_of(run)[when]["loss"] for when in ("before", "after"))
    assert start == pytest.approx(before, rel=1e-5)
    assert end < 0.99 * before
    saved = load_adapter(run / "adapter")
    assert {spec.rank for spec in saved.specs.values()} == {4 if init == "orthogonal" else 8}
    assert evaluated(capsys, run)["loss"] == pytest.approx(end, rel=1e-5)
    for name, more in (("peft", ()), ("merged", ("--merged",))):
        printed(capsys, "export", run, "--to", tmp_path / name, *more)
        assert evaluated(capsys, tmp_path / name)["loss"] == pytest.approx(end, rel=1e-5)


@pytest.mark.long
def test_lora_one_starts_with_a_step(talk, capsys, before):
    run = talk.trained(*FIRST, "--lora.init", "lora_one")
    summary = summary_of(run)
    assert summary["before"]["loss"] < 0.999 * before
    assert {spec.rank for spec in load_adapter(run / "adapter").specs.values()} == {4}
    assert evaluated(capsys, run)["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)


@pytest.mark.parametrize("args", [PISSA, long(LOFTQ)], ids=["pissa", "loftq"])
def test_a_run_resumes_from_its_saved_start(talk, tmp_path, args, capsys):
    straight = talk.trained(*args, out=tmp_path / "straight")
    interrupted(talk, 6, *args)
    # Another start than this machine would make again, as another machine might.
    start = talk.out / "start/adapter.safetensors"
    saved = start.read_bytes()
    assert talk.train(*args) == 0
    assert start.read_bytes() == saved
    assert result_of(talk.out) == result_of(straight)
    start.write_bytes(saved[:-8])
    assert_mentions(talk.rejected(capsys, *args, "--train.select", "last"), start, "damaged")


def test_eight_devices_and_one_agree(talk, tmp_path):
    args = (*FIRST, "--lora.init", "lora_ga")  # whose gradient is of all devices
    one = talk.trained(*args, out=tmp_path / "one")
    assert_same_losses(talk.trained(*args, *MESH), one)


@pytest.mark.long
def test_loftq_starts_nearer_to_the_original_model(talk, tmp_path, capsys):
    run = talk.trained(*LOFTQ)
    after = summary_of(run)["after"]["loss"]
    weights, plain, wide = (weights_at_the_start(talk, *args) for args in (LOFTQ, NF4, FIRST))
    for name, weight in wide.items():
        lost = np.linalg.norm(plain[name] - weight)
        assert np.linalg.norm(weights[name] - weight) < 0.8 * lost, name
    assert evaluated(capsys, run)["loss"] == pytest.approx(after, rel=1e-5)
    # Merged into the quantized weights it is what was trained; on the original it is the change since the start.
    printed(capsys, "export", run, "--merged", "--dequantized", "--to", tmp_path / "same")
    assert evaluated(capsys, tmp_path / "same")["loss"] == pytest.approx(after, rel=1e-5)
    printed(capsys, "export", run, "--merged", "--to", tmp_path / "merged")
    saved = load_adapter(run / "adapter")
    merged, original = (load_file(d / "model.safetensors") for d in (tmp_path / "merged", talk.model))
    factors, start = (tree["layers"]["self_attn"]["q_proj"] for tree in (saved.lora, saved.start))
    scale = saved.specs["layers/self_attn/q_proj"].scale
    change = scale * sum(sign * x["lora_a"][0] @ x["lora_b"][0] for x, sign in ((factors, 1), (start, -1)))
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(merged[name] - original[name], np.asarray(change).T, atol=1e-5)
    printed(capsys, "export", run, "--to", tmp_path / "peft")
    peft = load_file(tmp_path / "peft/adapter_model.safetensors")
    key = f"base_model.model.{name.removesuffix('.weight')}"
    # Its settings are of the original weights too, so it is what was merged into them.
    assert evaluated(capsys, tmp_path / "peft")["loss"] == pytest.approx(
        evaluated(capsys, tmp_path / "merged")["loss"], rel=1e-5
    )
    peft_change = scale * peft[f"{key}.lora_B.weight"] @ peft[f"{key}.lora_A.weight"]
    np.testing.assert_allclose(peft_change, np.asarray(change).T, atol=1e-5)


def weights_at_the_start(talk, *args):
    """The adapted weights that the model computes with before the first step."""
    parts = prepare(parse_settings(talk.config, args)).parts
    params = parts.frozen["params"]["layers"]["self_attn"]
    found = {}
    for name, pair in parts.trainable["lora"]["layers"]["self_attn"].items():
        leaf = params[name]["kernel"]
        wide = leaf.dequantize() if hasattr(leaf, "dequantize") else leaf
        spec = parts.specs[f"layers/self_attn/{name}"]
        found[name] = np.asarray(wide) + spec.scale * np.asarray(pair["lora_a"] @ pair["lora_b"])
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("args", [PISSA, LOFTQ], ids=["pissa", "loftq"])
def test_a_member_of_a_sweep_is_the_run_with_its_settings(talk, tmp_path, args):
    assert_member_is_its_run(talk, tmp_path / "sweep", *args)
