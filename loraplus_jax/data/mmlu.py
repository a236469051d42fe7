"""MMLU (arXiv 2009.03300) from its CSV files: questions of each subject, and prompts with solved examples."""

import dataclasses
from pathlib import Path

from .commonsense import describe_root
from .multiple_choice import Question
from .readers import Problems, read_rows

LETTERS = ("A", "B", "C", "D")
COLUMNS = ("question", *LETTERS, "answer")
LOCATIONS = ("mmlu/data", "mmlu", "data", ".")
"""Where MMLU may be in a data root: directories that hold `test/` and `dev/`."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A subject of MMLU.

    Attributes:
      name: as in the names of its files, such as `abstract_algebra`.
      shots: solved examples of the dev split, in order, each with its answer.
      questions: those of the test split. A prompt is the question with its choices, and a choice is a space and a
        letter.
    """

    name: str
    shots: tuple[str, ...]
    questions: tuple[Question, ...]

    def prompt(self, question: Question, shots: int) -> str:
        """Returns a question's prompt in MMLU's format, after as many solved examples.

        As in most evaluations, one space precedes the subject; MMLU's own script writes two.

        >>> question = Question("1 + 1 = ?\\nA. 1\\nB. 2\\nC. 3\\nD. 4\\nAnswer:", (" A", " B", " C", " D"), 1)
        >>> print(Subject("college_mathematics", (), (question,)).prompt(question, 0))
        The following are multiple choice questions (with answers) about college mathematics.
        <BLANKLINE>
        1 + 1 = ?
        A. 1
        B. 2
        C. 3
        D. 4
        Answer:
        """
        header = f"The following are multiple choice questions (with answers) about {self.title}."
        return "\n\n".join([header, *self.shots[:shots], question.prompt])

    @property
    def title(self) -> str:
        """The name with spaces."""
        return self.name.replace("_", " ")


def read_mmlu(root: Path, shots: int) -> list[Subject]:
    """Reads all subjects, in alphabetical order, from `test/SUBJECT_test.csv` and `dev/SUBJECT_dev.csv`.

    The files have no header: question, choices A to D, and the letter of the answer.

    Args:
      root: a directory with MMLU in one of `LOCATIONS`.
      shots: the number of solved examples that each subject must have.

    Raises:
      ValueError: files are missing or invalid, or a subject has fewer examples.
    """
    directory = next((root / x for x in LOCATIONS if any((root / x / "test").glob("*_test.csv"))), None)
    if directory is None:
        raise ValueError(
            f"mmlu needs mmlu/test/SUBJECT_test.csv (or data/test/SUBJECT_test.csv), which "
            f"{describe_root(root)} lacks"
        )
    subjects = []
    for path in sorted((directory / "test").glob("*_test.csv")):
        name = path.name.removesuffix("_test.csv")
        dev = directory / "dev" / f"{name}_dev.csv"
        solved = [] if shots == 0 else _read(dev)
        if len(solved) < shots:
            raise ValueError(f"--shots {shots} is above the {len(solved)} examples in {dev}; lower it")
        examples = tuple(q.prompt + q.choices[q.answer] for q in solved[:shots])
        subjects.append(Subject(name, examples, tuple(_read(path))))
    return subjects


def _read(path: Path) -> list[Question]:
    problems, questions = Problems(), []
    for place, (question, *choices, answer) in read_rows(path, COLUMNS, header=COLUMNS, may_be_empty=LETTERS):
        if answer not in LETTERS:
            problems.add(place, f"the answer must be one of A, B, C and D, got {answer!r:.40}")
            continue
        lines = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
        prompt = "\n".join([question, *lines, "Answer:"])
        questions.append(
            Question(prompt, tuple(f" {letter}" for letter in LETTERS), LETTERS.index(answer), place)
        )
    problems.report()
    return questions
