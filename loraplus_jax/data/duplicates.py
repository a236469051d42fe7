"""Finds examples that are in train and in another split, and equal texts with different labels."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..settings.schema import DataSettings
from .conversations import Chat
from .labels import class_key
from .multiple_choice import Question
from .readers import SHOWN_PROBLEMS
from .splits import LabelledTexts, normalize


class _Entry(NamedTuple):
    """An example; examples with equal texts are duplicates, and conflict if their labels differ."""

    texts: tuple[str, ...]
    label: Any
    place: str


def handle_duplicates(splits: dict[str, Any], settings: DataSettings) -> tuple[dict[str, Any], list[str]]:
    """Counts duplicates and handles them as `data.duplicates` says.

    Texts that differ only in case or spacing are equal. Labelled texts are compared by text and second text,
    conversations by the first user message and all answers, and questions by prompt and choices.

    Args:
      splits: labelled texts, or lists of conversations or questions, by split.
      settings: the files of the splits, and how to handle duplicates.

    Returns:
      The splits and lines to print before training. With drop, train lacks the examples that are also in another
      split, and those with the same text as another in train but a different label.

    Raises:
      ValueError: there are duplicates and `data.duplicates` is error, or drop leaves nothing to train on.
    """
    entries = {name: _entries(rows) for name, rows in splits.items()}
    train = entries["train"]
    in_train = {entry.texts: entry for entry in reversed(train)}
    whole_file = train if settings.validation else [*train, *entries["validation"]]
    problems: dict[str, list[tuple[_Entry, _Entry]]] = {}
    for name, rows in entries.items():
        pairs = [(entry, in_train[entry.texts]) for entry in rows if entry.texts in in_train]
        if name == "train" or not pairs:
            continue
        if _contents(rows) == _contents(whole_file):
            problems[f"data.{name} has the same {len(rows):,} examples as data.train"] = pairs
        else:
            problems[f"{len(pairs):,} of {len(rows):,} {name} examples are also in train"] = pairs
    if conflicts := _conflicts(entry for rows in entries.values() for entry in rows):
        count = f"{len(conflicts):,} text{'s' * (len(conflicts) > 1)}"
        problems[f"{count} with different labels"] = conflicts
    if settings.duplicates == "warn":
        return splits, [
            f"warning: {text}, such as {first.place} and {second.place}"
            for text, ((first, second), *_) in problems.items()
        ]
    if settings.duplicates == "error" and problems:
        pairs = [pair for pairs in problems.values() for pair in pairs[:SHOWN_PROBLEMS]]
        raise ValueError(
            "\n  ".join(
                [
                    f"{'; '.join(problems)}: remove them, or set data.duplicates to drop or warn",
                    *(f"{first.place} and {second.place}" for first, second in pairs),
                ]
            )
        )
    if settings.duplicates == "error" or not problems:
        return splits, []
    held_out = {entry.texts for name, rows in entries.items() if name != "train" for entry in rows}
    unclear = {first.texts for first, _ in _conflicts(train)} - held_out
    kept = [i for i, entry in enumerate(train) if entry.texts not in held_out | unclear]
    line = (
        f"data.duplicates drop: removed {len(train) - len(kept):,} of {len(train):,} train examples, "
        f"{sum(entry.texts in held_out for entry in train):,} also in another split and "
        f"{sum(entry.texts in unclear for entry in train):,} with different labels"
    )
    if not kept:
        raise ValueError(f"{line}: none is left to train on")
    rows = splits["train"]
    rows = rows.take(kept) if isinstance(rows, LabelledTexts) else [rows[i] for i in kept]
    return {**splits, "train": rows}, [line]


def _contents(entries: Sequence[_Entry]) -> Counter:
    return Counter((entry.texts, entry.label) for entry in entries)


def _conflicts(entries: Iterable[_Entry]) -> list[tuple[_Entry, _Entry]]:
    """Returns the first two entries with different labels of each text that has any."""
    first: dict[tuple[str, ...], _Entry] = {}
    conflicts: dict[tuple[str, ...], tuple[_Entry, _Entry]] = {}
    for entry in entries:
        earlier = first.setdefault(entry.texts, entry)
        if entry.label != earlier.label:
            conflicts.setdefault(entry.texts, (earlier, entry))
    return list(conflicts.values())


def _entries(rows: LabelledTexts | Sequence[Chat | Question]) -> list[_Entry]:
    if isinstance(rows, LabelledTexts):
        columns = zip(rows.texts, rows.pairs or rows.texts, rows.labels, rows.places, strict=True)
        return [
            _Entry((normalize(text), normalize(pair)), class_key(label), place)
            for text, pair, label, place in columns
        ]
    entries = []
    for row in rows:
        if isinstance(row, Question):
            texts, label = (row.prompt, *sorted(row.choices)), normalize(row.choices[row.answer])
        else:
            answers = (turn.text for turn in row.turns if turn.role == "assistant")
            texts, label = (row.question, *answers), None
        entries.append(_Entry(tuple(map(normalize, texts)), label, row.place))
    return entries
