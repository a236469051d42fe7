"""Which layers a config means, and whether every one of its rules found something."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ._validation import suggest
from .config import ALL_LINEAR, LoRAPlusConfig, matches, pattern_of
from .spec import LEAVES, LINEAR_KINDS


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
    adapted, leaves = [path for path, entry in seen.items() if entry.adapted], list(leaves)
    if config.target_modules:
        _check_targets(config, seen)
    _check_exclusions(config, seen)
    parameters = _check_parameters(config, adapted, leaves)
    _check_layers(config, adapted, stacks)
    for name in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, Any] = getattr(config, name)
        used = {pattern_of(patterns, path) for path in (*adapted, *parameters)}
        if idle := [pattern for pattern in patterns if pattern not in used]:
            raise ValueError(
                f"{name}: {idle[0]!r} applies to no adapter{suggest(idle[0], (*adapted, *parameters))}"
            )
    modules = {leaf.rpartition("/")[0] for leaf in leaves}
    for name in config.modules_to_save:
        if not any(
            saved_module_of(dataclasses.replace(config, modules_to_save=(name,)), module)
            for module in modules
        ):
            raise ValueError(f"modules_to_save: {name!r} matches no module{suggest(name, modules - {''})}")
    for path in (*adapted, *parameters):
        if (name := saved_module_of(config, path)) is not None:
            raise ValueError(
                f"{path!r} has an adapter, and modules_to_save: {name!r} trains it in full: choose one"
            )


def _check_targets(config: LoRAPlusConfig, seen: Mapping[str, TracedModule]) -> None:
    target = config.target_modules
    for rule in (target,) if isinstance(target, str) else target:
        one = rule if isinstance(target, str) else (rule,)
        hits = {
            p: e
            for p, e in seen.items()
            if (is_target(config, p) if target == ALL_LINEAR else matches(one, p))
        }
        for path, entry in hits.items():
            if target != ALL_LINEAR and entry.weights and not entry.adaptable:
                raise ValueError(
                    f"target_modules: {rule!r} matches {path!r} ({entry.type}), which is no layer that can be "
                    f"adapted; name its weights {entry.weights} in target_parameters instead"
                )
        if not any(entry.adapted for entry in hits.values()):
            left_out = [path for path, entry in hits.items() if entry.adaptable]
            why = (
                f"matches only what exclude_modules or layers_to_transform leave out: {', '.join(left_out[:3])}"
                if left_out
                else f"matches no layer that can be adapted{suggest(rule, _names(seen, config))}"
            )
            raise ValueError(f"target_modules: {rule!r} {why}")


def _check_exclusions(config: LoRAPlusConfig, seen: Mapping[str, TracedModule]) -> None:
    exclude = config.exclude_modules
    for rule in (exclude,) if isinstance(exclude, str) else exclude:
        one = rule if isinstance(exclude, str) else (rule,)
        kinds = {
            e.kind
            for path, e in seen.items()
            if e.adaptable and matches(one, path) and is_target(config, path)
        }
        if not (kinds - {None} if config.target_modules != ALL_LINEAR else kinds & set(LINEAR_KINDS)):
            raise ValueError(
                f"exclude_modules: {rule!r} excludes nothing that target_modules names"
                f"{suggest(rule, _names(seen, config))}"
            )


def _check_parameters(config: LoRAPlusConfig, adapted: list[str], leaves: list[str]) -> list[str]:
    found = {path: rule for path in leaves if (rule := parameter_rule(config, path)) is not None}
    for rule in config.target_parameters:
        if rule not in found.values():
            raise ValueError(f"target_parameters: {rule!r} matches no parameter{suggest(rule, leaves)}")
    for path, rule in found.items():
        if (module := path.rpartition("/")[0]) in adapted and path.rpartition("/")[2] in LEAVES:
            raise ValueError(
                f"target_parameters: {rule!r} matches {path!r}, to which target_modules: "
                f"{matching_rule(config, module)!r} has given an adapter already"
            )
    return list(found)


def _check_layers(config: LoRAPlusConfig, adapted: list[str], stacks: Mapping[str, int]) -> None:
    if config.layers_to_transform is None:
        return
    there = {layer_index(path) for path in adapted if path not in stacks}
    there |= {n for size in stacks.values() for n in range(size)}
    if idle := [n for n in config.layers_to_transform if n not in there]:
        known = sorted(n for n in there if n is not None)
        raise ValueError(f"layers_to_transform: there is no layer {idle[0]} to adapt; there are {known}")


def _names(seen: Mapping[str, TracedModule], config: LoRAPlusConfig) -> list[str]:
    """What a rule could have named: last segments, or whole paths for a regular expression."""
    paths = [path for path, entry in seen.items() if path and entry.adaptable]
    return paths if isinstance(config.target_modules, str) else list({p.rpartition("/")[2] for p in paths})
