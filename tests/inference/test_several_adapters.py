"""`generate` and `predict` with several adapters: each request is answered as by its adapter alone."""

import json

import pytest

from loraplus_jax.cli.commands import main

from ..integration import language_world as language
from ..integration.runs import flags, lines_of
from ..messages import assert_mentions
from .conftest import with_adapter

pytestmark = pytest.mark.slow

PACKED = flags("--model.quantize nf4")
OTHER = flags("--lora.rank 2 --lora.alpha 3 --lora.target_modules [q_proj,o_proj]")
THIRD = flags("--lora.rank 3 --lora.use_rslora true --lora.target_modules [down_proj,lm_head]")


@pytest.fixture(scope="module")
def talks(first_talk, tmp_path_factory, cache):
    """Three adapters over one packed base, by name."""
    overrides = {"all": (), "two": OTHER, "third": THIRD}
    return {
        name: with_adapter(first_talk, tmp_path_factory.mktemp(name), *PACKED, *flags)
        for name, flags in overrides.items()
    }


@pytest.fixture(scope="module")
def worlds(first_world, tmp_path_factory, cache):
    """Two adapters of an encoder, each with its own head."""
    overrides = {"a": (), "b": flags("--lora.rank 1 --lora.target_modules [query,down]")}
    return {
        name: with_adapter(first_world, tmp_path_factory.mktemp(name), *flags)
        for name, flags in overrides.items()
    }


def named(worlds):
    return [word for name, world in worlds.items() for word in ("--adapter", f"{name}={world.out}")]


def run(tmp_path, command, *words):
    """The rows that a command writes."""
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    assert main([command, *map(str, words), "--output", str(file)]) == 0
    return lines_of(file)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("search", [(), flags("--beams 3 --mesh.data 2 --mesh.tensor 2")])
def test_texts_are_those_of_each_adapter_alone(talks, tmp_path, search):
    rows = talks["all"].rows()[:8]
    names = ["two", "all", "third", "base", "all", "third", "two", "two"]
    data = write(tmp_path / "named.jsonl", [row | {"adapter": n} for row, n in zip(rows, names, strict=True)])
    limits = ("--max_tokens", "6", *search)
    # The run gives the settings, as the base is packed.
    mixed = run(tmp_path, "generate", talks["two"].out, *named(talks), "--data", data, *limits)
    assert [row["adapter"] for row in mixed] == names
    for name, world in talks.items():
        alone = run(tmp_path, "generate", world.out, "--data", data, *limits)
        own = [n for n, row in enumerate(mixed) if row["adapter"] == name]
        assert [mixed[n]["answer"] for n in own] == [alone[n]["answer"] for n in own]
        assert [mixed[n]["prompt"] for n in own] == [alone[n]["prompt"] for n in own]
    answers = {row["answer"] for row in mixed}
    assert len(answers) > 4


def test_data_to_text_of_each_adapter_alone(talk, tmp_path):
    """An input of two adapters is described by both."""
    talk.describe(beams=1, max_new_tokens=6, inputs=6, batch_size=4)
    overrides = {"all": (), "two": OTHER}
    made = {name: with_adapter(talk, tmp_path / name, *more) for name, more in overrides.items()}
    mrs = [row["mr"] for row in language.descriptions()[:3]]
    rows = [{"mr": mr, "adapter": name} for mr in mrs for name in made]
    talk.write_rows("named.csv", rows)
    data = talk.directory / "named.csv"
    mixed = run(tmp_path, "generate", made["all"].out, *named(made), "--data", data)
    assert [row["adapter"] for row in mixed] == ["all", "two"] * 3
    for name, world in made.items():
        alone = run(tmp_path, "generate", world.out, "--data", data)
        found = {row["prompt"]: row["answer"] for row in mixed if row["adapter"] == name}
        assert found == {row["prompt"]: row["answer"] for row in alone}


def test_every_prompt_is_for_the_adapters_that_use_names(talks, capsys):
    prompts = ("--prompt", "what colour is snow", "--prompt", "say it", "--max_tokens", "2")
    # A model as the base: the first adapter has the settings.
    assert (
        main(["generate", str(talks["all"].model), *named(talks), *prompts, "--use", "two", "--use", "base"])
        == 0
    )
    heads = [line for line in capsys.readouterr().out.splitlines() if "> " in line]
    assert heads == [f"{name}> {text}" for text in prompts[1:4:2] for name in ("two", "base")]
    assert main(["generate", str(talks["all"].model), *named(talks), *prompts]) == 0
    assert capsys.readouterr().out.count("third> ") == 2


