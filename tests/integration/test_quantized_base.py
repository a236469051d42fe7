"""Runs on a packed base: they learn, resume, spread over devices and export as runs on a wide one do."""

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

from ..messages import assert_mentions
from . import language_world as tiny
from .test_run import column, interrupt_at, printed_json, summary_of, tensor_bytes
from .test_sweep import report_of

pytestmark = pytest.mark.usefixtures("cache")

NF4 = ("--model.quantize", "nf4", "--train.prompt", "null", "--train.prompt_tokens", "64")
SHORT = (
    *NF4,
    "--train.steps",
    "8",
    "--train.eval_every",
    "4",
    "--train.log_every",
    "2",
    "--optimizer.eps",
    "1e-3",
)


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
    straight = talk.trained(*SHORT, out=tmp_path / "straight")
    summary = summary_of(straight)
    assert summary["after"]["loss"] < 0.9 * summary["before"]["loss"]
    wide = sum(tensor.size for tensor in load_file(talk.model / "model.safetensors").values())
    assert summary["total"] == summary["trainable"] + wide
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6)
        assert talk.train(*SHORT) == 130
    assert talk.train(*SHORT) == 0
    assert tensor_bytes(talk.out) == tensor_bytes(straight)
    capsys.readouterr()
    found = printed_json(capsys, "eval", str(talk.out))
    assert found["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)
    assert main(["export", str(talk.out), "--to", str(tmp_path / "peft")]) == 0
    # Merged into the original weights, which the packed ones round.
    assert main(["export", str(talk.out), "--merged", "--to", str(tmp_path / "merged")]) == 0
    merged, original = (load_file(d / "model.safetensors") for d in (tmp_path / "merged", talk.model))
    name = "model.layers.0.mlp.up_proj.weight"
    peft = load_file(tmp_path / "peft/adapter_model.safetensors")
    key = f"base_model.model.{name.removesuffix('.weight')}"
    delta = 4.0 * peft[f"{key}.lora_B.weight"] @ peft[f"{key}.lora_A.weight"]
    np.testing.assert_allclose(merged[name], original[name] + delta, rtol=0, atol=1e-5)
    # Merged into the packed weights, it is the model that was trained.
    capsys.readouterr()
    assert main(["export", str(talk.out), "--merged", "--dequantized", "--to", str(tmp_path / "same")]) == 0
    same = load_file(tmp_path / "same/model.safetensors")
    lost, of = zip(
        *(
            (np.square(same[n] - merged[n]).sum(), np.square(x).sum())
            for n, x in original.items()
            if "proj" in n
        ),
        strict=True,
    )
    assert_mentions(capsys.readouterr().out, f"{np.sqrt(sum(lost) / sum(of)):.2%}", "packed")
    assert printed_json(capsys, "eval", str(tmp_path / "same"))["loss"] == pytest.approx(
        found["loss"], rel=1e-5
    )
    assert printed_json(capsys, "eval", str(tmp_path / "merged"))["loss"] != pytest.approx(
        found["loss"], rel=1e-4
    )


def test_what_is_packed(talk):
    packed = packed_paths(parts_of(talk, *NF4))
    names = [f"self_attn/{n}_proj" for n in "qkvo"] + [f"mlp/{n}_proj" for n in ("gate", "up", "down")]
    assert set(packed) == {f"params/layers/{name}/kernel" for name in names}
    assert {leaf.kind for leaf in packed.values()} == {"nf4"}
    some = packed_paths(parts_of(talk, *NF4, "--model.quantize_exclude", "[o_proj, mlp/down_proj]"))
    assert set(some) - set(packed) == {"params/embed_tokens/embedding", "params/lm_head/kernel"}
    assert set(packed) - set(some) == {f"params/layers/{n}_proj/kernel" for n in ("self_attn/o", "mlp/down")}
    trained = packed_paths(
        parts_of(talk, *NF4, "--lora.target_modules", "[q_proj]", "--lora.modules_to_save", "[o_proj]")
    )
    assert "params/layers/self_attn/o_proj/kernel" not in trained


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"),
        pytest.param(("--mesh.data", "1", "--mesh.fsdp", "4"), marks=pytest.mark.long),
    ],
)
def test_eight_devices_and_one_agree(talk, tmp_path, mesh):
    one = talk.trained(*SHORT, out=tmp_path / "one")
    many = talk.trained(*SHORT, *mesh)
    for step, loss in column(one, "loss").items():
        assert column(many, "loss")[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.long
@pytest.mark.slow
def test_a_sweep_over_one_packed_base(talk, tmp_path):
    """A member of its population is the run with the same settings."""
    search = (
        "--sweep.learning_rates",
        "[2e-3,5e-3]",
        "--sweep.lr_ratios",
        "[4]",
        "--sweep.report_seeds",
        "2",
    )
    flags = (*SHORT, *search, "--sweep.rungs", "[0.5]", "--sweep.keep", "0.5")
    assert main(["sweep", str(talk.config), "--output_dir", str(tmp_path / "sweep"), *flags]) == 0
    report = report_of(tmp_path / "sweep")
    run, _ = [run for run in report["runs"] if run["arm"] == "lora_plus"]
    rate = report["chosen"]["lora_plus"]["learning_rate"]
    one = talk.trained(
        *SHORT, "--seed", str(run["seed"]), "--optimizer.learning_rate", str(rate), "--lora.lr_ratio", "4"
    )
    assert summary_of(one)["after"]["loss"] == pytest.approx(run["curve"][-1][1], rel=1e-5)


def quantized(value, kind):
    number = gguf.GGMLQuantizationType[kind]
    return kind, gguf.quants.quantize(value, number)


def gguf_of(talk, kinds):
    """The world's model as a GGUF file with matrices in blocks: names in a layer to the type in each layer."""
    weights, raw = load_file(talk.model / "model.safetensors"), {}
    for layer in range(tiny.LAYERS):
        for (ours, theirs), types in kinds.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            raw[f"blk.{layer}.{theirs}.weight"] = quantized(weight, types[layer])
    return tiny.write_gguf_of(talk.model, talk.directory / "tiny.gguf", raw=raw)


BLOCKS = {("self_attn.v_proj", "attn_v"): ("Q4_1", "Q4_1"), ("mlp.up_proj", "ffn_up"): ("Q8_0", "Q8_0")}


@pytest.mark.slow
def test_the_blocks_of_a_gguf_file_are_trained_on_as_they_are(talk, tmp_path):
    path = gguf_of(talk, BLOCKS)
    options = (*SHORT, "--model.path", str(path))
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
    losses = [column(run, "loss") for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("--model.quantize", "nf5"), ("model.quantize", "nf5", "nf4", "int8", "file")),
        (("--model.quantize", "file"), ("model.quantize", "GGUF", "nf4")),
        (("--model.quantize", "nf4", "--method", "full"), ("model.quantize", "method", "full")),
        (("--model.quantize_exclude", "[o_proj]"), ("model.quantize_exclude", "model.quantize")),
        (
            ("--model.quantize", "nf4", "--model.quantize_exclude", "[o_prj]"),
            ("model.quantize_exclude", "o_prj", "o_proj"),
        ),
    ],
)
def test_bad_settings(talk, capsys, overrides, words):
    assert talk.train(*overrides) == 2
    assert_mentions(capsys.readouterr().err, *words)
    assert not talk.out.exists()


def test_a_file_with_mixed_layers_is_named(talk, capsys):
    path = gguf_of(talk, {("self_attn.v_proj", "attn_v"): ("Q4_1", "Q8_0")})
    assert talk.train("--model.path", str(path), "--model.quantize", "file") == 2
    assert_mentions(capsys.readouterr().err, "v_proj", "Q4_1", "Q8_0", "model.quantize_exclude")
