"""Runs on a quantized base: they learn, resume, spread over devices and export as runs on a wide one do."""

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from loraplus_jax.cli.commands import main
from loraplus_jax.data.fetch import resolve
from loraplus_jax.quantization.packed_array import is_packed
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.training.setup import build_model, load_model

from ..marks import long
from ..messages import assert_mentions
from . import language_world as tiny
from .runs import (
    MESH,
    SHORT_TALK,
    assert_resumes,
    assert_same_losses,
    evaluated,
    flags,
    printed,
    report_of,
    summary_of,
)

pytestmark = pytest.mark.usefixtures("cache")

NF4 = (*SHORT_TALK, "--model.quantize", "nf4")


def parts_of(world, *overrides):
    """The loaded model of the world's settings."""
    settings = parse_settings(world.config, [*overrides])
    directory = resolve(settings.model.path, "model")
    return load_model(settings, directory, build_model(settings, directory, None, settings.applied))


def packed_paths(parts):
    leaves = jax.tree_util.tree_leaves_with_path(parts.frozen, is_leaf=is_packed)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves if is_packed(x)}


@pytest.mark.slow
def test_a_run_learns_resumes_and_exports(talk, tmp_path, capsys):
    straight = talk.trained(*NF4, out=tmp_path / "straight")
    summary = summary_of(straight)
    assert summary["after"]["loss"] < 0.9 * summary["before"]["loss"]
    wide = sum(tensor.size for tensor in load_file(talk.model / "model.safetensors").values())
    assert summary["total"] == summary["trainable"] + wide
    assert_resumes(talk, straight, *NF4)
    found = evaluated(capsys, talk.out)["loss"]
    assert found == pytest.approx(summary["after"]["loss"], rel=1e-5)
    printed(capsys, "export", talk.out, "--to", tmp_path / "peft")
    # Merged into the original weights, which the packed ones round.
    printed(capsys, "export", talk.out, "--merged", "--to", tmp_path / "merged")
    merged, original = (load_file(d / "model.safetensors") for d in (tmp_path / "merged", talk.model))
    name = "model.layers.0.mlp.up_proj.weight"
    peft = load_file(tmp_path / "peft/adapter_model.safetensors")
    key = f"base_model.model.{name.removesuffix('.weight')}"
    delta = 4.0 * peft[f"{key}.lora_B.weight"] @ peft[f"{key}.lora_A.weight"]
    np.testing.assert_allclose(merged[name], original[name] + delta, rtol=0, atol=1e-5)
    # Merged into the packed weights, it is the model that was trained.
    text = printed(capsys, "export", talk.out, "--merged", "--dequantized", "--to", tmp_path / "same")
    same = load_file(tmp_path / "same/model.safetensors")
    names = [name for name in original if "proj" in name]
    lost = sum(np.square(same[n] - merged[n]).sum() for n in names)
    assert_mentions(text, f"{np.sqrt(lost / sum(np.square(original[n]).sum() for n in names)):.2%}", "packed")
    assert evaluated(capsys, tmp_path / "same")["loss"] == pytest.approx(found, rel=1e-5)
    assert evaluated(capsys, tmp_path / "merged")["loss"] != pytest.approx(found, rel=1e-4)


def test_what_is_quantized(talk):
    packed = packed_paths(parts_of(talk, *NF4))
    names = [f"self_attn/{n}_proj" for n in "qkvo"] + [f"mlp/{n}_proj" for n in ("gate", "up", "down")]
    assert set(packed) == {f"params/layers/{name}/kernel" for name in names}
    assert {leaf.kind for leaf in packed.values()} == {"nf4"}
    some = packed_paths(parts_of(talk, *NF4, "--model.quantize_exclude", "[o_proj, mlp/down_proj]"))
    assert set(some) - set(packed) == {"params/embed_tokens/embedding", "params/lm_head/kernel"}
    assert set(packed) - set(some) == {f"params/layers/{n}_proj/kernel" for n in ("self_attn/o", "mlp/down")}
    saved = flags("--lora.target_modules [q_proj] --lora.modules_to_save [o_proj]")
    assert "params/layers/self_attn/o_proj/kernel" not in packed_paths(parts_of(talk, *NF4, *saved))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MESH, long(("--mesh.data", "1", "--mesh.fsdp", "4"))], ids=" ".join)
