"""`loraplus export`, and what runs on its results, without PyTorch; tests/reference compares with PEFT itself."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax.cli.commands import main
from loraplus_jax.interop.adapter_files import load_adapter
from loraplus_jax.interop.peft_files import load_peft

from ..marks import long
from ..messages import assert_mentions
from . import language_world as language

pytestmark = pytest.mark.slow
ASKED = ("--prompt", "say what colour is snow", "--max_tokens", "8")


def printed(capsys, *arguments):
    """What a command prints; it must end well."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def rejected(capsys, *arguments):
    """What a command complains of, in one line."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out = capsys.readouterr()
    assert not out.out
    assert "Traceback" not in out.err
    return out.err


def evaluated(capsys, *arguments):
    return json.loads(printed(capsys, "eval", *arguments))


def near(given, wanted, rel=1e-4):
    """Whether two evaluations say the same."""
    assert given.keys() == wanted.keys()
    numbers = [name for name, value in wanted.items() if isinstance(value, float)]
    return {n: given[n] for n in numbers} == pytest.approx({n: wanted[n] for n in numbers}, rel=rel)


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


def test_a_language_model_exported_answers_the_same(finished_talk, tmp_path, capsys, cache):
    run = printed(capsys, "generate", finished_talk.out, *ASKED)
    assert "white" in run
    for name, flags in (("peft", ()), ("merged", ("--merged",))):
        to = tmp_path / name
        printed(capsys, "export", finished_talk.out, "--to", to, *flags)
        assert printed(capsys, "generate", to, *ASKED) == run
        assert near(evaluated(capsys, to), evaluated(capsys, finished_talk.out))
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(finished_talk.model)
    assert config["r"] == 4
    printed(
        capsys, "export", finished_talk.out, "--to", tmp_path / "named", "--base_model", "someone/tiny-llama"
    )
    config = json.loads((tmp_path / "named/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny-llama"
    assert "'someone/tiny-llama'" in (tmp_path / "named/README.md").read_text()


def test_a_model_from_gguf_goes_out_as_both_formats(talk, tmp_path, capsys):
    gguf = tmp_path / "base.gguf"
    language.write_gguf_of(talk.model, gguf)
    talk.trained("--model.path", str(gguf), "--train.steps", "30")
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


def test_shards_have_an_index(finished_talk, tmp_path, capsys, cache, monkeypatch):
    from loraplus_jax.models.checkpoints import export

    monkeypatch.setattr(export.write_hf, "__kwdefaults__", {"dtype": None, "shard_bytes": 5000})
    to = tmp_path / "merged"
    printed(capsys, "export", finished_talk.out, "--to", to, "--merged")
    index = json.loads((to / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in to.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert evaluated(capsys, to)["loss"] == pytest.approx(
        evaluated(capsys, finished_talk.out)["loss"], rel=1e-4
    )


@pytest.mark.long
def test_a_model_trained_in_full_goes_out_merged(world, tmp_path, capsys):
    world.trained("--method", "full", "--train.steps", "4", "--optimizer.learning_rate", "1e-3")
    assert "trained in full" in rejected(capsys, "export", world.out, "--to", tmp_path / "a")
    printed(capsys, "export", world.out, "--to", tmp_path / "b", "--merged")
    assert near(evaluated(capsys, tmp_path / "b"), evaluated(capsys, world.out))


def test_training_starts_from_a_run_and_from_its_export(finished, tmp_path, capsys, cache, monkeypatch):
    from loraplus_jax.training import trainer

    monkeypatch.setattr(trainer, "draw_loss", lambda *_: None)
    printed(capsys, "export", finished.out, "--to", tmp_path / "peft")
    before = evaluated(capsys, finished.out)
    ends = []
    for name, start in (("ours", finished.out), ("peft", tmp_path / "peft")):
        flags = ("--init_adapter", str(start), "--train.steps", "3")
        out = finished.trained(*flags, out=tmp_path / f"from_{name}")
        summary = json.loads((out / "summary.json").read_text())
        assert summary["before"]["loss"] == pytest.approx(before["loss"], rel=1e-5)
        ends.append(load_file(out / "adapter/adapter.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])


def foreign(world, to):
    """An adapter of the run as PEFT itself would have written it."""
    shutil.rmtree(to, ignore_errors=True)
    assert main(["export", str(world.out), "--to", str(to)]) == 0
    for name in ("loraplus.json", "loraplus.safetensors", "README.md"):
        (to / name).unlink(missing_ok=True)
    return to


def test_adapters_of_peft_are_used_with_their_base_or_a_config(finished_talk, tmp_path, capsys, cache):
    peft = foreign(finished_talk, tmp_path / "peft")
    run = printed(capsys, "generate", finished_talk.out, *ASKED)
    assert printed(capsys, "generate", peft, *ASKED) == run
    assert "--config" in rejected(capsys, "eval", peft)
    config = finished_talk.directory / "config.yaml"
    assert evaluated(capsys, peft, "--config", config) == evaluated(capsys, finished_talk.out)
    assert printed(capsys, "generate", peft, "--config", config, *ASKED) == run


@pytest.mark.long
def test_disagreement_with_the_settings_is_named_with_both_values(finished, tmp_path, capsys, cache):
    peft = foreign(finished, tmp_path / "peft")

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


def test_another_base_is_rejected(finished, tmp_path, capsys, cache):
    world = finished.copy(tmp_path / "copy")
    world.change_tensors(lambda tensors: tensors["encoder.layer.0.output.dense.weight"].__iadd__(1))
    for flags in ((), ("--merged",)):
        assert "base.weights" in rejected(capsys, "export", world.out, "--to", tmp_path / "to", *flags)
        assert not (tmp_path / "to").exists()
    printed(capsys, "export", finished.out, "--to", tmp_path / "peft")
    notes = tmp_path / "peft/loraplus.json"
    notes.write_text(notes.read_text().replace(str(finished.directory), str(world.directory)))
    assert "base.weights" in rejected(capsys, "eval", tmp_path / "peft")


def damaged(peft, what):
    """Breaks an adapter of PEFT's in one way."""
    path, config = peft / "adapter_model.safetensors", peft / "adapter_config.json"
    tensors, options = load_file(path), json.loads(config.read_text())
    first = sorted(tensors)[0]
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif what == "pickle":
        path.rename(peft / "adapter_model.bin")
    elif what == "rank":
        options["r"] = 2
    elif what == "qalora":
        options |= {"use_qalora": True, "megatron_config": {"a": 1}}
    elif what == "dora":
        options |= {"use_dora": True}
    elif what == "unknown option":
        options["frobnicate"] = 3
    elif what == "init":
        options["init_lora_weights"] = "pissa_niter_4"
    elif what == "unmapped":
        tensors["base_model.model.encoder.layer.0.strange.lora_A.weight"] = tensors.pop(first)
    elif what == "missing":
        del tensors[first]
    elif what == "shape":
        tensors[first] = np.ascontiguousarray(tensors[first][:, :-1])
    elif what == "target":
        options["target_modules"].append("elsewhere")
    elif what == "layer":
        tensors[first.replace("layer.0", "layer.7")] = tensors[first]
    if what in ("unmapped", "missing", "shape", "layer"):
        save_file(tensors, path)
    if path.exists():
        config.write_text(json.dumps(options))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", ["adapter_model.safetensors"]),
        ("pickle", ["adapter_model.bin", "pickle"]),
        ("rank", ["lora.rank", 2, 4]),
        ("qalora", ["use_qalora", True, "megatron_config"]),
        ("dora", ["lora.variant", "dora"]),
        ("unknown option", ["frobnicate", 3]),
        ("init", ["init_lora_weights", "pissa_niter_4"]),
        ("unmapped", ["encoder.layer.0.strange.lora_A.weight"]),
        ("missing", ["missing", "encoder.layer.0.attention.self.query.lora_A.weight"]),
        ("shape", ["(4, 15)", "(4, 16)", "(16, 4)"]),
        ("target", ["target_modules", "'elsewhere'"]),
        ("layer", ["[7]", 2]),
    ],
)
def test_bad_adapters_of_peft_are_rejected(what, words, finished, tmp_path, capsys, cache):
    peft = foreign(finished, tmp_path / "peft")
    damaged(peft, what)
    capsys.readouterr()
    assert finished.train("--init_adapter", str(peft), out=tmp_path / "new") == 2
    assert_mentions(capsys.readouterr().err, *words)
    assert not (tmp_path / "new").exists()


def test_round_trip_of_a_run_is_bitwise(finished, tmp_path, capsys, cache):
    from loraplus_jax.models.bert import model as bert
    from loraplus_jax.models.checkpoints import export
    from loraplus_jax.models.checkpoints.hf import load_config

    printed(capsys, "export", finished.out, "--to", tmp_path / "peft")
    ours = load_adapter(finished.out / "adapter")
    config = bert.BertConfig.from_hf(load_config(finished.model))
    path_map = export.path_map(bert.name_table("mean"), export.encoder_class(config, "mean"))
    again = load_peft(tmp_path / "peft", ours.specs, path_map)
    assert again.config == ours.config
    for name in ("query", "value"):
        for factor in ("lora_a", "lora_b"):
            one, two = (x.lora["encoder"]["layers"]["attention"][name][factor] for x in (ours, again))
            assert np.array_equal(one, two)
    assert np.array_equal(again.extras["params"]["head"]["kernel"], ours.extras["params"]["head"]["kernel"])
