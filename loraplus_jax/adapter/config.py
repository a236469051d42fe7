"""`LoRAPlusConfig`: what to adapt and how, validated on construction."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, get_args

from .._utils.validation import check_choice, check_int, check_number, suggest, to_plain

Init = Literal[
    "lora", "he_uniform", "lora_b", "gaussian", "orthogonal", "pissa", "olora", "lora_ga", "lora_one", "loftq"
]


class BaseInit(NamedTuple):
    """How an init starts from the base."""

    source: Literal["weights", "gradients", "quantization errors"]  # what it makes A and B of
    subtracted: bool = False  # whether s A B is subtracted from the base
    has_svd: bool = True


BASE_INITS: Mapping[str, BaseInit] = {
    "pissa": BaseInit("weights", subtracted=True),
    "olora": BaseInit("weights", subtracted=True, has_svd=False),
    "lora_ga": BaseInit("gradients", subtracted=True),
    "lora_one": BaseInit("gradients"),
    "loftq": BaseInit("quantization errors"),
}
"""The inits that start from the base, by the functions of `inits.from_weights` and `inits.loftq`."""
Bias = Literal["none", "all", "lora_only"]
Variant = Literal["lora", "dora"]

DEFAULT_LR_RATIO: Mapping[str, float] = dict.fromkeys(get_args(Init), 4.0) | {"lora_b": 16.0}
"""The default lambda by init. The paper found 16 with random B and zero A (`"lora_b"`); with zero B it reports
4 to 8, and 2 to 4 for Llama (arXiv 2402.12354, section 5). Of the other inits nothing is known. A starting point
for a sweep, not an optimum.
"""
ALL_LINEAR = "all-linear"


class Rules(dict):
    """A hashable dict for a frozen config. Equality depends on order, since the first matching rule applies.

    >>> Rules(a=1, b=2) == Rules(b=2, a=1)
    False
    """

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self.items()) == list(other.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAPlusConfig:
    """Selects the layers to adapt, and sets the adapters' rank and scale and the ratio of the learning rates.

    A module name matches every path that ends in it, whole segments only (`"query"` or `"attention/query"`). A
    single string instead of a sequence is one regular expression for the whole path, with segments joined by "/".
    Set `target_modules`, `target_parameters` or both. Every rule must match something, and no weight may be covered
    twice.

    Pass `lr_ratio=config.lr_ratio` to `lora_plus_adamw`; `split_trainable(variables, config)` applies
    `modules_to_save` and `bias`. `dataclasses.replace` keeps the current `lr_ratio`, even with another `init`.

    Attributes:
      target_modules: layers to adapt: a list of names, each matching the end of a path (query or attention/query),
        or one regular expression for the whole path; all-linear adapts every Dense, DenseGeneral and Einsum outside
        modules_to_save.
      exclude_modules: layers of target_modules to leave out, in the same form.
      target_parameters: single weights to adapt as W + s A B, whatever module owns them: a mapping from a regular
        expression for the weight's whole path to one letter per axis (i input, o output, any other letter a batch
        axis kept in both factors), or a list, which means io for each. A use other than products, lookups, moves of
        axes and convolutions costs the whole weight's gradient.
      layers_to_transform: indices of the layers of target_modules to adapt: the number that ends a path segment
        (layers_3/query), or the index in a stack of scanned layers; null adapts all layers.
      rank: rank r, the inner dimension of A (in, r) and B (r, out).
      alpha: numerator of the scale s = alpha / rank in W + s A B.
      rank_pattern: ranks of single layers: a mapping from a regular expression for the end of a path, in whole
        segments, to a rank; the first match applies.
      alpha_pattern: alphas of single layers, in the same form.
      use_rslora: rank-stabilized scale, s = alpha / sqrt(rank) (arXiv 2312.03732).
      dropout: dropout rate on the adapter's input, except for embedding lookups; active when apply gets a dropout
        rng, as in training.
      lr_ratio: lambda, the ratio of B's learning rate to A's (arXiv 2402.12354, section 4); defaults to 4, or to 16
        with init lora_b.
      init: initialization of the factors: lora has uniform A within ±sqrt(1/in) and zero B, as PEFT (Init[1] of
        the paper); he_uniform has uniform A within ±sqrt(6/in) and zero B; lora_b has zero A and uniform B within
        ±sqrt(6/r) (Init[2], used in the paper's experiments); gaussian has A from N(0, 1/r^2) and zero B;
        orthogonal has random A and B with A B = 0; pissa and olora start from the weight, lora_ga and lora_one
        from a gradient, loftq from what packing the weight lost.
      init_iterations: power iterations of a randomized SVD for inits that need one; null computes it exactly, which
        takes minutes for each weight of a large model.
      variant: lora, or dora (arXiv 2402.09353), which also trains the norm of each output's weights and makes A and
        B change only their direction.
      modules_to_save: names of modules to train fully, such as a new head.
      bias: biases to train fully: none, all, or lora_only (those of the adapted layers).

    Raises:
      ValueError, TypeError: a field is out of range or of the wrong type; the message names it.

    Example:
      >>> config = LoRAPlusConfig(target_modules=["query", "value"], rank_pattern={"layers_0/query": 4})
      >>> config.rank_of("layers_0/query"), config.rank_of("layers_0/value"), config.scale_of("layers_0/value")
      (4, 8, 2.0)
    """

    # The types say what the constructor accepts; the fields hold tuples and hashable dicts.
    target_modules: str | Sequence[str] = ()
    exclude_modules: str | Sequence[str] = ()
    target_parameters: Mapping[str, str] | Sequence[str] = ()
    layers_to_transform: Sequence[int] | None = None
    rank: int = 8
    alpha: float = 16.0
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    dropout: float = 0.0
    lr_ratio: float = None  # pyright: ignore[reportAssignmentType] # __post_init__ sets a number
    init: Init = "lora"
    init_iterations: int | None = None
    variant: Variant = "lora"
    modules_to_save: Sequence[str] = ()
    bias: Bias = "none"

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        object.__setattr__(self, "target_parameters", _parameters(self.target_parameters))
        object.__setattr__(self, "layers_to_transform", _layers(self.layers_to_transform))
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules must name layers, such as ['query'], or set target_parameters")
        check_int("rank", self.rank, at_least=1)
        check_number("alpha", self.alpha, above=0.0)
        self._check_patterns()
        check_number("dropout", self.dropout, at_least=0.0, below=1.0)
        if self.dropout and not self.target_modules:
            raise ValueError(f"dropout requires target_modules: parameters have no input; got {self.dropout}")
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"use_rslora must be true or false, got {self.use_rslora!r}")
        check_choice("init", self.init, get_args(Init))
        if self.init_iterations is not None:
            if self.init not in BASE_INITS or not BASE_INITS[self.init].has_svd:
                raise ValueError(f"init_iterations requires an init with an SVD, got {self.init}; remove it")
            check_int("init_iterations", self.init_iterations, at_least=0)
        check_choice("variant", self.variant, get_args(Variant))
        check_choice("bias", self.bias, get_args(Bias))
        if self.lr_ratio is None:
            object.__setattr__(self, "lr_ratio", DEFAULT_LR_RATIO[self.init])
        check_number("lr_ratio", self.lr_ratio, above=0.0)
        for name in ("alpha", "lr_ratio", "dropout"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def _check_patterns(self) -> None:
        for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping):
                raise TypeError(f"{name} must be a mapping from patterns to values, got {patterns!r}")
            for pattern, value in patterns.items():
                _check_regex(name, pattern)
                where = f"{name}[{pattern!r}]"
                if kind is int:
                    check_int(where, value, at_least=1)
                else:
                    check_number(where, value, above=0.0)
            object.__setattr__(self, name, Rules((key, kind(value)) for key, value in patterns.items()))

    @property
    def scale(self) -> float:
        """The scale s of A B where no pattern applies."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def rank_of(self, path: str) -> int:
        """The rank of the adapter at a path, according to `rank_pattern`."""
        key = pattern_of(self.rank_pattern, path)
        return self.rank if key is None else self.rank_pattern[key]

    def scale_of(self, path: str) -> float:
        """The scale s of A B at a path, according to `rank_pattern` and `alpha_pattern`."""
        key = pattern_of(self.alpha_pattern, path)
        alpha, rank = self.alpha if key is None else self.alpha_pattern[key], self.rank_of(path)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return to_plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
          ValueError, TypeError: a key is unknown (the message suggests the closest one) or a value is invalid.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"LoRAPlusConfig must be a mapping with target_modules, got {values!r:.80}")
        fields = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in fields:
                raise ValueError(f"LoRAPlusConfig: unknown key {name!r}{suggest(name, fields)}")
        return cls(**values)


