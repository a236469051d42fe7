"""Finds examples that are in two splits, and equal texts with different labels."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from .options import DataOptions
from .readers import SHOWN_PROBLEMS


class _Entry(NamedTuple):
    """An example; examples with equal texts are duplicates, and conflict if their labels differ."""

    texts: tuple[str, ...]
    label: Any
    place: str


def handle_duplicates(
    splits: dict[str, list[Any]], options: DataOptions
) -> tuple[dict[str, list[Any]], list[str]]:
    """Counts duplicates and handles them as `data.duplicates` says.

    Texts that differ only in case or spacing are equal. Labelled texts are compared by text and second text,
    conversations by the first user message and all answers, and questions by prompt and choices.

    Args:
      splits: labelled texts, conversations or questions, by split.
      options: the files of the splits, and how to handle duplicates.

    Returns:
      The splits and lines to print before training. With drop, train lacks the examples that are also in another
      split, and those with the same text as another in train but a different label; validation lacks those that
      are also in test.

    Raises:
      ValueError: there are duplicates and `data.duplicates` is error, or drop leaves a split empty.
    """
    entries = {
        name: [_Entry(row.key, row.label_key, row.place) for row in splits[name]]
        for name in ("train", "validation", "test")
        if name in splits
    }
    problems: dict[str, list[tuple[_Entry, _Entry]]] = {}
    for first, second in itertools.combinations(entries, 2):
        # Reversed, so that the first of equal texts is kept.
        in_first, rows = {entry.texts: entry for entry in reversed(entries[first])}, entries[second]
        if pairs := [(entry, in_first[entry.texts]) for entry in rows if entry.texts in in_first]:
            problems[f"{len(pairs):,} of {len(rows):,} {second} examples are also in {first}"] = pairs
    if conflicts := _conflicts(entry for rows in entries.values() for entry in rows):
        count = f"{len(conflicts):,} text{'s' * (len(conflicts) > 1)}"
        problems[f"{count} with different labels"] = conflicts
    shown = {
        text: [f"{first.place} and {second.place}" for first, second in pairs[:SHOWN_PROBLEMS]]
        for text, pairs in problems.items()
    }
    if options.duplicates == "warn":
        return splits, [f"warning: {text}, such as {first}" for text, (first, *_) in shown.items()]
    if not problems:
        return splits, []
    if options.duplicates == "error":
        advice = f"{'; '.join(problems)}: remove them, or set data.duplicates to drop or warn"
        raise ValueError("\n  ".join([advice, *(line for lines in shown.values() for line in lines)]))
    kept, lines = dict(splits), []
    unclear = {first.texts for first, _ in _conflicts(entries["train"])}
    for number, (name, rows) in enumerate(entries.items()):
        later = {entry.texts for others in list(entries.values())[number + 1 :] for entry in others}
        dropped = later | (unclear if name == "train" else set())
        indices = [i for i, entry in enumerate(rows) if entry.texts not in dropped]
        if len(indices) == len(rows):
            continue
        shared = sum(entry.texts in later for entry in rows)
        line = (
            f"data.duplicates drop: removed {len(rows) - len(indices):,} of {len(rows):,} {name} examples, "
            f"{shared:,} also in another split"
        )
        if name == "train":
            line += f" and {len(rows) - len(indices) - shared:,} with different labels"
        if not indices:
            raise ValueError(f"{line}: none is left in {name}")
        kept[name] = [splits[name][i] for i in indices]
        lines.append(line)
    # What stays: texts with different labels outside train.
    _, remaining = handle_duplicates(kept, dataclasses.replace(options, duplicates="warn"))
    return kept, [*lines, *remaining]


def _conflicts(entries: Iterable[_Entry]) -> list[tuple[_Entry, _Entry]]:
    """Returns the first two entries with different labels of each text that has any."""
    first: dict[tuple[str, ...], _Entry] = {}
    conflicts: dict[tuple[str, ...], tuple[_Entry, _Entry]] = {}
    for entry in entries:
        earlier = first.setdefault(entry.texts, entry)
        if entry.label != earlier.label:
            conflicts.setdefault(entry.texts, (earlier, entry))
    return list(conflicts.values())
