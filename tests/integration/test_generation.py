"""Whole runs of data-to-text with a tiny model: texts and scores before and after, resuming, eval, generate."""

import json

import pytest

from loraplus_jax.cli.commands import main

from ..messages import assert_mentions
from . import language_world as tiny
from .test_export import printed
from .test_run import interrupt_at, printed_json, summary_of, tensor_bytes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

SCORES = {"bleu", "chrf", "rouge_l", "nist"}
SHORT = ("--train.steps", "8", "--train.eval_every", "4", "--train.log_every", "2", "--optimizer.eps", "1e-3")


@pytest.fixture
def e2e(talk):
    """The tiny language world with descriptions in separate files."""
    rows = tiny.descriptions()
    talk.write_rows("train.csv", rows[:96])
    talk.write_rows("test.csv", rows[96:])
    files = {"train": str(talk.directory / "train.csv"), "test": str(talk.directory / "test.csv")}
    talk.change_config("data", path=None, template="completion", max_length=48, **files)
    talk.change_config("train", prompt=None, prompt_tokens=None)
    talk.change_config("generation", beams=3, max_new_tokens=8, no_repeat_ngram=3, inputs=6, batch_size=4)
    talk.change_config(task="generation")
    return talk


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_learns_to_describe_and_its_texts_are_beside_its_scores(e2e, capsys):
    e2e.trained("--train.steps", "60")
    output, summary = capsys.readouterr().out, summary_of(e2e.out)
    assert set(summary["after"]) == {"loss", "perplexity"} | SCORES
    assert summary["held_out"] == {"split": "test", "examples": 12, "inputs": 6}
    assert all(summary["before"][name] < summary["after"][name] for name in SCORES)
    assert summary["after"]["bleu"] > 50
    before, after = (rows_of(e2e.out / name) for name in ("generated_before.jsonl", "generated.jsonl"))
    test = tiny.descriptions()[96:]
    assert [row["mr"] for row in before] == [row["mr"] for row in after]
    for row in after:
        assert row["references"] == [x["ref"] for x in test if x["mr"] == row["mr"]]
    right = [row["text"] in row["references"] for row in after]
    assert sum(right) > len(right) / 2
    shown = [line for line in output.splitlines() if line.startswith("> ")]
    assert len(shown) == 2 * 5
    assert f"after:     {after[0]['text']}\nreference: {after[0]['references'][0]}" in output
    # The same scores and texts by the other commands.
    found = printed_json(capsys, "eval", str(e2e.out), "--output", str(e2e.directory / "texts.jsonl"))
    assert {name: found[name] for name in SCORES} == pytest.approx({n: summary["after"][n] for n in SCORES})
    assert rows_of(e2e.directory / "texts.jsonl") == after
    answers = printed(capsys, "generate", e2e.out, "--prompt", after[0]["mr"])
    assert answers.strip().splitlines()[-1] == after[0]["text"]
    e2e.write_rows("inputs.csv", [{"mr": row["mr"]} for row in (*after, after[0])])
    texts = e2e.directory / "answers.jsonl"
    assert (
        main(["generate", str(e2e.out), "--data", str(e2e.directory / "inputs.csv"), "--output", str(texts)])
        == 0
    )
    assert [row["answer"] for row in rows_of(texts)] == [row["text"] for row in after]


def test_an_interrupted_run_resumes_bit_identical_and_does_not_describe_again(e2e, tmp_path):
    straight = e2e.trained(*SHORT, out=tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6)
        assert e2e.train(*SHORT) == 130
    texts = e2e.out / "generated_before.jsonl"
    written = texts.stat().st_mtime_ns
    assert e2e.train(*SHORT) == 0
    assert tensor_bytes(e2e.out) == tensor_bytes(straight)
    assert texts.stat().st_mtime_ns == written
    assert (e2e.out / "generated.jsonl").read_bytes() == (straight / "generated.jsonl").read_bytes()
    assert summary_of(e2e.out)["before"] == summary_of(straight)["before"]
    assert e2e.train(*SHORT, "--train.steps", "9") == 0  # a finished run that continues keeps its older texts
    assert (e2e.out / "generated_step_8.jsonl").exists()


def test_without_a_test_file_the_validation_split_is_described_also_on_a_mesh(e2e):
    flags = ("--data.test", "null", "--generation.inputs", "null", "--data.validation_fraction", "0.2")
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    e2e.trained(*SHORT, *flags, *mesh)
    assert summary_of(e2e.out)["held_out"] == {"split": "validation", "examples": 20, "inputs": 10}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--generation.beams", "1000"), ("generation.beams", 1000, "vocabulary")),
        (("--generation.inputs", "13"), ("generation.inputs", 12, 13)),
        (("--generation.max_new_tokens", "64"), ("generation.max_new_tokens", 64)),
        (("--generation.beams", "0"), ("generation.beams", 0)),
        (("--generation.early_stopping", "soon"), ("generation.early_stopping", "soon", "never")),
        (("--data.answers", "last"), ("data.answers", "generation")),
        (("--data.column_names", "{mr: input}"), ("input", "train.csv:1")),
    ],
)
def test_invalid_settings_are_one_error_and_nothing_is_written(e2e, capsys, flags, words):
    assert e2e.train(*flags) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert_mentions(error, *words)
    assert not e2e.out.exists()
