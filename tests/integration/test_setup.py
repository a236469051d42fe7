"""From the tiny world's settings to parts and optimizer, nothing trained."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from safetensors.numpy import load_file

from loraplus_jax.adapter.tree import leaves_by_path
from loraplus_jax.cli.commands import main
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.tasks.encoder import load_data, load_split, model_config
from loraplus_jax.training import setup as module
from loraplus_jax.training.inspect import inspect
from loraplus_jax.training.setup import prepare

from ..messages import assert_mentions, mentions

pytestmark = pytest.mark.usefixtures("cache")


def prepared(world, *overrides):
    return prepare(parse_settings(world.config, overrides))


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@pytest.mark.slow
def test_trained_leaves_are_float32_on_a_bf16_base(world):
    run = prepared(world, "--model.param_dtype", "bfloat16", "--lora.modules_to_save", "[attention_norm]")
    assert dtypes(run.parts.trainable) == {"float32"}
    assert dtypes(run.parts.frozen) == {"bfloat16"}
    assert set(run.parts.trainable["params"]["encoder"]["layers"]) == {"attention_norm"}
    word = load_file(world.model / "model.safetensors")["embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(
        run.parts.frozen["params"]["encoder"]["embeddings"]["word"]["embedding"],
        jnp.asarray(word, jnp.bfloat16),
    )


@pytest.mark.slow
def test_the_head_is_the_only_extra_and_is_new(world):
    run = prepared(world)
    parts = run.parts
    assert set(parts.trainable) == {"lora", "params"}
    assert set(leaves_by_path(parts.trainable["params"])) == {"head/kernel", "head/bias"}
    assert set(parts.frozen["params"]) == {"encoder"}
    assert set(parts.specs) == {
        f"encoder/layers/{n}" for n in ("attention/query", "attention/value", "mlp/up")
    }
    lora = leaves_by_path(parts.trainable["lora"])
    assert all(np.all(leaf == 0) == path.endswith("lora_b") for path, leaf in lora.items())
    kernel = np.asarray(parts.trainable["params"]["head"]["kernel"])
    assert 0 < kernel.std() < 0.1
    other = prepared(world, "--seed", "1").parts.trainable
    assert not np.array_equal(other["params"]["head"]["kernel"], kernel)
    assert run.steps == 40
    assert run.data.task.names == ("no", "yes")


@pytest.mark.slow
def test_full_trains_all_and_freezes_nothing(world):
    run = prepared(world, "--method", "full")
    assert run.settings.applied is None
    assert run.parts.frozen == {}
    assert run.parts.specs == {}
    assert set(run.parts.trainable) == {"params"}
    assert set(run.parts.trainable["params"]) == {"encoder", "head"}
    assert run.metadata["base"] is None


@pytest.mark.slow
def test_the_pooler_is_loaded_where_it_is_asked_for(world):
    frozen = prepared(world, "--model.pooling", "pooler").parts.frozen["params"]
    weight = load_file(world.model / "model.safetensors")["pooler.dense.weight"]
    np.testing.assert_array_equal(frozen["pooler"]["kernel"], weight.T)


def test_dropout_rates_replace_the_models_own(world):
    settings = parse_settings(world.config, ["--model.dropout", "0.3"]).model
    config = model_config(settings, world.model)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.3)
    own = model_config(dataclasses.replace(settings, dropout=None), world.model)
    assert (own.hidden_dropout_prob, own.attention_probs_dropout_prob) == (0.1, 0.1)


def test_long_texts_are_counted(world):
    data = load_data(parse_settings(world.config, ["--data.max_length", "5"]), world.model)
    assert data.truncated["train"] > 0
    assert {name: arrays["input_ids"].shape for name, arrays in data.splits.items()} == {
        "train": (112, 5),
        "validation": (16, 5),
        "test": (32, 5),
    }


def test_a_trial_on_few_texts_has_all_classes(world):
    settings = parse_settings(world.config, ["--data.limit", "1"])
    data = load_data(settings, world.model)
    assert data.task.names == ("no", "yes")
    assert data.examples == {"train": 1, "validation": 1, "test": 1}
    split = load_split(settings, world.model, data.task, "test", None)
    assert (split.examples, split.digest) == (1, data.digests["test"])
    assert load_split(settings, world.model, data.task, None, str(world.data)).examples == 160


@pytest.mark.slow
def test_inspect_reads_no_weights_and_shows_what_would_be_trained(world, monkeypatch, capsys):
    run = prepared(world)
    (world.model / "model.safetensors").write_bytes(b"never read")
    monkeypatch.setattr(module, "load_params", lambda *_, **__: pytest.fail("weights were read"))
    assert main(["inspect", str(world.config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not world.out.exists()
    table = [line.split() for line in lines[1 : 1 + len(jax.tree.leaves(run.parts.trainable))]]
    expected = leaves_by_path(run.parts.trainable)
    assert {row[0]: row[1] for row in table} == {
        path: "x".join(map(str, leaf.shape)) for path, leaf in expected.items()
    }
    roles = {row[0].rpartition("/")[2]: row[2:5] for row in table}
    assert roles["lora_a"] == ["a", "4", "0.005"]
    assert roles["lora_b"] == ["b", "4", "0.02"]
    assert roles["kernel"] == ["extra", "-", "0.005"]
    assert_mentions(lines[-2], 930, "6,242", "14.9 %")
    assert_mentions(lines[-1], "40 steps", 32, "step 2", "112 train", "16 validation", "32 test")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_inspect_shows_the_methods_own_rates(world, method):
    text = inspect(parse_settings(world.config, ["--method", method]))
    assert "0.02" not in text.split()
    assert ("lora_b" in text) == (method == "lora")
    if method == "full":
        assert "5,346 of 5,346" in text


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 64, 256])
@pytest.mark.parametrize(("batch", "accumulate", "evaluated"), [(16, 4, 4), (32, 1, 64), (12, 3, 10)])
def test_proposed_batch_sizes_go_together(parts, batch, accumulate, evaluated):
    sizes = module.batch_sizes_for(batch, accumulate, evaluated, parts)
    assert sizes["batch_size"] % (sizes["accumulate"] * parts) == sizes["eval_batch_size"] % parts == 0
    assert 0 <= sizes["batch_size"] - batch < parts
    assert 1 <= sizes["accumulate"] <= accumulate
    assert module.batch_sizes_for(*sizes.values(), parts) == sizes


def test_a_batch_that_a_mesh_cannot_split_gets_one_line_with_all_sizes():
    config = Path(__file__).parents[2] / "configs/llama_alpaca.yaml"
    for data in (8, 64):
        mesh = AbstractMesh((data, 1, 1), ("data", "fsdp", "tensor"))
        with pytest.raises(ValueError, match=mentions("train.batch_size", "train.accumulate", 4)) as caught:
            module.check_mesh(parse_settings(config), mesh)
        message = str(caught.value)
        proposed = message[message.index("--train") :].split()
        module.check_mesh(parse_settings(config, proposed), mesh)


@pytest.mark.parametrize("task", ["classification", "regression", "instruction", "multiple_choice"])
@pytest.mark.parametrize("duplicates", ["warn", "drop", "error"])
def test_every_task_tells_duplicates_before_training(first_world, first_talk, task, duplicates):
    source = first_world if task in ("classification", "regression") else first_talk
    data = source.directory / "questions.jsonl" if task == "multiple_choice" else source.data
    args = ["--task", task, "--data.path", "null", "--data.train", str(data), "--data.test", str(data)]
    args += ["--data.duplicates", duplicates]
    args += ["--data.label", "rating"] if task == "regression" else []
    settings = parse_settings(source.config, args)
    load = module.task_module(settings).load_data
    if duplicates == "warn":
        loaded = load(settings, source.model)
        (line,) = [line for line in loaded.summary if "data.train" in line]
        assert_mentions(line, "warning", "data.test", "same", loaded.examples["test"], data.name)
    else:
        with pytest.raises(
            ValueError, match=mentions("train", {"error": "test", "drop": "left"}[duplicates])
        ):
            load(settings, source.model)
