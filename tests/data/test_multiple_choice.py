"""Questions with choices: reading, and what is scored."""

import json

import numpy as np
import pytest

from loraplus_jax.data.chat_template import PLAIN
from loraplus_jax.data.multiple_choice import Question, encode_choices, pack_choices, read_questions

from ..messages import mentions
from ..refusals import refusals
from .chats import CHATML, INST, MARKED, template, write_json

COMMONSENSE = {
    "instruction": "Is it so?\n\nanswer1: a answer2: b\n\nAnswer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


@pytest.mark.parametrize(
    ("answer", "index"), [(1, 1), ("yes", 1), (" no", 0), ("B", 1), ("c", 2), ("2", 2), ("7", 3)]
)
def test_the_right_choice_by_text_letter_or_index(tmp_path, answer, index):
    row = {"question": "So?", "choices": ["no", "yes", "x y", "7"], "answer": answer}
    path = write_json(tmp_path / "a.json", [row])
    assert read_questions(path) == [Question("So?", ("no", "yes", "x y", "7"), index, f"{path}: item 1")]
    renamed = {"q": row["question"], "c": json.dumps(row["choices"]), "a": answer}
    named = {"prompt": "q", "choices": "c", "answer": "a"}
    assert read_questions(write_json(tmp_path / "a.json", [renamed]), named) == read_questions(
        write_json(path, [row])
    )


@pytest.mark.parametrize(
    "words", ["answer1/answer2/answer3", "true/false", "ending1/ending2/ending3/ending4"]
)
def test_commonsense_rows(tmp_path, words):
    names = words.split("/")
    row = {"instruction": f"So?\n\nAnswer format: {words}", "output": f"the correct answer is {names[1]}"}
    (question,) = read_questions(write_json(tmp_path / "a.json", [row | {"input": "", "answer": names[1]}]))
    assert question.prompt == row["instruction"]
    assert question.choices == tuple(f"the correct answer is {n}" for n in names)
    assert question.answer == 1
    (question,) = read_questions(write_json(tmp_path / "a.json", [row | {"input": "more"}]))
    assert question.prompt.endswith("\n\nmore")


GOOD = {"prompt": "So?", "choices": ["x", "y", "z"], "answer": 0}


def question(**changes):
    return lambda tmp_path: read_questions(write_json(tmp_path / "a.jsonl", [GOOD, GOOD | changes]))


def commonsense(**changes):
    rows = [COMMONSENSE, COMMONSENSE | changes]
    return lambda tmp_path: read_questions(write_json(tmp_path / "a.json", rows))


def read(tmp_path, row, columns=None):
    return read_questions(write_json(tmp_path / "a.json", [row]), columns)


test_questions_that_are_rejected = refusals(
    (question(answer=3), "a.jsonl:2", "'answer'", "A", "C", 0, 2),
    (question(answer=True), "a.jsonl:2", "'answer'", True),
    (question(answer="d"), "a.jsonl:2", "'answer'", "'d'"),
    (question(answer=None), "a.jsonl:2", "'answer'", None),
    (question(choices=["a"]), "a.jsonl:2", "choices", "two"),
    (question(choices=["a", "a"]), "a.jsonl:2", "choices", "different"),
    (question(choices=["a", ""]), "a.jsonl:2", "choices", "empty"),
    (question(choices=["a", 3]), "a.jsonl:2", "choices", "texts"),
    (question(choices="a, b"), "a.jsonl:2", "'choices'", "list", "a, b"),
    (question(prompt=" "), "a.jsonl:2", "'prompt'", "empty"),
    (commonsense(instruction="So?"), "item 2", "instruction", "'Answer format: '"),
    (commonsense(instruction="Answer format: yes"), "item 2", "instruction", "Answer format"),
    (
        commonsense(output="the correct answer is answer4"),
        *("item 2", "output", "'the correct answer is answer1'"),
    ),
    (commonsense(output="answer2"), "item 2", "output", "'answer2'"),
    (lambda tmp_path: read(tmp_path, {"text": "a"}), "text", "prompt"),
    (lambda tmp_path: read(tmp_path, COMMONSENSE, {"prompt": "a"}), "prompt", "choices", "answer"),
)


@pytest.mark.parametrize("source", [CHATML, PLAIN, INST, MARKED], ids=["chatml", "plain", "inst", "marked"])
def test_only_the_choice_is_scored(tokenizer, source):
    questions = [
        Question("the \u4e16 user?", ("yes", "the answers are no", "\U0001f680"), 1),
        Question("b", ("no", "b"), 0),
    ]
    sequences = encode_choices(questions, tokenizer, template(source), 64)
    found = {}
    for ids, mask, choices in zip(*sequences.columns.values(), sequences.choices, strict=True):
        for n, k, right, size, tokens, last in choices:
            scored = [*ids[mask == 1].tolist(), last]
            assert len(scored) == tokens
            assert right == (questions[n].answer == k)
            assert size == len(questions[n].choices[k].encode())
            found[n, k] = tokenizer.decode(scored).strip()
            assert mask.tolist() == sorted(mask)  # nothing stands behind it
    assert found == {(n, k): text for n, q in enumerate(questions) for k, text in enumerate(q.choices)}


def test_choices_that_differ_in_the_last_token_share_a_row_by_hand(tokenizer):
    questions = [Question("ab", ("ca", "cb", "d"), 1), Question("a", ("b", "c"), 0)]
    first, second, long = (
        encode_choices([q], tokenizer, template(), 128)
        for q in (*questions, Question("x" * 80, ("b", "c"), 0))
    )
    assert [[choice[1] for choice in own] for own in first.choices] == [[0, 1], [2]]
    assert [[choice[1] for choice in own] for own in second.choices] == [[0, 1]]
    own = [x.tolist() for x in (*first.columns["input_ids"], *second.columns["input_ids"])]
    batch, other = pack_choices([encode_choices(questions, tokenizer, template(), 128), long], 128)
    assert batch["input_ids"].shape[1:] == other["input_ids"].shape[1:]
    assert batch["last"].shape[1:] == other["last"].shape[1:] == (3, 2)
    (row,), (end,), (segments,) = batch["input_ids"], batch["end"], batch["segment_ids"]
    assert [row[segments == n].tolist() for n in (1, 2, 3)] == own
    assert end.tolist() == (np.cumsum([*map(len, own)]) - 1).tolist()
    assert batch["question"].tolist() == [[[0, 0], [0, 0], [1, 1]]]
    assert batch["choice"].tolist() == [[[0, 1], [2, 0], [0, 1]]]
    assert batch["right"].tolist() == [[[0, 1], [0, 0], [1, 0]]]
    assert batch["tokens"].tolist() == [[[2, 2], [1, 0], [1, 1]]]
    assert batch["byte_lengths"].tolist() == [[[2, 2], [1, 0], [1, 1]]]
    assert [tokenizer.decode([n]) for n in batch["last"].reshape(-1)[[0, 1, 2, 4, 5]]] == [*"abdbc"]


def test_spaces_at_the_end_of_a_choice_are_scored(tokenizer):
    """Trimmed offsets would leave them out."""
    columns, (choices, _) = encode_choices([Question("a", ("  yes  ", "no"), 0)], tokenizer, template(), 64)
    scored = columns["input_ids"][0][columns["loss_mask"][0] == 1].tolist()
    assert tokenizer.decode([*scored, choices[0][-1]]) == "  yes  "


def test_a_question_that_is_too_long_is_rejected(tokenizer):
    question = Question("a", ("b", "b" * 30), 0, "f:3")
    need = 1 + max(map(len, encode_choices([question], tokenizer, template(), 99).columns["input_ids"]))
    encode_choices([question], tokenizer, template(), need)
    with pytest.raises(
        ValueError, match=mentions("f:3", f"{need} tokens", "choice 2", f"max_length {need - 1}")
    ):
        encode_choices([question], tokenizer, template(), need - 1)
    (batch,) = pack_choices([encode_choices([], tokenizer, template(), 9)], 9)
    assert batch["input_ids"].shape == (0, 9)


@pytest.mark.parametrize(
    ("letters", "most", "row"), [(1, 500, 32), (60, 500, 96), (60, 90, 90), (200, 500, 256), (200, 240, 240)]
)
def test_rows_are_hardly_longer_than_the_longest_choice(tokenizer, letters, most, row):
    sequences = encode_choices([Question("a", ("b", "b" * letters), 0)], tokenizer, template(), most)
    (batch,) = pack_choices([sequences], most)
    assert batch["input_ids"].shape[1] == row
    assert max(map(len, sequences.columns["input_ids"])) <= row


def test_rows_of_choices_are_as_long_as_takes_the_least_time(tokenizer):
    """Of 46 tokens one fits into a row of 64, and two into one of 96."""

    def rows(size, most):
        sequences = encode_choices(
            [Question("a" * size, ("b", "c"), 0) for _ in range(12)], tokenizer, template(), most
        )
        (batch,) = pack_choices([sequences], most)
        return max(map(len, sequences.columns["input_ids"])), batch["input_ids"].shape

    before, _ = rows(1, 500)
    assert rows(47 - before, 500) == (46, (6, 96))
    assert rows(47 - before, 90) == (46, (12, 64))


def test_choices_of_other_questions_share_no_sequence(tokenizer):
    """A prompt that many questions repeat would make one of thousands of choices."""
    sequences = encode_choices([Question("a", (x, "bb"), 0) for x in "cde"], tokenizer, template(), 64)
    assert [len(choices) for choices in sequences.choices] == 6 * [1]


def test_a_choice_without_a_token_to_score_is_rejected(tokenizer):
    bare = template("{% for m in messages %}{{ m.content if m.role == 'assistant' else '' }}{% endfor %}")
    with pytest.raises(ValueError, match=mentions("f:3", "choice 1")):
        encode_choices([Question("a", ("b", "cd"), 0, "f:3")], tokenizer, bare, 64)
