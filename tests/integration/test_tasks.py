"""Whole runs of other tasks: data-to-text with its texts and scores, and questions, scored by hand beside."""

import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from loraplus_jax.adapter.tree import combine
from loraplus_jax.inference.tuned_model import describe, load
from loraplus_jax.training.place import look

from ..messages import assert_mentions
from . import language_world as tiny
from .properties import cells
from .runs import NO_PROMPT, evaluated, flags, lines_of, printed, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

CELLS = """
          learns  resumes  devices  exports  restarts
describe  slow    slow     -        -        -
choices   slow    -        -        -        -
"""


@pytest.mark.parametrize(("kind", "prove"), cells(CELLS))
def test_kind(kind, prove, run_of, undrawn):
    prove(run_of(kind))


SCORES = {"bleu", "chrf", "rouge_l", "nist"}


@pytest.fixture
def e2e(run_of, undrawn):
    """The tiny language world with descriptions in separate files."""
    return run_of("describe").fresh()


def test_texts_are_beside_the_scores_that_other_commands_repeat(run_of, tmp_path, undrawn, capsys):
    e2e = run_of("describe").finished
    output, summary = e2e.printed.read_text(), summary_of(e2e.out)
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
    found = evaluated(capsys, e2e.out, "--output", tmp_path / "texts.jsonl")
    assert {name: found[name] for name in SCORES} == pytest.approx({n: summary["after"][n] for n in SCORES})
    assert lines_of(tmp_path / "texts.jsonl") == after
    answers = printed(capsys, "generate", e2e.out, "--prompt", after[0]["mr"])
    assert answers.strip().splitlines()[-1] == after[0]["text"]
    inputs = e2e.write_rows(tmp_path / "inputs.csv", [{"mr": row["mr"]} for row in (*after, after[0])])
    texts = tmp_path / "answers.jsonl"
    printed(capsys, "generate", e2e.out, "--data", inputs, "--output", texts)
    assert [row["answer"] for row in lines_of(texts)] == [row["text"] for row in after]
    # A finished run that continues keeps its older texts.
    out = shutil.copytree(e2e.out, tmp_path / "out")
    e2e.trained("--train.steps", "61", out=out)
    assert lines_of(out / "generated_step_60.jsonl") == after


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--generation.beams 1000", ("generation.beams", 1000, "vocabulary")),
        ("--generation.inputs 13", ("generation.inputs", 12, 13)),
        ("--generation.max_new_tokens 64", ("generation.max_new_tokens", 64)),
        ("--data.column_names '{mr: input}'", ("input", "train.csv:1")),
    ],
)
def test_invalid_settings_are_one_error_and_nothing_is_written(e2e, capsys, args, words):
    assert_mentions(e2e.rejected(capsys, *flags(args)), *words)
    assert not e2e.out.exists()


def by_hand(world, rows):
    """The log-likelihoods of all choices, float64, from the logits of each question with one choice in it."""
    tuned = load(describe(look(world.out)))
    tokenizer = Tokenizer.from_file(str(world.model / "tokenizer.json"))
    variables = combine(tuned.parts.trainable, tuned.parts.frozen)
    apply = jax.jit(tuned.parts.model.apply)

    def likelihood(prompt, choice):
        head = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        before, ids = (len(tokenizer.encode(head).ids), tokenizer.encode(head + choice).ids)
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(apply(variables, padded, (np.arange(32) < len(ids))[None].astype(np.int32))[0])
        logits = logits.astype(np.float64)
        shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return sum(shares[t - 1, ids[t]] for t in range(before, len(ids)))

    return [[likelihood(row["prompt"], choice) for choice in row["choices"]] for row in rows]


def test_multiple_choice_learns_and_is_what_full_logits_say(run_of, tmp_path, capsys):
    chosen = run_of("choices").finished
    summary = summary_of(chosen.out)
    assert set(summary["after"]) == {"accuracy", "accuracy_per_byte", "loss", "perplexity"}
    assert summary["after"]["accuracy"] > 0.9
    assert summary["before"]["accuracy"] < 0.7
    found = evaluated(capsys, chosen.out)
    assert found["accuracy"] == summary["after"]["accuracy"]
    rows = tiny.questions()
    rows = rows[::3] + [{**row, "prompt": row["prompt"].replace("is", "was")} for row in rows[1::3]]
    rows += [{**row, "answer": row["choices"][0]} for row in rows]  # not all of them right
    file = chosen.write_rows(tmp_path / "mixed.jsonl", rows)
    found = evaluated(capsys, chosen.out, "--data", file)
    scores = by_hand(chosen, rows)
    right = [row["choices"].index(row["answer"]) for row in rows]
    per_byte = [
        [s / len(c.encode()) for s, c in zip(some, row["choices"], strict=True)]
        for some, row in zip(scores, rows, strict=True)
    ]
    assert found["accuracy"] == pytest.approx(
        np.mean([np.argmax(s) == r for s, r in zip(scores, right, strict=True)])
    )
    assert found["accuracy_per_byte"] == pytest.approx(
        np.mean([np.argmax(s) == r for s, r in zip(per_byte, right, strict=True)])
    )
    assert 0.2 < found["accuracy"] < 0.9
    # A choice has three tokens: it, is, and the colour.
    loss = -sum(s[r] for s, r in zip(scores, right, strict=True)) / (3 * len(rows))
    assert found["loss"] == pytest.approx(loss, rel=1e-4)


def test_separate_files_whose_questions_have_other_numbers_of_choices_and_lengths(talk, capsys):
    talk.change_config("data", max_length=64)
    rows = tiny.questions()
    few = [row for row in rows if len(row["choices"]) == 2]
    many = [row for row in rows if len(row["choices"]) == 4]
    many[0] = many[0] | {"prompt": "the snow is white " * 7}
    files = [
        word
        for name, part in {"train": rows[:60], "validation": few[:9], "test": many[:7]}.items()
        for word in (f"--data.{name}", str(talk.write_rows(f"{name}.jsonl", part)))
    ]
    out = talk.trained(
        "--task", "multiple_choice", "--data.path", "null", *files, *NO_PROMPT, "--train.steps", "3"
    )
    assert "data: 60 train, 9 validation, 7 test" in capsys.readouterr().out
    assert summary_of(out)["held_out"] == {"split": "test", "examples": 7}
    found = evaluated(capsys, out)
    assert found["accuracy"] == summary_of(out)["after"]["accuracy"]
    assert found["loss"] == pytest.approx(summary_of(out)["after"]["loss"], rel=1e-5)
    assert evaluated(capsys, out, "--split", "validation")["examples"] == 9
