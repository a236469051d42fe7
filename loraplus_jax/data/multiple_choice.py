"""Multiple choice: reads questions from files and encodes each choice as a continuation to score."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .batches import Batch
from .chat_template import ChatTemplate
from .chat_tokens import Tokens, find_answers, tokenize
from .conversations import Chat, Turn, choose_columns, take_list
from .packed_rows import fill, lengths_of, plan_packing, ragged, row_cost
from .readers import Problems, read_records, take_text
from .splits import comparable

LAYOUTS: Sequence[tuple[Mapping[str, str], Sequence[str]]] = (
    *(
        ({"prompt": name, "choices": "choices", "answer": "answer"}, ())
        for name in ("prompt", "question", "instruction")
    ),
    ({"instruction": "instruction", "output": "output"}, ("input",)),
)
_ALLOWED = "prompt (or question, instruction), choices and answer, or instruction and output"
ANSWER_PREFIX = "the correct answer is "
CHOICE = ("question", "choice", "right", "byte_lengths", "tokens", "last")
"""What `Sequences` has of each choice."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with at least two choices.

    Attributes:
      prompt: the user's message.
      choices: possible answers of the assistant, each in full.
      answer: index of the correct choice.
      place: location of the question, for error messages.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    place: str = "a question"

    @property
    def key(self) -> tuple[str, ...]:
        """What duplicates have in common: prompt and choices."""
        return tuple(map(comparable, (self.prompt, *sorted(self.choices))))

    @property
    def label_key(self) -> str:
        """What equal answers have in common."""
        return comparable(self.choices[self.answer])


def read_questions(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Question]:
    """Reads questions from a file of one of `readers.SUFFIXES`.

    A row has `prompt` (or `question` or `instruction`), `choices`, a list of texts (JSON in CSV and TSV), and
    `answer`: the correct choice's text, letter, or index from 0, tried in this order; a JSON number is an index.

    Rows without `choices` have the commonsense format of LLM-Adapters (arXiv 2304.01933): `instruction`, which ends
    in "Answer format: answer1/answer2/answer3" or similar, optionally `input`, and `output`, "the correct answer is
    answer2". The choices are then "the correct answer is answer1" and so on.

    Args:
      path: the file.
      columns: maps our names to the file's: `prompt`, `choices` and `answer`, or `instruction`, `output` and
        optionally `input`. By default, the file's columns must have the names above.

    Raises:
      ValueError: the file cannot be read, or rows are invalid: columns missing or of the wrong type, fewer than two
        choices, equal choices, or an answer that is not among them. One message shows the first 20 problems with
        their locations.
    """
    problems = Problems()
    records = list(read_records(path, problems))
    columns = choose_columns(path, records, columns, LAYOUTS, _ALLOWED)
    parse = _parse_choices if "choices" in columns else _parse_commonsense
    questions = []
    for location, values in records:
        with problems.at(location):
            questions.append(Question(*parse(values, columns), location))
    problems.report()
    return questions


class Sequences(NamedTuple):
    """Tokens of choices before the last; choices of a question that differ in the last token only share a sequence.

    Attributes:
      columns: ragged `input_ids` and `loss_mask` of the sequences, 1 at their tokens of a choice.
      choices: for each sequence its choices, each with what `CHOICE` names.
    """

    columns: dict[str, np.ndarray]
    choices: list[list[tuple[int, int, bool, int, int, int]]]


def encode_choices(
    questions: Sequence[Question], tokenizer: Tokenizer, template: ChatTemplate, max_length: int
) -> Sequences:
    """Encodes every choice of the questions as the answer to its prompt, up to the last token of the choice.

    Args:
      questions: the questions.
      tokenizer: the model's tokenizer.
      template: the chat template.
      max_length: most tokens of a choice with its prompt.

    Raises:
      ValueError: the template fails or does not write a choice verbatim, a choice has no token to score, or a
        question with a choice has more than `max_length` tokens (nothing is truncated).
    """
    problems, members = Problems(), dict[tuple[int, bytes, int], list[Any]]()
    tokenized = tokenize_choices(questions, tokenizer, template)
    for n, (question, choices) in enumerate(zip(questions, tokenized, strict=True)):
        for k, (tokens, first) in enumerate(choices):
            if len(tokens) > max_length:
                problem = (
                    f"{len(tokens)} tokens up to the end of choice {k + 1}, above max_length {max_length}: "
                    "increase it or remove the row"
                )
                problems.add(question.place, problem)
            size, scored = len(question.choices[k].encode()), len(tokens) - first
            if not scored:
                problems.add(
                    question.place, f"choice {k + 1} is one token with none before it, so it has no score"
                )
            choice = (n, k, k == question.answer, size, scored, int(tokens[-1]))
            members.setdefault((n, tokens[:-1].tobytes(), first), []).append(choice)
    problems.report()
    ids = [np.frombuffer(data, np.int32) for _, data, _ in members]
    masks = [np.arange(len(x)) >= first for x, (*_, first) in zip(ids, members, strict=True)]
    columns = {"input_ids": ragged(ids), "loss_mask": ragged(mask.astype(np.float32) for mask in masks)}
    return Sequences(columns, list(members.values()))


