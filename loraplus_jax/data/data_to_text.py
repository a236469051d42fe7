"""Data-to-text: reads meaning representations with reference texts, in the format of E2E (arXiv 1706.09254)."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .conversations import Chat, Turn
from .readers import Problems, read_rows

COLUMNS = ("mr", "ref")
# It begins only where a slot may, and no text can match in two ways: a long one without a bracket takes no time.
_SLOT = re.compile(r"(?:^|(?<=,))\s*([^\[\],|\s][^\[\],|]*)\[([^\[\]]*)\]\s*")


@dataclasses.dataclass(frozen=True)
class Description(Chat):
    """A meaning representation and a text for it, as a conversation: the linearized input, and the answer.

    Attributes:
      mr: the meaning representation as in the file.
    """

    mr: str = ""


@dataclasses.dataclass(frozen=True)
class Input:
    """A distinct input.

    Attributes:
      mr: its meaning representation as in the file, where it stands first.
      turn: the input as the user's turn, linearized.
      references: the texts for it.
    """

    mr: str
    turn: Turn
    references: tuple[str, ...]


def linearize(mr: str) -> str:
    """Writes a meaning representation as text; one without brackets, such as a linearized one, stays as it is.

    Raises:
      ValueError: there are brackets, but not in the form `slot[value], slot[value]`.

    >>> linearize("name[The Rice Boat], food[French, Italian]")
    'name : The Rice Boat | food : French, Italian'
    """
    if "[" not in mr and "]" not in mr:
        return mr.strip()
    slots = list(_SLOT.finditer(mr))
    if ",".join(slot[0] for slot in slots) != mr:
        raise ValueError(f"must be slot[value], slot[value], or have no brackets, got {mr!r:.80}")
    return " | ".join(f"{slot[1].strip()} : {slot[2].strip()}" for slot in slots)


def read_descriptions(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Description]:
    """Reads a file with the columns `mr` and `ref`.

    A row is one text for a meaning representation; one with several texts has several rows.

    Args:
      path: the file.
      columns: maps `mr` and `ref` to the file's names, if they differ.

    Raises:
      ValueError: the file cannot be read or has no rows, a column is missing, or a row has an empty or malformed
        meaning representation or an empty text. One message shows the first 20 problems.
    """
    names = _column_names(columns)
    rows = read_rows(path, names)
    turns = _user_turns(rows, names[0])
    return [
        Description((turn, Turn("assistant", ref)), place, mr=mr)
        for turn, (place, (mr, ref)) in zip(turns, rows, strict=True)
    ]


def read_inputs(
    path: str | Path, columns: Mapping[str, str] | None = None, *, distinct: bool = True
) -> list[Input]:
    """Reads the inputs of such a file in order, by default each once; it needs no column `ref`."""
    name, _ = _column_names(columns)
    rows = read_rows(path, (name,))
    mrs = [mr for _, (mr,) in rows]
    turns = _user_turns(rows, name)
    if not distinct:
        return [Input(mr, turn, ()) for mr, turn in zip(mrs, turns, strict=True)]
    # Reversed, so that of equal inputs the first spelling is kept.
    first = dict(zip(reversed(turns), reversed(mrs), strict=True))
    return [Input(first[turn], turn, ()) for turn in dict.fromkeys(turns)]


def group_references(descriptions: Iterable[Description]) -> list[Input]:
    """Returns the distinct inputs, in order of their first texts, each with all its texts."""
    groups: dict[Turn, list[Description]] = {}
    for description in descriptions:
        groups.setdefault(description.turns[0], []).append(description)
    return [Input(g[0].mr, turn, tuple(d.turns[1].text for d in g)) for turn, g in groups.items()]


def select_inputs(descriptions: Sequence[Description], count: int) -> list[Description]:
    """Returns all texts of `count` of the distinct inputs, evenly spaced.

    Raises:
      ValueError: there are fewer.
    """
    turns = list(dict.fromkeys(description.turns[0] for description in descriptions))
    if count > len(turns):
        raise ValueError(
            f"generation.inputs must be at most {len(turns)}, the distinct inputs of the held-out split, "
            f"got {count}"
        )
    selected = {turns[i] for i in np.linspace(0, len(turns) - 1, count).astype(int)}
    return [description for description in descriptions if description.turns[0] in selected]


def _column_names(columns: Mapping[str, str] | None) -> tuple[str, ...]:
    columns = dict(zip(COLUMNS, COLUMNS, strict=True)) | dict(columns or {})
    if len(columns) > len(COLUMNS):
        raise ValueError(f"data.column_names must name {' and '.join(COLUMNS)}; got {', '.join(columns)}")
    return tuple(columns.values())


def _user_turns(rows: Iterable[tuple[str, tuple[str, ...]]], column: str) -> list[Turn]:
    turns, problems = [], Problems()
    for place, (mr, *_) in rows:
        try:
            turns.append(Turn("user", linearize(mr)))
        except ValueError as error:
            problems.add(place, f"column {column!r} {error}")
    problems.report()
    return turns