def pattern_of(patterns: Mapping[str, Any], path: str) -> str | None:
    """The first pattern that matches the end of a path, whole segments only, as in PEFT; None if none does.

    >>> pattern_of({"query": 4, "layers_1/.*": 2}, "layers_1/query"), pattern_of({"query": 4}, "my_query")
    ('query', None)
    """
    return next((key for key in patterns if re.fullmatch(rf"(.*/)?({key})", path)), None)


def matches(rule: str | Sequence[str], path: str) -> bool:
    """Whether a rule matches a module path: a regular expression all of it, one of several names its end.

    >>> matches(("query",), "layers/attention/query"), matches(("query",), "layers/my_query")
    (True, False)
    >>> matches(r"layers/.*/(query|value)", "layers/attention/value")
    True
    """
    if isinstance(rule, str):
        return re.fullmatch(rule, path) is not None
    return any(path == name or path.endswith("/" + name) for name in rule)


def _distinct(field: str, value: Any, what: str) -> tuple[Any, ...]:
    is_mapping = isinstance(value, Mapping) and field != "target_parameters"
    if isinstance(value, str) or is_mapping or not isinstance(value, Iterable):
        raise TypeError(f"{field} must be a sequence of {what}, got {value!r}")
    items = tuple(value)
    if len(set(map(str, items))) < len(items):
        raise ValueError(f"{field} must be distinct, got {list(items)}")
    return items


