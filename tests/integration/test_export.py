"""`loraplus export`, and what runs on its results, without PyTorch; tests/reference compares with PEFT itself."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax.cli.commands import main
from loraplus_jax.inference.verify_conversion import gguf_changes
from loraplus_jax.interop.adapter_directory import load_adapter
from loraplus_jax.interop.peft_files import load_peft

from ..marks import long
from ..messages import assert_mentions
from . import language_world as language
from .runs import (
    ASKED,
    SHORT_TALK,
    assert_exports_answer_the_same,
    evaluated,
    near,
    printed,
    rejected,
    summary_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory, cache):
    """The run of `finished` as an adapter of PEFT with our notes, never changed."""
    to = tmp_path_factory.mktemp("exported") / "peft"
    assert main(["export", str(finished.out), "--to", str(to)]) == 0
    return to


def without_notes(exported, to):
    """A copy as PEFT itself would have written it."""
    ours = ("loraplus.json", "loraplus.safetensors", "README.md")
    return shutil.copytree(exported, to, ignore=lambda *_: ours)


@pytest.mark.long
@pytest.mark.parametrize("pooling", ["pooler", long("cls")])
def test_a_head_that_transformers_has_goes_with_the_model(pooling, world, tmp_path, capsys):
    world.trained("--model.pooling", pooling, "--train.steps", "4")
    for name, flags in (("peft", ()), ("merged", ("--merged",))):
        to = tmp_path / name
        printed(capsys, "export", world.out, "--to", to, *flags)
        assert (to / "loraplus.safetensors").exists() == (pooling == "cls")
        assert near(evaluated(capsys, to), evaluated(capsys, world.out))
    config = json.loads((tmp_path / "merged/config.json").read_text())
    if pooling == "pooler":
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert config["id2label"] == {"0": "no", "1": "yes"}
        held = load_file(tmp_path / "merged/model.safetensors")
        assert {"classifier.weight", "bert.pooler.dense.weight"} <= held.keys()
    else:
        assert config["architectures"] == ["BertModel"]


def test_a_language_model_exported_answers_the_same(finished_talk, tmp_path, capsys):
    assert "white" in printed(capsys, "generate", finished_talk.out, *ASKED)
    assert_exports_answer_the_same(capsys, finished_talk.out, tmp_path)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(finished_talk.model)
    assert config["r"] == 4
    name = "someone/tiny-llama"
    printed(capsys, "export", finished_talk.out, "--to", tmp_path / "named", "--base_model", name)
    config = json.loads((tmp_path / "named/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name
    assert f"'{name}'" in (tmp_path / "named/README.md").read_text()


def test_a_language_model_exported_for_llama_cpp_has_pefts_factors(finished_talk, tmp_path, capsys):
    printed(capsys, "export", finished_talk.out, "--to", tmp_path / "peft")
    flags = ("--format", "gguf", "--dtype", "float32")
    told = printed(capsys, "export", finished_talk.out, "--to", tmp_path / "gguf", *flags)
    options = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    factors = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert_mentions(told, tmp_path / "gguf/adapter.gguf", len(factors) // 2, "llama", options["lora_alpha"])
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {
        *("adapter.gguf", "README.md", "loraplus.json"),
    }
    assert "--lora adapter.gguf" in (tmp_path / "gguf/README.md").read_text()
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in factors}
    config = json.loads((finished_talk.model / "config.json").read_text())
    found = gguf_changes(tmp_path / "gguf/adapter.gguf", config, modules)
    assert found.keys() == modules
    for name, change in found.items():
        a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        np.testing.assert_allclose(change, options["lora_alpha"] / options["r"] * b @ a, rtol=1e-6)


@pytest.mark.long
def test_a_model_from_gguf_goes_out_as_both_formats(talk, tmp_path, capsys):
    gguf = tmp_path / "base.gguf"
    language.write_gguf_of(talk.model, gguf)
    talk.trained(*SHORT_TALK, "--model.path", str(gguf))
    run = printed(capsys, "generate", talk.out, *ASKED)
    exact = evaluated(capsys, talk.out)
    for name, flags, rel in (
        ("hf", (), 1e-4),
        ("f32", ("--format", "gguf", "--dtype", "float32"), 1e-4),
        ("f16", ("--format", "gguf"), 1e-2),
        ("q8", ("--format", "gguf", "--dtype", "q8_0"), 5e-2),
        ("bf16", ("--dtype", "bfloat16"), 5e-2),
    ):
        to = tmp_path / name
        printed(capsys, "export", talk.out, "--to", to, "--merged", *flags)
        assert evaluated(capsys, to)["loss"] == pytest.approx(exact["loss"], rel=rel), name
        if rel < 1e-3:
            assert printed(capsys, "generate", to, *ASKED) == run


def test_shards_have_an_index(finished_talk, tmp_path, capsys, monkeypatch):
    from loraplus_jax.models.checkpoints import export

    monkeypatch.setattr(export.write_hf, "__kwdefaults__", {"dtype": None, "shard_bytes": 5000})
    to = tmp_path / "merged"
    printed(capsys, "export", finished_talk.out, "--to", to, "--merged")
    index = json.loads((to / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in to.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    loss = evaluated(capsys, finished_talk.out)["loss"]
    assert evaluated(capsys, to)["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.long
def test_a_model_trained_in_full_goes_out_merged(world, tmp_path, capsys):
    world.trained("--method", "full", "--train.steps", "4", "--optimizer.learning_rate", "1e-3")
    assert "trained in full" in rejected(capsys, "export", world.out, "--to", tmp_path / "a")
    printed(capsys, "export", world.out, "--to", tmp_path / "b", "--merged")
    assert near(evaluated(capsys, tmp_path / "b"), evaluated(capsys, world.out))


def test_training_starts_from_a_run_and_from_its_export(finished, exported, tmp_path, capsys, monkeypatch):
    from loraplus_jax.training import trainer

    monkeypatch.setattr(trainer, "draw_loss", lambda *_: None)
    before = evaluated(capsys, finished.out)
    ends = []
    for name, start in (("ours", finished.out), ("peft", exported)):
        flags = ("--init_adapter", str(start), "--train.steps", "3")
        out = finished.trained(*flags, out=tmp_path / f"from_{name}")
        assert summary_of(out)["before"]["loss"] == pytest.approx(before["loss"], rel=1e-5)
        ends.append(load_file(out / "adapter/adapter.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_adapters_of_peft_are_used_with_their_base_or_a_config(finished_talk, tmp_path, capsys):
    printed(capsys, "export", finished_talk.out, "--to", tmp_path / "ours")
    peft = without_notes(tmp_path / "ours", tmp_path / "peft")
    run = printed(capsys, "generate", finished_talk.out, *ASKED)
    assert printed(capsys, "generate", peft, *ASKED) == run
    assert "--config" in rejected(capsys, "eval", peft)
    config = finished_talk.directory / "config.yaml"
    assert evaluated(capsys, peft, "--config", config) == evaluated(capsys, finished_talk.out)
    assert printed(capsys, "generate", peft, "--config", config, *ASKED) == run


@pytest.mark.long
def test_disagreement_with_the_settings_is_named_with_both_values(finished, exported, tmp_path, capsys):
    peft = without_notes(exported, tmp_path / "peft")

    def message(start, *flags):
        capsys.readouterr()
        assert finished.train("--init_adapter", str(start), *flags, out=tmp_path / "new") == 2
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err

    for start in (finished.out, peft):
        assert_mentions(message(start, "--lora.rank", "2"), "lora.rank", 4, 2)
        assert_mentions(message(start, "--lora.alpha", "8"), "lora.alpha", 16.0, 8.0)
        assert_mentions(message(start, "--lora.use_rslora", "true"), "lora.use_rslora", False)
        found = message(start, "--lora.target_modules", "[query]")
        assert "--lora.target_modules '[encoder/layers/attention/query, " in found
        assert "layers_to_transform" in message(start, "--lora.layers_to_transform", "[0]")
        assert_mentions(message(start, "--method", "full"), "method", "full", "adapters")
    found = message(
        finished.out, "--lora.lr_ratio", "8", "--optimizer.decay", "equal", "--optimizer.weight_decay", "0.1"
    )
    assert_mentions(
        found, "lora.lr_ratio", 4.0, 8.0, "optimizer.decay", "coupled", "equal", "--init_adapter_rates new"
    )
    assert "task" in message(finished.out, "--task", "regression", "--data.label", "rating")
    assert_mentions(message(tmp_path), "adapter", tmp_path)
    capsys.readouterr()
    flags = ("--init_adapter", str(finished.out), "--init_adapter_rates", "new", "--lora.lr_ratio", "8")
    assert finished.train(*flags, "--train.steps", "3", out=tmp_path / "new") == 0


def test_another_base_is_rejected(finished, exported, tmp_path, capsys):
    world = finished.copy(tmp_path / "copy")
    world.change_tensors(lambda tensors: tensors["encoder.layer.0.output.dense.weight"].__iadd__(1))
    for flags in ((), ("--merged",)):
        assert "base.weights" in rejected(capsys, "export", world.out, "--to", tmp_path / "to", *flags)
        assert not (tmp_path / "to").exists()
    notes = shutil.copytree(exported, tmp_path / "peft") / "loraplus.json"
    notes.write_text(notes.read_text().replace(str(finished.directory), str(world.directory)))
    assert "base.weights" in rejected(capsys, "eval", tmp_path / "peft")


FIRST = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"


def option(**values):
    return lambda tensors, options: options.update(values)


def tensor(change):
    return lambda tensors, options: change(tensors)


def narrow(tensors):
    tensors[FIRST] = np.ascontiguousarray(tensors[FIRST][:, :-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (option(r=2), ["lora.rank", 2, 4]),
        (option(use_qalora=True, megatron_config={"a": 1}), ["use_qalora", True, "megatron_config"]),
        (option(use_dora=True), ["lora.variant", "dora"]),
        (option(frobnicate=3), ["frobnicate", 3]),
        (option(init_lora_weights="pissa_niter_4"), ["init_lora_weights", "pissa_niter_4"]),
        (
            tensor(lambda t: t.update({FIRST.replace("attention.self.query", "strange"): t.pop(FIRST)})),
            ["encoder.layer.0.strange", "target_modules"],
        ),
        (tensor(lambda t: t.pop(FIRST)), ["missing", FIRST.removeprefix("base_model.model.")]),
        (tensor(narrow), ["(4, 15)", "(4, 16)", "(16, 4)"]),
        (
            lambda t, options: options["target_modules"].append("attention.self.key"),
            ["encoder.layer.0.attention.self.key", "adapter_config.json"],
        ),
        (tensor(lambda t: t.update({FIRST.replace("layer.0", "layer.7"): t[FIRST]})), ["[7]", 2]),
    ],
)
def test_bad_adapters_of_peft_are_rejected(change, words, finished, exported, tmp_path, capsys):
    peft = without_notes(exported, tmp_path / "peft")
    path, config = peft / "adapter_model.safetensors", peft / "adapter_config.json"
    tensors, options = load_file(path), json.loads(config.read_text())
    change(tensors, options)
    save_file(tensors, path)
    config.write_text(json.dumps(options))
    capsys.readouterr()
    assert finished.train("--init_adapter", str(peft), out=tmp_path / "new") == 2
    assert_mentions(capsys.readouterr().err, *words)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), ["adapter_model.safetensors"]),
        (lambda path: path.rename(path.with_suffix(".bin")), ["adapter_model.bin", "pickle"]),
    ],
)
def test_files_of_peft_that_cannot_be_read_are_named(spoil, words, finished, exported, tmp_path, capsys):
    peft = without_notes(exported, tmp_path / "peft")
    spoil(peft / "adapter_model.safetensors")
    assert_mentions(finished.rejected(capsys, "--init_adapter", str(peft), "--output_dir", "new"), *words)


def test_round_trip_of_a_run_is_bitwise(finished, exported):
    from loraplus_jax.models.bert import model as bert
    from loraplus_jax.models.checkpoints import export
    from loraplus_jax.models.checkpoints.hf import load_config

    ours = load_adapter(finished.out / "adapter")
    config = bert.BertConfig.from_hf(load_config(finished.model))
    path_map = export.path_map(bert.name_table("mean"), export.encoder_class(config, "mean"))
    again = load_peft(exported, ours.specs, path_map)
    assert again.config == ours.config
    for name in ("query", "value"):
        for factor in ("lora_a", "lora_b"):
            one, two = (x.lora["encoder"]["layers"]["attention"][name][factor] for x in (ours, again))
            assert np.array_equal(one, two)
    assert np.array_equal(again.extras["params"]["head"]["kernel"], ours.extras["params"]["head"]["kernel"])