def test_eight_devices_and_one_agree(talk, tmp_path, mesh):
    one = talk.trained(*NF4, out=tmp_path / "one")
    assert_same_losses(talk.trained(*NF4, *mesh), one)


@pytest.mark.long
def test_a_member_of_a_sweep_over_one_quantized_base_is_the_run_with_its_settings(talk, tmp_path):
    assert_member_is_its_run(talk, tmp_path / "sweep", *NF4)


def assert_member_is_its_run(talk, out, *args):
    """A sweep's member on a language model ends with the loss of the single run with its settings."""
    search = "--sweep.learning_rates [2e-3,5e-3] --sweep.lr_ratios [4] --sweep.report_seeds 2"
    search += " --sweep.rungs [0.5] --sweep.keep 0.5 --sweep.control false"
    assert main(["sweep", str(talk.config), "--output_dir", str(out), *args, *flags(search)]) == 0
    report = report_of(out)
    run = next(run for run in report["runs"] if run["arm"] == "lora_plus")
    rate = str(report["chosen"]["lora_plus"]["learning_rate"])
    one = talk.trained(*args, "--seed", str(run["seed"]), "--optimizer.learning_rate", rate)
    assert summary_of(one)["after"]["loss"] == pytest.approx(run["curve"][-1][1], rel=1e-5)


def gguf_of(talk, kinds):
    """The world's model as a GGUF file with matrices in blocks: names in a layer to the type in each layer."""
    weights, raw = load_file(talk.model / "model.safetensors"), {}
    for layer in range(tiny.LAYERS):
        for (ours, theirs), types in kinds.items():
            number = gguf.GGMLQuantizationType[types[layer]]
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            raw[f"blk.{layer}.{theirs}.weight"] = types[layer], gguf.quants.quantize(weight, number)
    return tiny.write_gguf_of(talk.model, talk.directory / "tiny.gguf", raw=raw)


BLOCKS = {("self_attn.v_proj", "attn_v"): ("Q4_1", "Q4_1"), ("mlp.up_proj", "ffn_up"): ("Q8_0", "Q8_0")}


@pytest.mark.long
@pytest.mark.slow
def test_the_blocks_of_a_gguf_file_are_trained_on_as_they_are(talk, tmp_path):
    options = (*SHORT_TALK, "--model.path", str(gguf_of(talk, BLOCKS)))
    packed = packed_paths(parts_of(talk, *options, "--model.quantize", "file"))
    assert {name: leaf.kind for name, leaf in packed.items()} == {
        "params/layers/self_attn/v_proj/kernel": "q4_1",
        "params/layers/mlp/up_proj/kernel": "q8_0",
    }
    dense = parts_of(talk, *options, "--model.quantize", "none").frozen["params"]["layers"]
    for name, leaf in packed.items():
        block, layer, _ = name.removeprefix("params/layers/").split("/")
        np.testing.assert_array_equal(leaf.dequantize(), dense[block][layer]["kernel"])
    runs = [
        talk.trained(*options, "--model.quantize", kind, out=tmp_path / kind) for kind in ("file", "none")
    ]
    assert_same_losses(*runs, rel=1e-5)


def test_loading_holds_one_layer_s_values(talk, monkeypatch):
    """Every read is of one layer, and what stays is packed."""
    from loraplus_jax.models.checkpoints import quantized as packing

    sizes, original = [], packing.pack_matrix
    monkeypatch.setattr(
        packing, "pack_matrix", lambda kind, rows: (sizes.append(rows.shape), original(kind, rows))[1]
    )
    parts_of(talk, *NF4)
    assert len(sizes) == 7 * tiny.LAYERS
    assert max(sizes) == (tiny.INNER, tiny.HIDDEN)


def test_a_file_with_mixed_layers_is_named(talk, capsys):
    path = gguf_of(talk, {("self_attn.v_proj", "attn_v"): ("Q4_1", "Q8_0")})
    error = talk.rejected(capsys, "--model.path", str(path), "--model.quantize", "file")
    assert_mentions(error, "v_proj", "Q4_1", "Q8_0", "model.quantize_exclude")