def _names(field: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and field != "modules_to_save":
        if value not in ("", ALL_LINEAR):
            _check_regex(field, value)
        return value
    names = _distinct(field, value, "module names")
    for name in names:
        if not isinstance(name, str) or not name.strip("/"):
            raise TypeError(f"{field} must contain non-empty module names, got {name!r}")
    return names


def _parameters(value: Any) -> Mapping[str, str]:
    patterns = _distinct("target_parameters", value, "regular expressions, or a mapping from them to axes")
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"target_parameters must contain regular expressions, got {value!r}")
    rules = Rules(value if isinstance(value, Mapping) else dict.fromkeys(patterns, "io"))
    for pattern, axes in rules.items():
        _check_regex("target_parameters", pattern)
        if not isinstance(axes, str) or not re.fullmatch("[a-z]+", axes) or not {"i", "o"} <= set(axes):
            raise ValueError(
                f"target_parameters[{pattern!r}] must be one lower-case letter per axis, including i (input) "
                f"and o (output), got {axes!r}"
            )
    return rules


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    layers = _distinct("layers_to_transform", [value] if type(value) is int else value, "integers")
    for number in layers:
        check_int("layers_to_transform", number, at_least=0)
    if not layers:
        raise ValueError("layers_to_transform must name layers, or be null for all, got none")
    return layers


def _check_regex(field: str, pattern: Any) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise TypeError(f"{field} must contain non-empty regular expressions, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field}: invalid regular expression {pattern!r}: {error}") from None
