"""`generate` and `predict` with several adapters: each request is answered as by its adapter alone."""

import json
import shutil

import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.inference.several_adapters import SeveralAdapters, read_adapter_column, slots_of, use_of

from ..integration import language_world as language
from ..integration.runs import flags, lines_of
from ..messages import assert_mentions
from ..refusals import refusals
from .conftest import with_adapter

PACKED = flags("--model.quantize nf4")
TWO = flags("--lora.rank 2 --lora.alpha 3 --lora.target_modules [q_proj,o_proj]")
THIRD = flags("--lora.rank 3 --lora.use_rslora true --lora.target_modules [down_proj,lm_head]")


@pytest.fixture(scope="module")
def talks(first_talk, tmp_path_factory, cache):
    """Two adapters over one packed base, by name."""
    return {
        name: with_adapter(first_talk, tmp_path_factory.mktemp(name), *PACKED, *flags)
        for name, flags in {"two": TWO, "third": THIRD}.items()
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


@pytest.mark.slow
def test_texts_are_those_of_each_adapter_alone(talks, tmp_path):
    """With beams, on a mesh; greedily each prompt has the tokens of its adapter by `models/decoding`."""
    rows = talks["two"].rows()[:6]
    names = ["two", "third", "base", "third", "third", "two"]
    data = write(tmp_path / "named.jsonl", [row | {"adapter": n} for row, n in zip(rows, names, strict=True)])
    limits = ("--max_tokens", "6", *flags("--beams 3 --mesh.data 2 --mesh.tensor 2"))
    # The run gives the settings, as the base is packed.
    mixed = run(tmp_path, "generate", talks["two"].out, *named(talks), "--data", data, *limits)
    assert [row["adapter"] for row in mixed] == names
    for name, world in talks.items():
        alone = run(tmp_path, "generate", world.out, "--data", data, *limits)
        own = [n for n, row in enumerate(mixed) if row["adapter"] == name]
        assert [mixed[n]["answer"] for n in own] == [alone[n]["answer"] for n in own]
        assert [mixed[n]["prompt"] for n in own] == [alone[n]["prompt"] for n in own]
    assert len({row["answer"] for row in mixed}) > 3


@pytest.mark.slow
def test_data_to_text_of_each_adapter_alone(talk, tmp_path):
    """An input of two adapters is described by both."""
    talk.describe(beams=1, max_new_tokens=6, inputs=6, batch_size=4)
    made = {
        name: with_adapter(talk, tmp_path / name, *more) for name, more in {"all": (), "two": TWO}.items()
    }
    mrs = [row["mr"] for row in language.descriptions()[:3]]
    talk.write_rows("named.csv", [{"mr": mr, "adapter": name} for mr in mrs for name in made])
    data = talk.directory / "named.csv"
    mixed = run(tmp_path, "generate", made["all"].out, *named(made), "--data", data)
    assert [row["adapter"] for row in mixed] == ["all", "two"] * 3
    alone = run(tmp_path, "generate", made["two"].out, "--data", data)
    found = {row["prompt"]: row["answer"] for row in mixed if row["adapter"] == "two"}
    assert found == {row["prompt"]: row["answer"] for row in alone}
    assert found != {row["prompt"]: row["answer"] for row in mixed if row["adapter"] == "all"}


@pytest.mark.slow
def test_every_prompt_is_for_the_adapters_that_use_names(talks, capsys):
    prompts = ("--prompt", "what colour is snow", "--prompt", "say it", "--max_tokens", "2")
    # A model as the base: the first adapter has the settings.
    words = ("generate", str(talks["two"].model), *named(talks), *prompts, "--use", "two", "--use", "base")
    assert main([*map(str, words)]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if "> " in line]
    assert heads == [f"{name}> {text}" for text in prompts[1:4:2] for name in ("two", "base")]


SEVERAL = SeveralAdapters(None, {}, {"a": 0, "b": 1, "base": 2})


def test_without_names_a_prompt_is_for_every_adapter():
    assert use_of((), SEVERAL) == ["a", "b"]
    assert slots_of(["b", "base"], SEVERAL, ["", ""]) == [1, 2]


@pytest.fixture
def unnamed(tmp_path):
    """A file whose third row names no adapter."""
    row = {"instruction": "a", "output": "b"}
    return write(tmp_path / "unnamed.jsonl", [row | {"adapter": "a"}, row | {"adapter": "b"}, row])


test_names_that_no_adapter_has = refusals(
    (lambda: use_of(["basis"], SEVERAL), "--use", "'basis'", "a, b, base"),
    (lambda: slots_of(["a", "c"], SEVERAL, ["f:1", "f:2"]), "f:2", "'c'", "a, b, base"),
    (lambda unnamed: read_adapter_column(unnamed), "unnamed.jsonl:3", "adapter"),
    lines=9,
)


@pytest.mark.slow
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


def edited(world, directory, edit):
    """A copy of a world's adapter whose notes are changed."""
    copy = shutil.copytree(world.out / "adapter", directory)
    notes = json.loads((copy / "adapter.json").read_text())
    edit(notes)
    del notes["digest"]
    (copy / "adapter.json").write_text(json.dumps(notes))
    return copy


@pytest.mark.slow
def test_what_is_wrong_with_names_and_bases_is_one_message(talks, worlds, tmp_path, capsys):
    wrong = write(tmp_path / "wrong.jsonl", [{**row, "adapter": "to"} for row in talks["two"].rows()[:3]])
    model, a, out, bert = talks["two"].model, named(talks), talks["two"].out, worlds["a"].model
    ask = ("--prompt", "what")
    cls = edited(
        worlds["a"], tmp_path / "cls", lambda notes: notes["settings"]["model"].update(pooling="cls")
    )
    plain = edited(talks["two"], tmp_path / "plain", lambda notes: notes.update(base="0" * 64))
    cases = [
        (("generate", model, "--adapter", "all", *ask), ("--adapter", "NAME=DIR", "'all'")),
        (("generate", model, "--adapter", f"base={out}", *ask), ("base", "no adapter")),
        (("generate", model, *a[:2], *a[:2], *ask), ("'two'", "another name")),
        (("generate", model, "--adapter", f"x={tmp_path}", *ask), (tmp_path, "no adapter")),
        (("generate", model, *a, *ask, "--dtype", "bfloat16"), ("--dtype",)),
        (("generate", model, *a, "--data", wrong), (f"{wrong}:1", "'to'", "two, third, base")),
        (("generate", model, *a, "--adapter", f"bert={worlds['a'].out}", *ask), ("classification",)),
        (("predict", bert, *named(worlds), "--text", "x", "--use", "base"), ("'base'", "a, b")),
        (("predict", bert, *named(worlds), "--adapter", f"x={cls}", "--text", "x"), (cls, "model.pooling")),
        (
            ("generate", out, *a, "--adapter", f"plain={plain}", *ask, "--max_tokens", "4"),
            (plain, "base.weights"),
        ),
    ]
    for words, mentioned in cases:
        assert main([*map(str, words)]) == 2, words
        assert_mentions(capsys.readouterr().err, *mentioned)
