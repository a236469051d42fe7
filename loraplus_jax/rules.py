"""Which layers a config means, and whether every one of its rules found something."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ._validation import suggest
from .config import ALL_LINEAR, LoRAPlusConfig, matches, pattern_of
from .spec import LAYER_KINDS, LEAVES, LINEAR_KINDS
from .untrusted import run_job


class TracedModule:
    """What was met at a module's path while a model was traced.

    Attributes:
      type: the module's class.
      weights: names of its own leaves with two axes or more, if it is no layer that can be adapted.
      kind, axes: of the layer, once a rule has named it.
      adapted: whether it got an adapter.
    """

    def __init__(self, type_name: str) -> None:
        self.type = type_name
        self.weights: list[str] = []
        self.kind: str | None = None
        self.axes: str | None = None
        self.adaptable = False
        self.adapted = False

    def note(self, kind: str, axes: str, path: str) -> None:
        """What the layer is; one that is used with other axes than before is refused."""
        if self.axes not in (None, axes):
            raise ValueError(
                f"{path!r} uses its weight with the axes {self.axes!r} and {axes!r}, so that no adapter has "
                "two sides; name the weight in target_parameters instead"
            )
        self.kind, self.axes = kind, axes


def is_target(config: LoRAPlusConfig, path: str) -> bool:
    """Whether `target_modules` names a path; `"all-linear"` names all but what is trained in full."""
    if config.target_modules == ALL_LINEAR:
        return saved_module_of(config, path) is None
    return matches(config.target_modules, path)


def is_adapted(config: LoRAPlusConfig, path: str, kind: str) -> bool:
    """Whether a layer that `target_modules` names is to be adapted, whichever layer of the model it is in."""
    if config.target_modules == ALL_LINEAR and kind not in LINEAR_KINDS:
        return False
    return not (config.exclude_modules and matches(config.exclude_modules, path))


def layer_index(path: str) -> int | None:
    """The number of the layer that a path lies in: that which ends a segment above the module, or its own name.

    Raises:
      ValueError: two segments above the module have one.

    >>> layer_index("layers_3/mlp/Dense_0"), layer_index("h/12/attn"), layer_index("fc_2"), layer_index("head")
    (3, 12, 2, None)
    """
    *above, last = path.split("/")
    numbers = [int(found[0]) for segment in above if (found := re.search(r"\d+$", segment))]
    if len(numbers) > 1:
        raise ValueError(
            f"layers_to_transform: which layer {path!r} lies in cannot be told from its numbers {numbers}; name "
            "the layers by a regular expression in target_modules instead"
        )
    own = re.search(r"\d+$", last)
    return numbers[0] if numbers else int(own[0]) if own else None


def matching_rule(config: LoRAPlusConfig, path: str) -> str:
    """The rule that names a path, for messages."""
    if isinstance(config.target_modules, str):
        return config.target_modules
    return next(rule for rule in config.target_modules if matches((rule,), path))


def parameter_rule(config: LoRAPlusConfig, path: str) -> str | None:
    """The rule of `target_parameters` that names a leaf.

    Raises:
      ValueError: two do.
    """
    rules: Any = config.target_parameters
    found = [rule for rule in rules if re.fullmatch(rule, path)]
    if len(found) > 1:
        raise ValueError(f"target_parameters: {found[0]!r} and {found[1]!r} both match {path!r}")
    return found[0] if found else None


def saved_module_of(config: LoRAPlusConfig, path: str) -> str | None:
    """The name in `modules_to_save` that covers a module's path or one above it."""
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
    patterns = tuple(_regular_expressions(config)) if isinstance(config, Mapping) else ()
    if patterns:
        _try_match(f"{where}: the rule {patterns[0]!r:.80} or a later one", patterns, tuple(paths))


@functools.lru_cache(maxsize=16)
def _try_match(what: str, patterns: tuple[str, ...], paths: tuple[str, ...]) -> None:
    run_job(what, "match", patterns=patterns, names=paths)


