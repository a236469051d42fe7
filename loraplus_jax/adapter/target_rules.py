"""Matches a config's rules with a model's layers, and reports rules that match nothing."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .._utils.untrusted import run_job
from .._utils.validation import suggest
from .config import ALL_LINEAR, LoRAPlusConfig, matches, pattern_of
from .spec import LAYER_KINDS, LEAVES, LINEAR_KINDS, AdapterSpec, check_floating_weight


def config_of(specs: Mapping[str, AdapterSpec]) -> LoRAPlusConfig:
    """A config that gives these specs; the most frequent rank, scale and variant are its defaults."""

    def rules(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        default, _ = Counter(values.values()).most_common(1)[0]
        odd = [path for path, value in values.items() if value != default]
        # A pattern also matches the ends of longer paths: those need their own, in front of it.
        paths = sorted((path for path in values if matches(odd, path)), key=len, reverse=True)
        return default, {re.escape(path) or ".*": values[path] for path in paths}

    rank, rank_pattern = rules({path: spec.rank for path, spec in specs.items()})
    alpha, alpha_pattern = rules({path: spec.rank * spec.scale for path, spec in specs.items()})
    layers = [path for path, spec in specs.items() if spec.kind != "parameter"]
    parameters = {path: spec.rule_letters for path, spec in specs.items() if spec.kind == "parameter"}
    return LoRAPlusConfig(
        # The model itself, if it is a layer, has no name.
        target_modules=("|".join(map(re.escape, layers)) or ".*") if layers else (),
        target_parameters={re.escape(path): letters for path, letters in parameters.items()},
        rank=rank,
        alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        variant="dora" if any(spec.magnitude for spec in specs.values()) else "lora",
    )


@dataclasses.dataclass
class TracedModule:
    """What tracing a model found at a module's path."""

    type: str  # the module's class name
    # Those with two or more axes, of an unsupported type.
    weights: list[str] = dataclasses.field(default_factory=list)
    kind: str | None = None  # as in `AdapterSpec`; None until a rule matches the layer
    axes: str | None = None
    adaptable: bool = False  # whether the type is supported
    adapted: bool = False

    def record(self, kind: str, axes: str, path: str) -> None:
        """Records a layer's kind and axes; raises ValueError if an earlier call used other axes."""
        if self.axes not in (None, axes):
            raise ValueError(
                f"{path!r} uses its weight with axes {self.axes!r} and {axes!r}, so it has no unique input "
                "and output side; name the weight in target_parameters instead"
            )
        self.kind, self.axes = kind, axes


# Every call of a layer in every trace asks, and the answer is the same each time.
@functools.lru_cache(maxsize=4096)
def is_target(config: LoRAPlusConfig, path: str) -> bool:
    """Whether `target_modules` matches a path; `"all-linear"` matches all outside `modules_to_save`."""
    if config.target_modules == ALL_LINEAR:
        return saved_module_of(config, path) is None
    return matches(config.target_modules, path)


def is_adapted(config: LoRAPlusConfig, path: str, kind: str) -> bool:
    """Whether `exclude_modules` and the kinds of `"all-linear"` leave in a layer that `target_modules` matches."""
    if config.target_modules == ALL_LINEAR and kind not in LINEAR_KINDS:
        return False
    return not (config.exclude_modules and matches(config.exclude_modules, path))


def layer_index(path: str) -> int | None:
    """Finds the layer number in a path: it ends a segment above the module, or else the module's own name.

    Returns:
      The number, or None if there is none.

    Raises:
      ValueError: several segments above the module end in a number.

    >>> layer_index("layers_3/mlp/Dense_0"), layer_index("h/12/attn"), layer_index("fc_2"), layer_index("head")
    (3, 12, 2, None)
    """
    *above, last = path.split("/")
    numbers = [int(match[0]) for segment in above if (match := re.search(r"\d+$", segment))]
    if len(numbers) > 1:
        raise ValueError(
            f"layers_to_transform: the layer of {path!r} is ambiguous: {numbers}; use a regular expression in "
            "target_modules"
        )
    own = re.search(r"\d+$", last)
    return numbers[0] if numbers else int(own[0]) if own else None


def matching_rule(config: LoRAPlusConfig, path: str) -> str:
    """The rule of `target_modules` that matches a path, for messages."""
    if isinstance(config.target_modules, str):
        return config.target_modules
    return next(rule for rule in config.target_modules if matches((rule,), path))