def test_predictions_are_those_of_each_adapter_alone(worlds, tmp_path):
    texts = [row["text"] for row in worlds["a"].rows()[:9]]
    names = ["a", "b", "b", "a", "b", "a", "a", "b", "b"]
    rows = [{"text": text, "adapter": name} for text, name in zip(texts, names, strict=True)]
    data = write(tmp_path / "named.jsonl", rows)
    mixed = run(tmp_path, "predict", worlds["a"].model, *named(worlds), "--data", data)
    assert [(row["text"], row["adapter"]) for row in mixed] == list(zip(texts, names, strict=True))
    for name, world in worlds.items():
        alone = run(tmp_path, "predict", world.out, "--data", data)
        for row, other in zip(mixed, alone, strict=True):
            if row["adapter"] == name:
                assert row["prediction"] == other["prediction"]
                assert row["probabilities"] == pytest.approx(other["probabilities"], abs=2e-6)


def test_what_is_wrong_with_names_and_bases_is_one_message(talks, worlds, tmp_path, capsys):
    rows = talks["all"].rows()[:3]
    unnamed = write(tmp_path / "unnamed.jsonl", [*({**row, "adapter": "all"} for row in rows[:2]), rows[2]])
    wrong = write(tmp_path / "wrong.jsonl", [{**row, "adapter": "al"} for row in rows])
    model, a, out = talks["all"].model, named(talks), talks["all"].out
    ask = ("--prompt", "what")
    cases = [
        (("generate", model, "--adapter", "all", *ask), ("--adapter", "NAME=DIR", "'all'")),
        (("generate", model, "--adapter", f"base={out}", *ask), ("base", "no adapter")),
        (("generate", model, *a[:2], *a[:2], *ask), ("'all'", "another name")),
        (("generate", model, "--adapter", f"x={tmp_path}", *ask), (tmp_path, "no adapter")),
        (("generate", model, *ask, "--use", "all"), ("--use", "--adapter")),
        (("generate", model, *a, "--data", wrong, "--use", "all"), ("--use", "--prompt")),
        (("generate", model, *a, *ask, "--dtype", "bfloat16"), ("--dtype",)),
        (("generate", model, *a, *ask, "--config", talks["all"].config), ("--config", "--adapter")),
        (("predict", model, "--text", "x", "--use", "a"), ("--use", "--adapter")),
        (("predict", out, *named(worlds), "--glue", tmp_path / "glue"), ("--glue", "--adapter")),
        (("predict", worlds["a"].model, *named(worlds), "--data", wrong, "--use", "a"), ("--use", "--text")),
        (("generate", model, *a, "--data", unnamed), (f"{unnamed}:3", "adapter")),
        (("generate", model, *a, "--data", wrong), (f"{wrong}:1", "'al'", "all, two, third, base")),
        (("generate", model, *a, *ask, "--use", "to"), ("--use", "'to'", "'two'")),
        (
            ("generate", model, *a, "--adapter", f"bert={worlds['a'].out}", *ask),
            (worlds["a"].out, "classification"),
        ),
        (("predict", worlds["a"].model, *named(worlds), "--text", "x", "--use", "base"), ("'base'", "a, b")),
    ]
    for words, mentioned in cases:
        assert main([*map(str, words)]) == 2, words
        assert_mentions(capsys.readouterr().err, *mentioned)


def test_an_adapter_of_another_base_is_rejected(talks, first_talk, tmp_path, capsys):
    other = with_adapter(first_talk, tmp_path / "plain")  # the same base, not packed
    words = (
        "generate",
        talks["all"].out,
        *named(talks),
        "--adapter",
        f"plain={other.out}",
        "--prompt",
        "what",
    )
    assert main([*map(str, words)]) == 2
    assert_mentions(capsys.readouterr().err, other.out, "base.weights")


def test_an_encoder_that_computes_otherwise_is_rejected(worlds, first_world, tmp_path, capsys):
    other = with_adapter(first_world, tmp_path / "other", "--model.pooling", "cls")
    words = ("predict", worlds["a"].model, *named(worlds), "--adapter", f"other={other.out}", "--text", "x")
    assert main([*map(str, words)]) == 2
    assert_mentions(capsys.readouterr().err, other.out, "model.pooling", "cls", "mean")