def _regular_expressions(config: Mapping[str, Any]) -> Iterator[str]:
    """Every regular expression of a config, as it is matched with whole paths."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(rule := config.get(field), str) and rule != ALL_LINEAR:
            yield rule
    for field, form in (
        ("target_parameters", "%s"),
        ("rank_pattern", "(.*/)?(%s)"),
        ("alpha_pattern", "(.*/)?(%s)"),
    ):
        rules = config.get(field)
        yield from (
            (form % rule for rule in rules if isinstance(rule, str)) if isinstance(rules, Iterable) else ()
        )


def check_coverage(
    config: LoRAPlusConfig, seen: Mapping[str, TracedModule], leaves: Iterable[str], stacks: Mapping[str, int]
) -> None:
    """Raises ValueError for a rule that matched nothing, or for a weight that two rules cover.

    Args:
      config: the rules.
      seen: module path to what was met there.
      leaves: paths of the parameters.
      stacks: path of an adapted module to the number of its layers, where they are stacked.
    """
    leaves, is_all = list(leaves), config.target_modules == ALL_LINEAR
    adaptable = {path: entry for path, entry in seen.items() if entry.adaptable}
    adapted = [path for path, entry in seen.items() if entry.adapted]
    kinds = LINEAR_KINDS if is_all else LAYER_KINDS
    named = [path for path, e in adaptable.items() if is_target(config, path) and e.kind in kinds]
    parameters = {path: rule for path in leaves if (rule := parameter_rule(config, path)) is not None}
    modules = {"/".join(path.split("/")[:n]) for path in leaves for n in range(1, path.count("/") + 1)}
    # What a rule could have named: last segments, or whole paths for a regular expression.
    is_regex = isinstance(config.target_modules, str)
    names = {path if is_regex else path.rpartition("/")[2] for path in adaptable if path}

    def check(
        field: str, rules: Iterable[Any], is_used: Callable[[Any], bool], complaint: str, known: Any
    ) -> None:
        for rule in rules:
            if not is_used(rule):
                raise ValueError(f"{field}: {rule!r} {complaint}{suggest(str(rule), map(str, known))}")

    targets = _split_rules(config.target_modules)
    for rule, one in targets.items():
        relevant = {path: entry for path, entry in seen.items() if entry.adaptable or entry.weights}
        hits = relevant if is_all else {p: e for p, e in relevant.items() if matches(one, p)}
        _check_adaptable(rule, hits, named)
    check("target_modules", targets, lambda r: _any(targets[r], adapted), "matches no layer to adapt", names)
    excluded = _split_rules(config.exclude_modules)
    complaint = "excludes nothing that target_modules names"
    check("exclude_modules", excluded, lambda r: _any(excluded[r], named), complaint, names)
    used = parameters.values()
    check("target_parameters", config.target_parameters, lambda r: r in used, "matches no parameter", leaves)
    if config.layers_to_transform is not None:
        layers = {layer_index(path) for path in adapted if path not in stacks}
        layers |= {n for size in stacks.values() for n in range(size)}
        complaint = f"is no layer to adapt; there are {sorted(n for n in layers if n is not None)}"
        check("layers_to_transform", config.layers_to_transform, lambda n: n in layers, complaint, ())
    for field in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, Any] = getattr(config, field)
        first = {pattern_of(patterns, path) for path in (*adapted, *parameters)}
        check(field, patterns, first.__contains__, "applies to no adapter", (*adapted, *parameters))
    check(
        "modules_to_save", config.modules_to_save, lambda r: _any((r,), modules), "matches no module", modules
    )
    for path in (*adapted, *parameters):
        if (name := saved_module_of(config, path)) is not None:
            raise ValueError(
                f"{path!r} has an adapter, and modules_to_save: {name!r} trains it in full: choose one"
            )
    for path, rule in parameters.items():
        if (module := path.rpartition("/")[0]) in adapted and path.rpartition("/")[2] in LEAVES:
            raise ValueError(
                f"target_parameters: {rule!r} matches {path!r}, to which target_modules: "
                f"{matching_rule(config, module)!r} has given an adapter already"
            )


def _check_adaptable(rule: str, hits: Mapping[str, TracedModule], named: Sequence[str]) -> None:
    """Raises ValueError where a target's modules cannot be adapted, or other rules leave all of them out."""
    for path, entry in hits.items():
        if rule != ALL_LINEAR and entry.weights and not entry.adaptable:
            raise ValueError(
                f"target_modules: {rule!r} matches {path!r} ({entry.type}), which is no layer that can be "
                f"adapted; name its weights {entry.weights} in target_parameters instead"
            )
    left_out = [path for path in named if path in hits]
    if left_out and not any(hits[path].adapted for path in left_out):
        raise ValueError(
            f"target_modules: {rule!r} matches only what exclude_modules or layers_to_transform leave out: "
            f"{', '.join(left_out[:3])}"
        )


def _split_rules(field: str | tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    """Each rule of a field to a field with that rule alone."""
    return {field: field} if isinstance(field, str) else {rule: (rule,) for rule in field}


def _any(rule: str | tuple[str, ...], paths: Iterable[str]) -> bool:
    return any(rule == ALL_LINEAR or matches(rule, path) for path in paths)
