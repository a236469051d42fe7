"""`loraplus eval --tasks`: commonsense tasks and MMLU by the most likely choice."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._utils.atomic import to_json
from .._utils.multihost import is_lead
from .._utils.validation import check_int, check_new_file, expand_path, suggest
from ..data.chat_template import ChatTemplate
from ..data.chat_tokens import Tokens, leading_ids, tokenize
from ..data.commonsense import COMMONSENSE, read_commonsense
from ..data.mmlu import Subject, read_mmlu
from ..data.multiple_choice import Question, tokenize_choices
from ..data.readers import Problems
from ..models.checkpoints.model_files import ModelFiles
from ..models.options import Dtype
from ..tasks.causal_lm import model_config, tokenizer_and_template
from ..training.distributed import raise_together
from ..training.place import Place
from ..training.run_directory import first_free
from ..training.run_files import read_summary
from .devices import MeshSizes, check_same_rows, choose_mesh, write_once
from .scoring import Continuation, Score, Scorer
from .tuned_model import describe_language, load, look_model

MMLU, DEFAULT_SHOTS = "mmlu", 5
TASKS = (*COMMONSENSE, MMLU)
RESULTS = "tasks.json"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The share of questions whose correct choice is the most likely one.

    Attributes:
      accuracy: the share, from 0 to 1.
      stderr: its standard error, `sqrt(p (1 - p) / (n - 1))`; NaN for a single question.
      examples: n, the number of questions scored.
      available: the number of questions in the files.
      fewer_shots: the number of questions with fewer solved examples than asked for, to fit the model's context.
      subjects: the same for each subject of MMLU.
    """

    accuracy: float
    stderr: float
    examples: int
    available: int
    fewer_shots: int = 0
    subjects: "dict[str, Accuracy]" = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, correct: Sequence[bool], *more: Any) -> "Accuracy":
        """Computes the accuracy and its error from single answers; `more` are the fields after `examples`.

        >>> Accuracy.of([True, True, False, False], 9)
        Accuracy(accuracy=0.5, stderr=0.28867513459481287, examples=4, available=9, fewer_shots=0, subjects={})
        """
        n, p = len(correct), sum(correct) / len(correct)
        return cls(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan, n, *more)


@dataclasses.dataclass(frozen=True)
class TaskResults:
    """The accuracies of a model on tasks, by task, and how they were measured; see `evaluate_tasks`.

    `steps` are the training steps of a run, None for a model.
    """

    model: str
    data_root: str
    steps: int | None
    shots: int | None
    limit: int | None
    tasks: dict[str, Accuracy]

    @property
    def mean(self) -> tuple[float, float]:
        """The mean over tasks, each with the same weight, and its standard error."""
        results = self.tasks.values()
        error = math.sqrt(sum(result.stderr**2 for result in results))
        return sum(result.accuracy for result in results) / len(results), error / len(results)

    def to_json(self) -> dict[str, Any]:
        """The results as JSON values."""
        accuracy, error = self.mean
        return {**dataclasses.asdict(self), "mean": {"accuracy": accuracy, "stderr": error}}

    def __str__(self) -> str:
        """A table, and what was left out."""
        lines = [f"{'task':36} accuracy  ± error  examples"]
        for task, result in self.tasks.items():
            for name, part in [(task, result), *((f"  {n}", x) for n, x in result.subjects.items())]:
                lines.append(f"{name:36} {_percent(part.accuracy, part.stderr)}  {part.examples:,}")
        if len(self.tasks) > 1:
            lines.append(f"{'mean of the tasks':36} {_percent(*self.mean)}")
        if left_out := sum(x.available - x.examples for x in self.tasks.values()):
            each = "task and subject" if MMLU in self.tasks else "task"
            lines.append(
                f"--limit {self.limit}: only the first questions of each {each}; {left_out:,} left out"
            )
        if fewer := sum(x.fewer_shots for x in self.tasks.values()):
            lines.append(
                f"{fewer:,} questions of {MMLU} have fewer than {self.shots} examples, to fit the model's context"
            )
        return "\n".join(lines)


