"""`LoRAPlusConfig`: what to adapt and how, validated when it is made."""

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

Init = Literal["lora", "lora_b", "gaussian"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAPlusConfig:
    """Which layers get adapters, of which rank and scale, and how much faster B learns.

    Attributes:
      target_modules: the layers to adapt, required. A sequence holds names: each matches a module whose path
        ends in it, whole segments only (`"query"` or `"attention/query"`). A single string is one regular
        expression that must match the whole module path, segments joined by "/".
      rank: r, the inner dimension of A `(in, r)` and B `(r, out)`.
      alpha: the update is W + (alpha / rank) A B.
      dropout: rate on the adapter's input; acts when a `dropout` rng is given to `apply`.
      lr_ratio: lambda, the ratio of B's learning rate to A's (arXiv 2402.12354, section 4).
      init: `"lora"` draws A He-uniform with B zero (Init[1] of the paper), `"lora_b"` draws B with A zero
        (Init[2], used by the paper's experiments), `"gaussian"` draws A from N(0, 1/r^2) with B zero.
        The best `lr_ratio` depends on it.
      modules_to_save: modules trained in full beside the adapters (a new head), named as in `target_modules`.

    Raises:
      ValueError, TypeError: a field is out of range or of the wrong type; the message names it.

    Example:
      >>> LoRAPlusConfig(target_modules=["query", "value"]).scale
      2.0
    """

    target_modules: str | tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    lr_ratio: float = 16.0
    init: Init = "lora"
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules))
        object.__setattr__(self, "modules_to_save", _names("modules_to_save", self.modules_to_save))
        if not self.target_modules:
            raise ValueError("target_modules is empty: name the layers to adapt, such as ['query', 'value']")
        check_whole("rank", self.rank, at_least=1)
        check_number("alpha", self.alpha, above=0.0)
        check_number("lr_ratio", self.lr_ratio, above=0.0)
        check_number("dropout", self.dropout, at_least=0.0, below=1.0)
        if self.init not in get_args(Init):
            raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {self.init!r}")

    @property
    def scale(self) -> float:
        """The factor s = alpha / rank on A B."""
        return self.alpha / self.rank

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; an unknown field is a ValueError that names the nearest one."""
        fields = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or "target_modules" not in values:
            raise ValueError(f"a LoRAPlusConfig must be a mapping with target_modules, got {values!r:.40}")
        for name in values:
            if name not in fields:
                raise ValueError(f"LoRAPlusConfig has no field {name!r}{nearest(name, fields)}")
        return cls(**values)


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
) -> None:
    """Raises ValueError unless `value` is a finite real number within the bounds given."""
    bounds = [("above", above), ("at least", at_least), ("below", below)]
    allowed = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    # Not math.isfinite: that fails for an int which no float can hold.
    fits = fits and abs(value) <= sys.float_info.max
    fits = fits and (above is None or value > above) and (below is None or value < below)
    if not fits or (at_least is not None and value < at_least):
        raise ValueError(f"{name} must be a finite number {allowed}".rstrip() + f", got {value!r}")


def check_whole(name: str, value: Any, *, at_least: int) -> None:
    """Raises ValueError unless `value` is an int of at least `at_least` that fits in 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value!r}")


def nearest(name: str, known: Iterable[str], *, fallback: bool = True) -> str:
    """`"; did you mean 'x'?"` with the nearest of `known`, or the list of all when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; known: {', '.join(known)}" if known and fallback else ""


def matches(rule: str | tuple[str, ...], path: str) -> bool:
    """Whether a module path, segments joined by "/", is named by `rule` as `LoRAPlusConfig` defines it.

    >>> matches(("query",), "layers/attention/query"), matches(("query",), "layers/my_query")
    (True, False)
    >>> matches(r"layers/.*/(query|value)", "layers/attention/value")
    True
    """
    if isinstance(rule, str):
        return re.fullmatch(rule, path) is not None
    return any(path == name or path.endswith("/" + name) for name in rule)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a ValueError names the file that holds none.

    A file of strangers is not believed: its size is looked at before it is read, and what is nested so deep that
    a walk through it would meet Python's limit, or has text that cannot be printed, is refused here.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path} has {size} bytes, at most {LARGEST_JSON} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    if problem := odd_tree(content):
        raise ValueError(f"{path} {problem}")
    return content


LARGEST_JSON, DEEPEST = 2**20, 100
"""Bytes and levels. Python needs up to 40 times the bytes of a JSON file."""


def odd_tree(tree: Any) -> str | None:
    """What makes a value from JSON or YAML unsafe to walk through or to print, if anything does."""
    level = [tree]
    for _ in range(DEEPEST):
        if any(isinstance(node, str) and re.search("[\ud800-\udfff]", node) for node in level):
            return "holds half a surrogate pair, which is no character"
        level = [part for node in level for part in _parts(node)]
        if not level:
            return None
    return f"is nested more than {DEEPEST} deep"


def _parts(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [*node.keys(), *node.values()]
    return node if isinstance(node, list) else []


def _names(field: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and field == "target_modules":
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{field} is not a regular expression: {value!r} ({error})") from None
        return value
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{field} must be a sequence of module names, got {value!r}")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str) or not name.strip("/"):
            raise TypeError(f"{field} must hold non-empty module names, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{field} names a module twice: {list(names)}")
    return names