def parameter_rule(config: LoRAPlusConfig, path: str) -> str | None:
    """The rule of `target_parameters` that matches a parameter's path, or None; raises ValueError if two match."""
    rules: Any = config.target_parameters
    matching = [rule for rule in rules if re.fullmatch(rule, path)]
    if len(matching) > 1:
        raise ValueError(f"target_parameters: {matching[0]!r} and {matching[1]!r} both match {path!r}")
    return matching[0] if matching else None


def parameter_spec(
    config: LoRAPlusConfig, path: str, rule: str, shape: tuple[int, ...], dtype: Any, leaf: str
) -> AdapterSpec:
    """Makes the spec of a parameter at `path` that a rule of `target_parameters` matches; `leaf` is the spec's.

    Returns:
      The spec, of kind `parameter`, with the axes of the rule and the config's rank and scale for `path`.

    Raises:
      ValueError: the rule has another number of letters than the parameter has axes, or its dtype is an integer.
    """
    rules: Any = config.target_parameters
    axes = rules[rule]
    if len(axes) != len(shape):
        raise ValueError(
            f"target_parameters: {rule!r} needs {len(shape)} letters for {path!r} {shape}, got {axes!r}"
        )
    check_floating_weight(f"{path!r} (target_parameters: {rule!r})", dtype)
    sizes: Any = {"rank": config.rank_of(path), "scale": config.scale_of(path)}
    magnitude = config.variant == "dora"
    return AdapterSpec(leaf=leaf, kind="parameter", axes=axes, shape=shape, magnitude=magnitude, **sizes)


def saved_module_of(config: LoRAPlusConfig, path: str) -> str | None:
    """The name in `modules_to_save` that matches a module's path or a parent's, or None."""
    segments = path.split("/")
    above = ["/".join(segments[:n]) for n in range(1, len(segments) + 1)]
    return next((name for name in config.modules_to_save if any(matches((name,), p) for p in above)), None)


