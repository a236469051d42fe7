"""From settings to parts, optimizer and number of steps, nothing trained; what `loraplus inspect` shows."""

import dataclasses
import types
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from safetensors.numpy import load_file

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.tree import leaves_by_path
from loraplus_jax.cli.commands import main
from loraplus_jax.models.checkpoints import hub_directory
from loraplus_jax.models.checkpoints.gguf import file, header
from loraplus_jax.models.files import open_files
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.settings.schema import (
    DataOptions,
    ModelOptions,
    OptimizerSettings,
    Settings,
    TrainSettings,
)
from loraplus_jax.step.sharding import make_mesh
from loraplus_jax.tasks.interface import ANY_POSITION, AdaptedModel, BatchPlan, Scored
from loraplus_jax.training import setup as module
from loraplus_jax.training.adapter_start import make_start, read_start, saved_form
from loraplus_jax.training.inspect import inspect
from loraplus_jax.training.programs import trace_evaluation, trace_step
from loraplus_jax.training.setup import (
    abstract_run,
    build_model,
    count_steps,
    load_model,
    make_problem,
    prepare,
    task_class,
)

from ..integration.language_world import write_gguf_of
from ..marks import slow
from ..messages import assert_mentions, mentions
from ..refusals import refusals
from .preparation import without_compiling


def settings(train=None, **optimizer):
    given = {"model": ModelOptions(path="m"), "data": DataOptions(path="d"), "output_dir": "o"}
    return Settings(train=train or TrainSettings(), optimizer=OptimizerSettings(**optimizer), **given)


def test_steps_in_all():
    cases = [({"steps": 7}, 7), ({}, 3 * 3), ({"epochs": 1}, 3), ({"epochs": 2.5}, 8), ({"epochs": 0.01}, 1)]
    for train, steps in [*cases, ({"epochs": 2, "batch_size": 50, "accumulate": 5}, 4)]:
        assert count_steps(settings(TrainSettings(**train)), 100) == steps
    assert count_steps(settings(warmup_steps=8), 100) == 9


test_steps_are_checked_against_batch_and_warm_up = refusals(
    (lambda: count_steps(settings(), 31), "train.batch_size", 32, 31),
    (lambda: count_steps(settings(warmup_steps=9), 100), "optimizer.warmup_steps", 9),
)


def prepared(world, *overrides):
    with without_compiling():
        return prepare(parse_settings(world.config, overrides))


@pytest.fixture(scope="module")
def usual(first_world):
    """Prepared by the world's own settings."""
    return prepared(first_world)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "GGUF file"])
def test_the_files_of_a_model_are_read_once(talk, monkeypatch, kind):
    path = talk.model if kind == "directory" else write_gguf_of(talk.model, talk.directory / "tiny.gguf")
    counts = Counter()

    def count(owner, name, label):
        call = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, **kw: counts.update([label(*args)]) or call(*args, **kw)
        )

    count(hub_directory, "read_json", lambda path: path.name)
    count(hub_directory, "read_text", lambda path: path.name)
    count(hub_directory, "_open", lambda path: path.name)
    count(header, "_read_metadata", lambda cursor: "header")
    count(file, "make_tokenizer", lambda header: "vocabulary")
    prepared(
        talk, "--model.path", str(path), "--train.prompt", "what colour is snow", "--train.prompt_tokens", "4"
    )
    wanted = {"header", "vocabulary"}
    if kind == "directory":
        wanted = {"config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"}
    assert counts == dict.fromkeys(wanted, 1)


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@pytest.mark.slow
def test_trained_leaves_are_float32_on_a_bf16_base_and_a_pooler_is_loaded_for_pooling(first_world):
    flags = (
        "--model.param_dtype=bfloat16",
        "--lora.modules_to_save=[attention_norm]",
        "--model.pooling=pooler",
    )
    run = prepared(first_world, *flags)
    assert dtypes(run.parts.trainable) == {"float32"}
    assert dtypes(run.parts.frozen) == {"bfloat16"}
    assert set(run.parts.trainable["params"]["encoder"]["layers"]) == {"attention_norm"}
    held, frozen = load_file(first_world.model / "model.safetensors"), run.parts.frozen["params"]
    for found, name in (
        (frozen["encoder"]["embeddings"]["word"]["embedding"], "embeddings.word_embeddings.weight"),
        (frozen["pooler"]["kernel"].T, "pooler.dense.weight"),
    ):
        np.testing.assert_array_equal(found, held[name].astype(found.dtype))


