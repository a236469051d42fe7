"""`LoRAPlusConfig`: what to adapt and how, validated when it is made."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, get_args

import numpy as np

from ._validation import check_choice, check_int, check_number, suggest

Init = Literal["lora", "lora_b", "gaussian"]
Bias = Literal["none", "all", "lora_only"]

DEFAULT_LR_RATIO: Mapping[Init, float] = {"lora": 4.0, "gaussian": 4.0, "lora_b": 16.0}
"""Lambda by init, where none is given. The paper found 16 with B drawn and A zero (`"lora_b"`); with B zero it
reports 4 to 8, and for Llama 2 to 4 (arXiv 2402.12354, section 5). A start for a sweep, not an optimum.
"""
ALL_LINEAR = "all-linear"


class Rules(dict):
    """A dict for a frozen config: it can be hashed, and its order counts, since the first rule that matches does.

    >>> Rules(a=1, b=2) == Rules(b=2, a=1)
    False
    """

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self.items()) == list(other.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAPlusConfig:
    """Which layers get adapters, of which rank and scale, and how much faster B learns.

    Names of modules match a path that ends in them, whole segments only (`"query"` or `"attention/query"`); a
    single string instead of a sequence is one regular expression for the whole path, segments joined by "/".
    Every rule must match something, and no weight may be covered twice.

    Attributes:
      target_modules: the layers to adapt, by names or one regular expression; `"all-linear"` takes every Dense,
        DenseGeneral and Einsum but those in `modules_to_save`. Either this or `target_parameters` is needed.
      exclude_modules: layers that are not adapted although `target_modules` names them.
      target_parameters: single weights to adapt as W + s A B, whatever module owns them: a regular expression for
        the whole path of the leaf to a letter for each of its axes, `i` input, `o` output, any other a batch axis
        kept in both factors; a plain sequence means `"io"`. Each costs the gradient of its whole weight in a step.
      layers_to_transform: indices of the layers to adapt: the first number that ends a segment of a path
        (`"layers_3/query"`), or the place in a stack of scanned layers. All by default. For `target_modules` only.
      rank: r, the inner dimension of A `(in, r)` and B `(r, out)`.
      alpha: the update is W + (alpha / rank) A B.
      rank_pattern: other ranks by pattern. A key is a regular expression for the end of a path, whole segments; the
        first that matches counts.
      alpha_pattern: other alphas, likewise.
      use_rslora: s = alpha / sqrt(rank) instead (arXiv 2312.03732).
      dropout: rate on the adapter's input; acts when a `dropout` rng is given to `apply`, not on embeddings.
      lr_ratio: lambda, the ratio of B's learning rate to A's (arXiv 2402.12354, section 4), for
        `lora_plus_adamw(..., lr_ratio=config)`. By default 4, or 16 with the init `"lora_b"`; a config that
        `dataclasses.replace` makes keeps the number that it had.
      init: `"lora"` draws A He-uniform with B zero (Init[1] of the paper), `"lora_b"` draws B with A zero
        (Init[2], used by the paper's experiments), `"gaussian"` draws A from N(0, 1/r^2) with B zero.
      modules_to_save: modules trained in full beside the adapters (a new head), by names.
      bias: which biases are trained in full too: none, all, or those of the adapted layers (`"lora_only"`). Both
        take effect in `split_trainable(variables, config)`.

    Raises:
      ValueError, TypeError: a field is out of range or of the wrong type; the message names it.

    Example:
      >>> config = LoRAPlusConfig(target_modules=["query", "value"], rank_pattern={"layers_0/query": 4})
      >>> config.rank_of("layers_0/query"), config.rank_of("layers_0/value"), config.scale_of("layers_0/value")
      (4, 8, 2.0)
    """

    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    target_parameters: dict[str, str] | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    rank: int = 8
    alpha: float = 16.0
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    dropout: float = 0.0
    lr_ratio: float = None  # pyright: ignore[reportAssignmentType] # a number once the config is made
    init: Init = "lora"
    modules_to_save: tuple[str, ...] = ()
    bias: Bias = "none"

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        object.__setattr__(self, "target_parameters", _parameters(self.target_parameters))
        object.__setattr__(self, "layers_to_transform", _layers(self.layers_to_transform))
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules is empty: name the layers to adapt, such as ['query', 'value']")
        check_int("rank", self.rank, at_least=1)
        check_number("alpha", self.alpha, above=0.0)
        self._check_patterns()
        check_number("dropout", self.dropout, at_least=0.0, below=1.0)
        if self.dropout and not self.target_modules:
            raise ValueError(
                f"dropout acts on the input of a layer; target_parameters have none, got {self.dropout}"
            )
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"use_rslora must be true or false, got {self.use_rslora!r}")
        check_choice("init", self.init, get_args(Init))
        check_choice("bias", self.bias, get_args(Bias))
        if self.lr_ratio is None:
            object.__setattr__(self, "lr_ratio", DEFAULT_LR_RATIO[self.init])
        check_number("lr_ratio", self.lr_ratio, above=0.0)

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping):
                raise TypeError(f"{name} must be a mapping from patterns to values, got {patterns!r}")
            for pattern, value in patterns.items():
                _check_regex(name, pattern)
                where = f"{name}[{pattern!r}]"
                if name == "rank_pattern":
                    check_int(where, value, at_least=1)
                else:
                    check_number(where, value, above=0.0)
            object.__setattr__(self, name, Rules(patterns))

    @property
    def scale(self) -> float:
        """The factor s on A B where no pattern says otherwise."""
        return self._scale(self.rank, self.alpha)

    def rank_of(self, path: str) -> int:
        """The rank of the adapter at a path, patterns considered."""
        key = pattern_of(self.rank_pattern, path)
        return self.rank if key is None else self.rank_pattern[key]

    def scale_of(self, path: str) -> float:
        """The factor s on A B at a path, patterns considered."""
        key = pattern_of(self.alpha_pattern, path)
        return self._scale(self.rank_of(path), self.alpha if key is None else self.alpha_pattern[key])

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; an unknown field is a ValueError that names the nearest one."""
        fields = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or not values.keys() & {"target_modules", "target_parameters"}:
            raise ValueError(f"a LoRAPlusConfig must be a mapping with target_modules, got {values!r:.40}")
        for name in values:
            if name not in fields:
                raise ValueError(f"LoRAPlusConfig has no field {name!r}{suggest(name, fields)}")
        return cls(**values)


def pattern_of(patterns: Mapping[str, Any], path: str) -> str | None:
    """The first pattern that matches the end of a path, whole segments, as PEFT's patterns do.

    >>> pattern_of({"query": 4, "layers_1/.*": 2}, "layers_1/query"), pattern_of({"query": 4}, "my_query")
    ('query', None)
    """
    return next((key for key in patterns if re.fullmatch(rf"(.*/)?({key})", path)), None)


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


def _names(field: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and field != "modules_to_save":
        if value not in ("", ALL_LINEAR):
            _check_regex(field, value)
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


def _parameters(value: Any) -> Mapping[str, str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(
            f"target_parameters must be regular expressions, alone or with axis letters, got {value!r}"
        )
    patterns = list(value)
    rules = Rules(value if isinstance(value, Mapping) else dict.fromkeys(patterns, "io"))
    if len(rules) < len(patterns):
        raise ValueError(f"target_parameters names a weight twice: {patterns}")
    for pattern, axes in rules.items():
        _check_regex("target_parameters", pattern)
        if not isinstance(axes, str) or not re.fullmatch("[a-z]+", axes) or not {"i", "o"} <= set(axes):
            raise ValueError(
                f"target_parameters[{pattern!r}] must be lower-case letters, one an axis, with i for input and o "
                f"for output among them, got {axes!r}"
            )
    return rules


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"layers_to_transform must be whole numbers, got {value!r}")
    layers = tuple(value)
    for number in layers:
        check_int("layers_to_transform", number, at_least=0)
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers_to_transform must hold different layers, got {list(layers)}")
    return layers


def _check_regex(field: str, pattern: Any) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise TypeError(f"{field} must hold regular expressions, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field} is not a regular expression: {pattern!r} ({error})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return value.item() if isinstance(value, np.generic) else value