def try_rules(where: str, config: Any, paths: Iterable[str]) -> None:
    """Matches a config's regular expressions in the child process of `untrusted`: if they end there, they end here.

    Args:
      where: names the config, for error messages.
      config: the config as JSON, not checked yet.
      paths: what its rules will be matched with.

    Raises:
      ValueError: one is invalid or takes too long.
    """
    patterns, config = [], config if isinstance(config, Mapping) else {}
    for field in ("target_modules", "exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        rules = config.get(field)
        if field.endswith("_modules"):  # a sequence there holds names
            rules = [rules] if rules != ALL_LINEAR else []
        form = "(.*/)?(%s)" if field.endswith("_pattern") else "%s"
        rules = rules if isinstance(rules, Iterable) else ()
        patterns += [form % rule for rule in rules if isinstance(rule, str)]
    if patterns:
        _try_match(f"{where}: the rule {patterns[0]!r:.80} or a later one", tuple(patterns), tuple(paths))


# Cached, since one command may read the same config several times, and the child answers in milliseconds at best.
@functools.lru_cache(maxsize=16)
def _try_match(what: str, patterns: tuple[str, ...], paths: tuple[str, ...]) -> None:
    run_job(what, "match", patterns=patterns, names=paths)


def check_coverage(
    config: LoRAPlusConfig, seen: Mapping[str, TracedModule], leaves: Iterable[str], stacks: Mapping[str, int]
) -> None:
    """Raises ValueError if a rule matches nothing, or two rules cover one weight.

    `seen` are the traced modules by path, `leaves` paths of parameters; `stacks` gives the number of layers in a
    stack by the path of the adapted module.
    """
    leaves, is_all = list(leaves), config.target_modules == ALL_LINEAR
    adaptable = {path: entry for path, entry in seen.items() if entry.adaptable}
    adapted = [path for path, entry in seen.items() if entry.adapted]
    kinds = LINEAR_KINDS if is_all else LAYER_KINDS
    targeted = [path for path, e in adaptable.items() if is_target(config, path) and e.kind in kinds]
    parameters = {path: rule for path in leaves if (rule := parameter_rule(config, path)) is not None}
    modules = {"/".join(path.split("/")[:n]) for path in leaves for n in range(1, path.count("/") + 1)}
    # Names to suggest: last segments of paths, or whole paths for a regular expression.
    is_regex = isinstance(config.target_modules, str)
    names = {path if is_regex else path.rpartition("/")[2] for path in adaptable if path}

    def check(
        field: str, rules: Iterable[Any], is_used: Callable[[Any], bool], problem: str, known: Any
    ) -> None:
        for rule in rules:
            if not is_used(rule):
                raise ValueError(f"{field}: {rule!r} {problem}{suggest(str(rule), map(str, known))}")

    targets = _split_rules(config.target_modules)
    for rule, pattern in targets.items():
        relevant = {path: entry for path, entry in seen.items() if entry.adaptable or entry.weights}
        hits = relevant if is_all else {p: e for p, e in relevant.items() if matches(pattern, p)}
        _check_adaptable(rule, hits, targeted)
        bare = [path for path in leaves if not is_regex and path.rpartition("/")[0] not in adaptable]
        if not hits and (bare := [path for path in bare if matches(pattern, path)]):
            raise ValueError(
                f"target_modules: {rule!r} matches no layer but the parameter {bare[0]!r}; name it in "
                "target_parameters instead, with one letter per axis"
            )
    problem = "matches no adaptable layer" + _name_hint(config.target_modules, adaptable)
    check("target_modules", targets, lambda r: _any(targets[r], adapted), problem, names)
    excluded = _split_rules(config.exclude_modules)
    problem = "excludes no layer of target_modules" + _name_hint(config.exclude_modules, targeted)
    check("exclude_modules", excluded, lambda r: _any(excluded[r], targeted), problem, names)
    used = parameters.values()
    check("target_parameters", config.target_parameters, lambda r: r in used, "matches no parameter", leaves)
    if config.layers_to_transform is not None:
        layers = {layer_index(path) for path in adapted if path not in stacks}
        layers |= {n for size in stacks.values() for n in range(size)}
        problem = f"is not a layer to adapt; available: {sorted(n for n in layers if n is not None)}"
        check("layers_to_transform", config.layers_to_transform, lambda n: n in layers, problem, ())
    for field in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, Any] = getattr(config, field)
        first = {pattern_of(patterns, path) for path in (*adapted, *parameters)}
        check(field, patterns, first.__contains__, "matches no adapter", (*adapted, *parameters))
    check(
        "modules_to_save", config.modules_to_save, lambda r: _any((r,), modules), "matches no module", modules
    )
    for path in (*adapted, *parameters):
        if (name := saved_module_of(config, path)) is not None:
            raise ValueError(f"{path!r} has an adapter, and modules_to_save {name!r} trains it; choose one")
    for path, rule in parameters.items():
        if (module := path.rpartition("/")[0]) in adapted and path.rpartition("/")[2] in LEAVES:
            raise ValueError(
                f"target_parameters: {rule!r} matches {path!r}, which target_modules "
                f"{matching_rule(config, module)!r} already adapts; remove one of the two rules"
            )


def _check_adaptable(rule: str, hits: Mapping[str, TracedModule], targeted: Sequence[str]) -> None:
    """Raises ValueError if a rule matches an unsupported layer, or only layers that other rules leave out."""
    for path, entry in hits.items():
        if rule != ALL_LINEAR and entry.weights and not entry.adaptable:
            raise ValueError(
                f"target_modules: {rule!r} matches {path!r}, of the unsupported type {entry.type}; name its "
                f"weights {entry.weights} in target_parameters instead"
            )
    matching = [path for path in targeted if path in hits]
    if matching and not any(hits[path].adapted for path in matching):
        raise ValueError(
            f"target_modules: {rule!r} matches only layers that exclude_modules or layers_to_transform leave "
            f"out: {', '.join(matching[:3])}"
        )


def _split_rules(field: str | Sequence[str]) -> dict[str, str | tuple[str, ...]]:
    # Each rule of a field, and a field with only that rule, for `matches`.
    return {field: field} if isinstance(field, str) else {rule: (rule,) for rule in field}


def _name_hint(field: str | Sequence[str], paths: Iterable[str]) -> str:
    # For a regular expression that looks like a name.
    if not isinstance(field, str) or not any(matches((field,), path) for path in paths):
        return ""
    return f"; a string is a regular expression over the whole path, for a name write [{field}]"


def _any(rule: str | Sequence[str], paths: Iterable[str]) -> bool:
    return any(rule == ALL_LINEAR or matches(rule, path) for path in paths)