@pytest.mark.slow
def test_the_head_is_the_only_extra_and_is_new(usual, first_world):
    parts = usual.parts
    assert set(parts.trainable) == {"lora", "params"}
    assert set(leaves_by_path(parts.trainable["params"])) == {"head/kernel", "head/bias"}
    assert set(parts.frozen["params"]) == {"encoder"}
    adapted = ("attention/query", "attention/value", "mlp/up")
    assert set(parts.specs) == {f"encoder/layers/{name}" for name in adapted}
    lora = leaves_by_path(parts.trainable["lora"])
    assert all(np.all(leaf == 0) == path.endswith("lora_b") for path, leaf in lora.items())
    kernel = np.asarray(parts.trainable["params"]["head"]["kernel"])
    assert 0 < kernel.std() < 0.1
    assert usual.steps == 40
    assert usual.data.task.names == ("no", "yes")


@pytest.mark.slow
def test_full_trains_all_and_freezes_nothing(first_world):
    run = prepared(first_world, "--method", "full")
    assert run.settings.applied is None
    assert run.parts.frozen == run.parts.specs == {}
    assert run.parts.trainable.keys() == {"params"}
    assert set(run.parts.trainable["params"]) == {"encoder", "head"}
    assert run.origin["base"] is None


def test_inspect_reads_no_weights_and_shows_what_would_be_trained(usual, world, monkeypatch, capsys):
    monkeypatch.setattr(module, "load_params", lambda *_, **__: pytest.fail("weights were read"))
    assert main(["inspect", str(world.config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not world.out.exists()
    expected = leaves_by_path(usual.parts.trainable)
    table = [line.split() for line in lines[1 : 1 + len(expected)]]
    shapes = {path: "x".join(map(str, leaf.shape)) for path, leaf in expected.items()}
    assert {row[0]: row[1] for row in table} == shapes
    roles = {row[0].rpartition("/")[2]: " ".join(row[2:5]) for row in table}
    assert [roles[n] for n in ("lora_a", "lora_b", "kernel")] == ["a 4 0.005", "b 4 0.02", "extra - 0.005"]
    assert_mentions(lines[-3], 930, "6,242", "14.9 %")
    assert_mentions(lines[-1], "32 texts a step", "rows of", "% full")
    assert_mentions(lines[-2], "40 steps", 32, "step 2", "112 train", "16 validation", "32 test")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_inspect_shows_the_methods_own_rates(first_world, method):
    text = inspect(parse_settings(first_world.config, ["--method", method]))
    assert "0.02" not in text.split()
    assert ("lora_b" in text) == (method == "lora")
    if method == "full":
        assert "5,346 of 5,346" in text


@pytest.mark.parametrize("parts", [1, 2, 3, 64])
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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lora.init loftq", ("lora.init", "loftq", "model.quantize", "nf4", "int8")),
        ("--lora.init lora --lora.init_iterations 2", ("init_iterations", "lora")),
        slow("--lora.init pissa --model.quantize nf4", ("lora.init", "pissa", "model.quantize", "loftq")),
        slow("--lora.init olora --init_adapter {dir}", ("lora.init", "olora", "init_adapter")),
    ],
)
def test_what_cannot_start_from_the_base_is_an_error_before_anything_is_written(talk, capsys, flags, words):
    with without_compiling():
        assert talk.train(*flags.format(dir=talk.directory).split()) == 2
    assert_mentions(capsys.readouterr().err, *words)
    assert not talk.out.exists()


def starting(init, **fields):
    """Makes the start of an adapter on a weight of 8 x 8 that is not quantized."""
    spec = AdapterSpec(
        **{"leaf": "q", "kind": "dense", "axes": "io", "shape": (8, 8), "rank": 2} | fields, scale=1.0
    )
    parts = AdaptedModel(None, None, {"q": spec}, {}, {"q": np.ones((8, 8), np.float32)})
    config = LoRAPlusConfig(target_modules=["q"], init=init)
    return lambda tmp_path: make_start(config, parts, open_files(tmp_path), {})


test_adapters_that_cannot_start_from_the_base = refusals(
    (starting("loftq"), "loftq", "q", "model.quantize_exclude"),
    (starting("pissa", rank=5), "lora.rank", 4, "pissa", 5, "twice"),
    (starting("pissa", shape=(2, 8, 8), stacked=(0,), layers=(1,)), "lora.layers_to_transform", "pissa"),
)


def test_a_run_without_a_start_of_its_own_saves_what_it_trained(tmp_path):
    assert read_start(tmp_path, {}) is None
    assert saved_form({"lora": {}}, {}, None, None) == ({"lora": {}}, {}, None, None)


def test_a_problem_is_made_of_settings_task_and_model():
    """With the bound on scored positions for micro-batches and evaluation alone."""

    def make_losses(options, parts, mesh, scored=ANY_POSITION):
        return types.SimpleNamespace(train=("train", scored), evaluate=("eval", scored))

    task: Any = types.SimpleNamespace(make_losses=make_losses)
    base: Any = types.SimpleNamespace(rules=(("w", ("fsdp",)),), layers=3)
    parts = AdaptedModel(base, base, {}, {"a": 1}, {"w": 2})
    train, evaluate = ({"weight": jax.ShapeDtypeStruct((n,), np.float32)} for n in (8, 5))
    scored, batch = Scored(6, 7), lambda seed, step: {}
    problem = make_problem(
        settings(TrainSettings(batch_size=8, accumulate=4)),
        task,
        parts,
        BatchPlan(train, evaluate, batch, scored),
        9,
    )
    assert (problem.loss, problem.evaluate) == (("train", scored), ("eval", scored))
    assert problem.unbounded_loss == ("train", ANY_POSITION)
    assert (problem.trainable, problem.frozen, problem.specs) == ({"a": 1}, {"w": 2}, {})
    assert (problem.train_batch, problem.eval_batch, problem.batch) == (train, evaluate, batch)
    assert (problem.steps, problem.accumulate, problem.rules, problem.layers) == (9, 4, base.rules, 3)


@pytest.mark.parametrize(
    ("more", "devices", "split"),
    [("", 1, True), ("", 2, False), ("--model.quantize int8", 1, False), ("--model.unroll false", 1, False)],
)
def test_programs_take_each_layers_weights_on_one_cpu_device(world, more, devices, split):
    settings = parse_settings(world.config, more.split())
    files, mesh = open_files(world.model), make_mesh(devices)
    data = task_class(settings).load(settings.task_options, files)
    run = abstract_run(settings, files, data, mesh).run
    for traced in (trace_step(run), trace_evaluation(run)):
        _, frozen, _ = traced.args_info[0]
        kernel = frozen["params"]["encoder"]["layers"]["mlp"]["up"]["kernel"]
        assert (isinstance(kernel, tuple) and len(kernel) == 2) == split


def test_inits_of_all_seeds_share_one_program_of_one_layer(world):
    settings, files = parse_settings(world.config, ["--model.unroll", "true"]), open_files(world.model)
    parts = build_model(
        settings, files, task_class(settings).load(settings.task_options, files).task, settings.applied
    )
    before, drawn = module._draw._cache_size(), []
    for seed in (1, 2, 1):
        model = load_model(dataclasses.replace(settings, seed=seed), files, parts)
        drawn.append(leaves_by_path(model.trainable))
    assert module._draw._cache_size() == before + 1
    first, other, again = drawn
    assert all(np.array_equal(first[path], again[path]) for path in first)
    differs = {path for path in first if not np.array_equal(first[path], other[path])}
    assert {path.rpartition("/")[2] for path in differs} == {"lora_a", "kernel"}  # B and biases are zeros
    program = jax.make_jaxpr(parts.base.model.init)(
        jax.random.key(0), np.ones((1, 4), np.int32), np.ones((1, 4), np.int32)
    )
    (loop,) = [eqn for eqn in program.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == 2]
    assert loop.params["unroll"] == 1
