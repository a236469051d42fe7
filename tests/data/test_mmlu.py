"""MMLU's and LLM-Adapters' files: what is read, the prompts, and the files that are rejected."""

import csv
import json

import pytest

from loraplus_jax.data.commonsense import COMMONSENSE, read_commonsense
from loraplus_jax.data.mmlu import read_mmlu

from ..messages import mentions
from ..refusals import refusals

DEV = [
    ["What is 1 + 1?", "1", "2", "3", "4", "B"],
    ['The "empty" set, in words,\nhas', "no elements", "one", "two", "N/A", "A"],
]
TEST = [["Which is prime?", "4", "6", "7", "9", "C"], ["2 - 2 =", "0", "1", "2", "", "A"]]
PROMPT = (
    "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
    'The "empty" set, in words,\nhas\nA. no elements\nB. one\nC. two\nD. N/A\nAnswer: A\n\n'
    "Which is prime?\nA. 4\nB. 6\nC. 7\nD. 9\nAnswer:"
)


def write_mmlu(directory, subject="abstract_algebra", dev=DEV, test=TEST):
    """A subject's files, in MMLU's layout."""
    for split, rows in {"dev": dev, "test": test}.items():
        (directory / split).mkdir(parents=True, exist_ok=True)
        with (directory / split / f"{subject}_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


@pytest.mark.parametrize("location", ["mmlu/data", "mmlu", "data", "."])
def test_a_subject_and_its_prompt(tmp_path, location):
    write_mmlu(tmp_path / location)
    (subject,) = read_mmlu(tmp_path, 2)
    assert subject.prompt(subject.questions[0], 2) == PROMPT
    header, first, _, question = PROMPT.replace("\n\nhas", "\nhas").split("\n\n")
    assert subject.prompt(subject.questions[0], 0) == f"{header}\n\n{question}"
    assert subject.prompt(subject.questions[0], 1) == f"{header}\n\n{first}\n\n{question}"
    assert [q.answer for q in subject.questions] == [2, 0]
    assert subject.questions[0].choices == (" A", " B", " C", " D")
    assert subject.questions[1].prompt.endswith("\nD. \nAnswer:")


def reading(shots, only="", gone="", **files):
    """Reads a subject's files, with others in their place or one away."""

    def call(tmp_path):
        (tmp_path / "boolq").mkdir()
        if not only:
            write_mmlu(tmp_path, **files)
        if gone:
            (tmp_path / gone).unlink()
        return read_mmlu(tmp_path, shots)

    return call


ODD = [*TEST, ["So?", "a", "b", "c", "d", "E"]]
GONE = "dev/abstract_algebra_dev.csv"

test_files_of_mmlu_that_are_rejected = refusals(
    (reading(5, "boolq"), "mmlu", "SUBJECT_test.csv", "boolq"),
    (reading(3), "--shots 3", 2, "abstract_algebra_dev.csv"),
    (reading(2, test=ODD), "abstract_algebra_test.csv:3", "A", "D", "'E'"),
    (reading(2, test=[["So?", "a", "b", "c", "A"]]), "abstract_algebra_test.csv:1", 5, 6),
    (reading(1, gone=GONE), "abstract_algebra_dev.csv", "missing"),
)


def test_without_shots_no_examples_are_read(tmp_path):
    assert len(reading(0, gone=GONE)(tmp_path)) == 1


def test_commonsense_by_name(tmp_path):
    row = {"instruction": "So?\n\nAnswer format: true/false", "input": "", "answer": "false"}
    for name, folder in COMMONSENSE.items():
        with pytest.raises(ValueError, match=mentions(name, f"{folder}/test.json")):
            read_commonsense(tmp_path, name)
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "test.json"
        file.write_text(json.dumps([row | {"output": "the correct answer is false"}]))
        (question,) = read_commonsense(tmp_path, name)
        assert question.answer == 1
        file.write_text(json.dumps([row | {"output": "the correct answer is maybe"}]))
        with pytest.raises(ValueError, match=mentions("test.json", "item 1", "output", "maybe")):
            read_commonsense(tmp_path, name)
