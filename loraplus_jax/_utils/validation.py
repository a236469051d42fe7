"""Checks and shows what users pass; errors give the field, the value and what is allowed."""

import difflib
import json
import math
import numbers
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MOST_PROBLEMS = 20
"""The most problems of a file that one message lists."""


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    allow_arrays: bool = False,
) -> None:
    """Checks that a value is a finite number within the bounds that float32 can represent.

    With `allow_arrays`, scalar arrays count as numbers. Traced arrays pass, since their value is unknown.

    Raises:
      TypeError: the value is not a number.
      ValueError: the value is out of range.
    """
    if allow_arrays:
        # Here, since the command line answers --help without JAX.
        from jax import Array
        from jax.core import Tracer

        if isinstance(value, Tracer):
            return
        if isinstance(value, Array | np.ndarray) and value.ndim == 0:
            value = value.item()
    bounds = [("above", above), ("at least", at_least), ("below", below)]
    allowed = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    expected = f"{name} must be a finite number {allowed}".rstrip()
    # NumPy registers its scalars as Real.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{expected}, got {value!r:.80}")
    number: Any = value
    if not (
        abs(number) < math.inf  # math.isfinite raises for an int that is too large for a float
        and (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (below is None or number < below)
    ):
        raise ValueError(f"{expected}, got {value!r:.80}")
    # XLA computes in float32, where 1e-60 is 0 and 1 - 1e-9 is 1.
    if not in_float32(number) or (below is not None and np.float32(number) >= below):
        raise ValueError(f"{expected}, got {value!r:.80}, which float32 cannot represent")


def in_float32(value: float) -> bool:
    """Whether a finite number neither overflows nor underflows to 0 in float32, in which XLA computes.

    >>> in_float32(1e-8), in_float32(1e-60), in_float32(1e300), in_float32(0.0)
    (True, False, False, True)
    """
    return value == 0 or MIN_FLOAT32 <= abs(value) <= MAX_FLOAT32


MIN_FLOAT32, MAX_FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def check_int(name: str, value: Any, *, at_least: int, at_most: int | None = None) -> None:
    """Checks that a value is an int within the bounds that fits in 64 bits.

    Raises:
      TypeError: the value is not an int.
      ValueError: the value is out of range.
    """
    bounds = f"at least {at_least}" + (f" and at most {at_most}" if at_most is not None else "")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of {bounds}, got {value!r:.80}")
    if value < at_least or (at_most is not None and value > at_most):
        raise ValueError(f"{name} must be an integer of {bounds}, got {value!r:.80}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value!r:.80}")


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, in their order."""
    return [name for name, count in Counter(names).items() if count > 1]


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises ValueError unless the value is one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r:.80}")


def suggest(name: str, known: Iterable[str], *, fallback: bool = True) -> str:
    """Returns `"; did you mean 'x'?"` with the closest known names, or lists the first ones if none is close."""
    known = sorted(known)
    # A comparison takes up to a millisecond, and the names may be a data file's.
    few = len(known) <= MAX_COMPARED
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) if few else []
    if close:
        return f"; did you mean {' or '.join(f'{x!r:.80}' for x in close)}?"
    more = f" and {len(known) - MAX_LISTED:,} more" if len(known) > MAX_LISTED else ""
    listed = ", ".join(f"{x:.80}" for x in known[:MAX_LISTED])
    return f"; known: {listed}{more}" if known and fallback else ""


MAX_COMPARED, MAX_LISTED = 1_000, 50


def expand_path(name: str, path: str | Path) -> Path:
    """Returns a path with `~` or `~user` replaced by the home directory; raises ValueError if it is none."""
    if "\0" in str(path):
        raise ValueError(f"{name} {str(path)!r} contains a null character, which no path may have")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{name} {str(path)!r}: {Path(path).parts[0]} has no home directory; to use a file or directory of "
            "this name, write its absolute path"
        ) from None


def check_new_path(name: str, path: Path, *, outside: Sequence[Path] = ()) -> None:
    """Raises ValueError unless a new directory can be written at a path, `outside` of some directories.

    The path must not exist, also not as a symlink to nothing, and not be named as a file of tensors.
    """
    if path.suffix in (".gguf", ".safetensors"):
        raise ValueError(f"{name} {path} is a directory to write; choose a name without {path.suffix}")
    for parent in path.parents:
        if os.path.lexists(parent) and not parent.is_dir():
            raise ValueError(f"{name} {path}: {parent} is not a directory; choose another path")
    if os.path.lexists(path):
        raise ValueError(f"{name} {path} already exists; choose another path")
    for directory in outside:
        if path.resolve().is_relative_to(directory.resolve()):
            raise ValueError(f"{name} {path} is inside {directory}; choose a path outside it")


def check_new_file(name: str, path: Path) -> None:
    """Raises ValueError unless a new file can be created at a path; one process at a time may check it."""
    # By creating it: os.access does not know of quotas, nor of what a network file system allows.
    try:
        path.open("x").close()
        path.unlink()
    except OSError as error:
        raise ValueError(f"{name} {path} cannot be created: {error.strerror}; choose another file") from None


def escape_controls(text: str) -> str:
    r"""Escapes what would steer a terminal or break its line: control characters, text direction, lone surrogates.

    Printable Unicode stays as it is.

    >>> print(escape_controls("für [red]\x1b[2J\n"))
    für [red]\u001b[2J\n
    """
    return _UNPRINTABLE.sub(lambda match: json.dumps(match[0])[1:-1], text)


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def to_plain(value: Any) -> Any:
    """Returns a setting with nested mappings as dicts and sequences as lists, as JSON and YAML have them."""
    if isinstance(value, Mapping):
        return {name: to_plain(part) for name, part in value.items()}
    return [to_plain(part) for part in value] if isinstance(value, list | tuple) else value


def check_all(*checks: Callable[[], Any]) -> None:
    """Runs all checks and raises one ValueError with the messages of those that failed."""
    problems = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))


def join_first(problems: Sequence[str]) -> str:
    """The first five problems, joined by "; ", and how many more there are."""
    rest = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return "; ".join([*problems[:5], *rest])


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raises one ValueError with all problems, if there are any; its first line is a complete message."""
    if problems:
        rest = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise ValueError("\n  ".join([f"{what}: {problems[0]}", *problems[1:MOST_PROBLEMS], *rest]))
