"""Whole runs of data-to-text with a tiny model: texts and scores before and after, resuming, eval, generate."""

import pytest

from ..messages import assert_mentions
from . import language_world as tiny
from .runs import MESH, SHORT, evaluated, flags, interrupted, lines_of, printed, result_of, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

SCORES = {"bleu", "chrf", "rouge_l", "nist"}


@pytest.fixture
def e2e(talk):
    """The tiny language world with descriptions in separate files."""
    talk.describe(beams=3, max_new_tokens=8, no_repeat_ngram=3, inputs=6, batch_size=4)
    return talk


def test_a_run_learns_to_describe_and_its_texts_are_beside_its_scores(e2e, capsys):
    e2e.trained("--train.steps", "60")
    output, summary = capsys.readouterr().out, summary_of(e2e.out)
    assert set(summary["after"]) == {"loss", "perplexity"} | SCORES
    assert summary["held_out"] == {"split": "test", "examples": 12, "inputs": 6}
    assert all(summary["before"][name] < summary["after"][name] for name in SCORES)
    assert summary["after"]["bleu"] > 50
    before, after = (lines_of(e2e.out / name) for name in ("generated_before.jsonl", "generated.jsonl"))
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
    found = evaluated(capsys, e2e.out, "--output", e2e.directory / "texts.jsonl")
    assert {name: found[name] for name in SCORES} == pytest.approx({n: summary["after"][n] for n in SCORES})
    assert lines_of(e2e.directory / "texts.jsonl") == after
    answers = printed(capsys, "generate", e2e.out, "--prompt", after[0]["mr"])
    assert answers.strip().splitlines()[-1] == after[0]["text"]
    e2e.write_rows("inputs.csv", [{"mr": row["mr"]} for row in (*after, after[0])])
    texts = e2e.directory / "answers.jsonl"
    printed(capsys, "generate", e2e.out, "--data", e2e.directory / "inputs.csv", "--output", texts)
    assert [row["answer"] for row in lines_of(texts)] == [row["text"] for row in after]


def test_an_interrupted_run_resumes_bit_identical_and_does_not_describe_again(e2e, tmp_path):
    straight = e2e.trained(*SHORT, out=tmp_path / "straight")
    interrupted(e2e, 6, *SHORT)
    texts = e2e.out / "generated_before.jsonl"
    written = texts.stat().st_mtime_ns
    assert e2e.train(*SHORT) == 0
    assert result_of(e2e.out) == result_of(straight)
    assert texts.stat().st_mtime_ns == written
    assert (e2e.out / "generated.jsonl").read_bytes() == (straight / "generated.jsonl").read_bytes()
    assert e2e.train(*SHORT, "--train.steps", "9") == 0  # a finished run that continues keeps its older texts
    assert (e2e.out / "generated_step_8.jsonl").exists()


@pytest.mark.long
def test_without_a_test_file_the_validation_split_is_described_also_on_a_mesh(e2e):
    files = flags("--data.test null --generation.inputs null --data.validation_fraction 0.2")
    e2e.trained(*SHORT, *files, *MESH)
    assert summary_of(e2e.out)["held_out"] == {"split": "validation", "examples": 20, "inputs": 10}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--generation.beams 1000", ("generation.beams", 1000, "vocabulary")),
        ("--generation.inputs 13", ("generation.inputs", 12, 13)),
        ("--generation.max_new_tokens 64", ("generation.max_new_tokens", 64)),
        ("--generation.beams 0", ("generation.beams", 0)),
        ("--generation.early_stopping soon", ("generation.early_stopping", "soon", "never")),
        ("--data.answers last", ("data.answers", "generation")),
        ("--data.column_names '{mr: input}'", ("input", "train.csv:1")),
    ],
)
def test_invalid_settings_are_one_error_and_nothing_is_written(e2e, capsys, args, words):
    assert_mentions(e2e.rejected(capsys, *flags(args)), *words)
    assert not e2e.out.exists()