def pack_choices(splits: Sequence[Sequences], max_length: int) -> list[Batch]:
    """Packs the sequences of each split into rows of one shape, so that one compiled program scores all splits.

    Returns:
      For each split R rows of T tokens, with up to S sequences of up to V choices. int32 `input_ids` and
      `segment_ids` and float32 `loss_mask`, each `(R, T)`: see `fill`. int32 `end` `(R, S)`: the position of a
      sequence's last token. int32 `(R, S, V)`, what `CHOICE` names: `question` and `choice`, their numbers;
      `right`, 1 for the right choice; `byte_lengths`, UTF-8 bytes; `tokens`, those with a log-likelihood, 0 where
      there is no choice; and `last`, the last token. T is `max_length`, 32, 64, 96 or a
      multiple of 128: that with which all rows take the least time.
    """
    lengths = [lengths_of(split.columns["input_ids"]) for split in splits]
    longest = max((int(own.max()) for own in lengths if len(own)), default=1)
    # From 128 tokens on, attention kernels want multiples of 128.
    tried = {max_length, 32, 64, 96, *range(128, min(max_length, 4 * longest), 128)}
    planned = {
        length: [plan_packing(own, length) for own in lengths]
        for length in sorted(tried)
        if longest <= length <= max_length
    }
    length, plans = min(planned.items(), key=lambda item: sum(map(len, item[1])) * row_cost(item[0]))
    slots = max((len(row) for plan in plans for row in plan), default=1)
    width = max((len(choices) for split in splits for choices in split.choices), default=1)
    packed = []
    for split, own, plan in zip(splits, lengths, plans, strict=True):
        batch, places = fill(split.columns, plan, len(plan), length)
        order = [index for row in plan for index in row]
        table = np.zeros((len(plan), slots, width, len(CHOICE)), np.int32)
        batch["end"] = np.zeros((len(plan), slots), np.int32)
        for (row, slot), index in zip(places.tolist(), order, strict=True):
            choices = split.choices[index]
            table[row, slot, : len(choices)] = choices
            batch["end"][row, slot] = own[plan[row][: slot + 1]].sum() - 1
        batch |= {name: table[..., n] for n, name in enumerate(CHOICE)}
        packed.append(batch)
    return packed


def tokenize_choices(
    questions: Sequence[Question], tokenizer: Tokenizer, template: ChatTemplate
) -> list[list[tuple[np.ndarray, int]]]:
    """Tokenizes every choice of N questions as the answer to its prompt, up to the last token of the choice.

    Returns:
      For each question and choice its tokens, int32 `(t,)`, and the index of the choice's first token, at least 1.

    Raises:
      ValueError: the template fails or does not write a choice verbatim.
    """
    chats = [
        Chat((Turn("user", question.prompt), Turn("assistant", choice)), question.place)
        for question in questions
        for choice in question.choices
    ]
    answers, rows = find_answers(template, chats), []
    encodings = tokenize([text for text, _ in answers], tokenizer)
    for (_, (span, *_)), encoding in zip(answers, encodings, strict=True):
        tokens = Tokens(encoding)
        # The first token has no context to be predicted from.
        first, stop = max(1, tokens.first_after(span.text)), tokens.first_from(span.text_end)
        rows.append((tokens.ids[:stop], first))
    remaining = iter(rows)
    return [list(itertools.islice(remaining, len(question.choices))) for question in questions]


def _parse_choices(values: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, tuple[str, ...], int]:
    prompt, choices = take_text(values, columns["prompt"]), take_list(values, columns["choices"])
    answer, column = values.get(columns["answer"]), f"column {columns['choices']!r}"
    if any(not isinstance(choice, str) or not choice.strip() for choice in choices):
        raise ValueError(f"{column} must be a list of texts, none empty, got {choices!r:.60}")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise ValueError(f"{column} must have at least two choices, all different, got {choices!r:.60}")
    if (index := _choice_index(answer, choices)) < 0:
        letters = f"a letter from A to {chr(64 + min(26, len(choices)))}"
        allowed = f"one of the choices, {letters} or an index from 0 to {len(choices) - 1}"
        raise ValueError(f"column {columns['answer']!r} must be {allowed}, got {answer!r:.40}")
    return prompt, tuple(choices), index


def _choice_index(answer: Any, choices: Sequence[str]) -> int:
    """Returns the index of the choice that `answer` names, or -1."""
    text = answer.strip() if isinstance(answer, str) else ""
    stripped = [choice.strip() for choice in choices]
    if text in stripped:
        return stripped.index(text)
    if re.fullmatch("[A-Za-z]", text):
        answer = ord(text.upper()) - ord("A")
    elif re.fullmatch("[0-9]{1,3}", text):
        answer = int(text)
    return answer if type(answer) is int and 0 <= answer < len(choices) else -1


def _parse_commonsense(
    values: Mapping[str, Any], columns: Mapping[str, str]
) -> tuple[str, tuple[str, ...], int]:
    prompt = take_text(values, columns["instruction"])
    context = take_text(values, columns["input"], optional=True) if "input" in columns else ""
    output = take_text(values, columns["output"]).strip()
    formats = re.findall(r"Answer format:\s*(\S+)\s*$", prompt)
    words = formats[-1].split("/") if formats else []
    if len(words) < 2 or len(set(words)) < len(words) or not all(words):
        raise ValueError(
            f"column {columns['instruction']!r} must end in 'Answer format: ' and choices separated by '/', "
            f"such as true/false, got {prompt[-40:]!r}"
        )
    choices = tuple(ANSWER_PREFIX + word for word in words)
    if output not in choices:
        raise ValueError(
            f"column {columns['output']!r} must be one of {', '.join(map(repr, choices))}, got {output!r:.60}"
        )
    return f"{prompt}\n\n{context}" if context else prompt, choices, choices.index(output)
