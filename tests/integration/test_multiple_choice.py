"""Whole runs on questions with several answers, scored by hand beside."""

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from loraplus_jax.adapter.tree import combine
from loraplus_jax.inference.predict import load_tuned
from loraplus_jax.training import trainer

from . import language_world as tiny
from .runs import NO_PROMPT, evaluated, flags, summary_of

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.slow]

CHOICES = "--task multiple_choice --data.path {dir}/questions.jsonl"


@pytest.fixture(scope="module")
def chosen(first_talk, tmp_path_factory, cache):
    """A world with a run on questions, to be read only."""
    world = first_talk.copy(tmp_path_factory.mktemp("chosen"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_loss", lambda *_: None)
        world.trained(*flags(CHOICES.format(dir=world.directory)), *NO_PROMPT, "--train.steps", "80")
    return world


def by_hand(world, rows):
    """The log-likelihoods of all choices, float64, from the logits of each question with one choice in it."""
    tuned = load_tuned(world.out)
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


def test_multiple_choice_learns_and_is_what_full_logits_say(chosen, capsys):
    summary = summary_of(chosen.out)
    assert set(summary["after"]) == {"accuracy", "accuracy_per_byte", "loss", "perplexity"}
    assert summary["after"]["accuracy"] > 0.9
    assert summary["before"]["accuracy"] < 0.7
    found = evaluated(capsys, chosen.out)
    assert found["accuracy"] == summary["after"]["accuracy"]
    rows = tiny.questions()
    rows = rows[::3] + [{**row, "prompt": row["prompt"].replace("is", "was")} for row in rows[1::3]]
    rows += [{**row, "answer": row["choices"][0]} for row in rows]  # not all of them right
    file = chosen.write_rows("mixed.jsonl", rows)
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