def evaluate_tasks(
    place: str,
    tasks: Sequence[str],
    data_root: Path,
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    output: Path | None = None,
    template: str | None = None,
    dtype: Dtype | None = None,
    config: str | None = None,
    allow_different: Sequence[str] = (),
    mesh: MeshSizes = None,
) -> tuple[TaskResults, Path]:
    """Evaluates a language model on commonsense tasks and MMLU, and writes the results to a JSON file.

    The prediction is the choice with the highest log-likelihood. A commonsense question is the user's message in
    the chat template, and its choices are answers such as "the correct answer is answer1". MMLU has its own format
    without a chat template, and its choices are the letters, see `Subject.prompt`; a question gets fewer solved
    examples than `shots` if it does not fit the model's context otherwise.

    Returns the results and the file that they were written to: by default `tasks.json` in the directory of a run,
    an adapter or a merged model, with a number added if the name is taken.
    """
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"--tasks: unknown task {name!r}{suggest(name, TASKS)}")
        if tasks.count(name) > 1:
            raise ValueError(f"--tasks names {name} twice")
    check_int("--batch_size", batch_size, at_least=1)
    if limit is not None:
        check_int("--limit", limit, at_least=1)
    if shots is not None:
        check_int("--shots", shots, at_least=0)
        if MMLU not in tasks:
            raise ValueError(f"--shots {shots} applies to {MMLU}, which --tasks does not name; remove it")
    elif MMLU in tasks:
        shots = DEFAULT_SHOTS
    if template is not None and set(tasks) == {MMLU}:
        raise ValueError(f"--template {template} has no effect: {MMLU} has a format of its own; remove it")
    with raise_together():
        at = look_model(place)
        output = _output_file(at, output)
        data_root = expand_path("--data_root", data_root)
        parts = list(_read_parts(tasks, data_root, shots or 0, limit))
        # After the user's own input: a model of the Hub is downloaded.
        described = describe_language(at, config, allow_different, template=template, dtype=dtype)
        on = choose_mesh(described.settings.mesh, mesh)
        longest = model_config(described.base).max_length
        chat_template = None
        if set(tasks) != {MMLU}:  # which needs no chat template, and not every model has one
            _, chat_template = tokenizer_and_template(
                described.settings.task_options, described.base, described.task
            )
        items = [_encode(part, shots or 0, described.base, chat_template, longest) for part in parts]
        Problems(
            (
                question.place,
                f"{length} tokens with a choice, above the model's context of {longest}: remove it",
            )
            for part, part_items in zip(parts, items, strict=True)
            for question, item in zip(part.questions, part_items, strict=True)
            if (length := max(len(choice.ids) for choice in item.choices)) > longest
        ).report()
    choices = [choice for part_items in items for item in part_items for choice in item.choices]
    check_same_rows([[int(n) for n in ids], first] for ids, first in choices)
    tuned = load(described, on)
    scorer = Scorer(tuned.parts.model, tuned.variables, mesh=on, batch_size=batch_size, max_length=longest)
    scores = scorer(choices)
    steps = (read_summary(tuned.place.path) or {}).get("steps")
    accuracies = _accuracies(parts, items, iter(scores))
    results = TaskResults(place, str(data_root), steps, shots, limit, accuracies)
    write_once(output, to_json(results.to_json(), indent=1) + "\n")
    return results, output


class _Part(NamedTuple):
    """The questions of a task or of a subject of MMLU, up to the limit, and their number without it."""

    task: str
    subject: Subject | None
    questions: Sequence[Question]
    available: int


class _Item(NamedTuple):
    """The choices of a question as tokens, and whether it has fewer solved examples than asked for."""

    choices: list[Continuation]
    fewer_shots: bool = False


def _output_file(place: Place, output: Path | None) -> Path:
    """The new file for the results; checks that it can be written before anything is computed."""
    if output is None:
        if place.kind == "base" and not place.notes:
            raise ValueError(
                f"--output FILE.json is required for {place.name}, which is not a run, adapter or merged model"
            )
        output = first_free(place.path / RESULTS)
    elif output.suffix != ".json":
        raise ValueError(f"--output must be a .json file with --tasks, got {output}")
    if is_lead():
        check_new_file("--output", output)
    return output


def _read_parts(tasks: Sequence[str], root: Path, shots: int, limit: int | None) -> Iterator[_Part]:
    if not root.is_dir():
        raise ValueError(f"--data_root {root} is not a directory: set it to one that has the tasks' folders")
    for name in tasks:
        if name == MMLU:
            for subject in read_mmlu(root, shots):
                yield _Part(name, subject, subject.questions[:limit], len(subject.questions))
        else:
            questions = read_commonsense(root, name)
            yield _Part(name, None, questions[:limit], len(questions))


def _encode(
    part: _Part, shots: int, files: ModelFiles, template: ChatTemplate | None, longest: int
) -> list[_Item]:
    """Encodes questions; those of MMLU each with as many solved examples as fit the model's context."""
    subject, questions = part.subject, part.questions
    if subject is None:
        assert template is not None
        rows = tokenize_choices(questions, files.plain_tokenizer, template)
        return [_Item([Continuation(*choice) for choice in choices]) for choices in rows]
    start = leading_ids(files.tokenizer)
    items: dict[int, _Item] = {}
    for k in range(shots, -1, -1):
        prompts = {n: subject.prompt(x, k) for n, x in enumerate(questions) if n not in items}
        texts = [prompt + choice for n, prompt in prompts.items() for choice in questions[n].choices]
        encodings = tokenize(texts, files.plain_tokenizer)
        for n, prompt in prompts.items():
            tokens = [Tokens(x) for x in itertools.islice(encodings, len(questions[n].choices))]
            choices = [
                Continuation(np.concatenate([start, x.ids]), len(start) + x.first_after(len(prompt)))
                for x in tokens
            ]
            if k == 0 or max(len(choice.ids) for choice in choices) <= longest:
                items[n] = _Item(choices, k < shots)
    return [items[n] for n in range(len(questions))]


def _accuracies(
    parts: Sequence[_Part], items: Sequence[Sequence[_Item]], scores: Iterator[Score]
) -> dict[str, Accuracy]:
    """Accuracy by task; that of MMLU is over all questions, as its own script computes it."""
    results: dict[str, Accuracy] = {}
    for name, pairs in itertools.groupby(zip(parts, items, strict=True), lambda pair: pair[0].task):
        correct, subjects = [], {}
        for part, part_items in pairs:
            answers = []
            for question, item in zip(part.questions, part_items, strict=True):
                likelihoods = [x.log_likelihood for x in itertools.islice(scores, len(item.choices))]
                answers.append(likelihoods.index(max(likelihoods)) == question.answer)
            fewer_shots = sum(item.fewer_shots for item in part_items)
            subject = "" if part.subject is None else part.subject.name
            subjects[subject] = Accuracy.of(answers, part.available, fewer_shots)
            correct += answers
        results[name] = Accuracy.of(
            correct,
            sum(x.available for x in subjects.values()),
            sum(x.fewer_shots for x in subjects.values()),
            {subject: x for subject, x in subjects.items() if subject},
        )
    return results


def _percent(accuracy: float, error: float) -> str:
    return f"{100 * accuracy:6.1f} % {100 * error:6.1f} %"
