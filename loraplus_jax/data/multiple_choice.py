"""Multiple choice: reads questions from files and encodes each choice as a continuation to score."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .batches import Batch, round_up
from .chat_template import ChatTemplate
from .chat_tokens import Tokens, find_answers, tokenize
from .conversations import Chat, Turn, choose_columns, take_list
from .packed_rows import fill, ragged
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


def encode_choices(
    questions: Sequence[Question], tokenizer: Tokenizer, template: ChatTemplate, max_length: int
) -> Batch:
    """Encodes every choice of N questions as the answer to its prompt, up to the last token of the choice.

    Only the tokens of the choice are scored: its log-likelihood is the sum of their log-probabilities over
    `loss_mask`, and the choice with the highest sum is the usual prediction. Longer choices have lower sums. So a
    second metric divides the sum by `byte_lengths`, which do not depend on the tokenizer, or by the token count
    `loss_mask.sum(-1)`. Padded choices have no tokens to score: exclude them by `n_choices` before the argmax.

    Args:
      questions: N questions with at most C choices.
      tokenizer: the model's tokenizer.
      template: the chat template.
      max_length: most tokens of a choice with its prompt.

    Returns:
      int32 `input_ids` and `segment_ids` and float32 `loss_mask`, each `(N, C, T)`: a choice is a row from `fill`,
      and a padded choice an empty one; T is the most tokens in a row, rounded up to 32, 64, 96 or a multiple of
      128, but at most `max_length`. int32 `answer` and `n_choices`, each `(N,)`; and int32 `byte_lengths` `(N, C)`,
      the UTF-8 bytes of each choice, 1 for padded choices.

    Raises:
      ValueError: the template fails or does not write a choice verbatim, or a question with a choice has more than
        `max_length` tokens (nothing is truncated).
    """
    width = max((len(q.choices) for q in questions), default=0)
    problems, ids, masks, rows = Problems(), [], [], []
    for question, choices in zip(questions, tokenize_choices(questions, tokenizer, template), strict=True):
        for number, (tokens, first) in enumerate(choices, 1):
            if len(tokens) > max_length:
                problem = (
                    f"{len(tokens)} tokens up to the end of choice {number}, above max_length {max_length}: "
                    "increase it or remove the row"
                )
                problems.add(question.place, problem)
            rows.append([len(ids)])
            ids.append(tokens)
            masks.append((np.arange(len(tokens)) >= first).astype(np.float32))
        rows += [[]] * (width - len(choices))
    problems.report()
    longest = max(map(len, ids), default=0)
    # Rows of `max_length`, which may be that of packed training, would be mostly padding. From 128 tokens on,
    # attention kernels want multiples of 128.
    length = min(round_up(longest, 32 if longest <= 128 else 128), max_length)
    batch, _ = fill({"input_ids": ragged(ids), "loss_mask": ragged(masks)}, rows, len(rows), length)
    sizes = [
        len(choice.encode()) for q in questions for choice in (*q.choices, *["-"] * (width - len(q.choices)))
    ]
    return {
        **{name: column.reshape(len(questions), width, length) for name, column in batch.items()},
        "answer": np.array([q.answer for q in questions], np.int32),
        "n_choices": np.array([len(q.choices) for q in questions], np.int32),
        "byte_lengths": np.array(sizes, np.int32).reshape(len(questions), width),
    }


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
