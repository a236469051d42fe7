"""Where adapters join a wrapped model's parameters on the way in, and leave them on the way out."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax import traverse_util
from flax.core import meta

from ..config import LoRAPlusConfig, matches
from ..lora import PREVIOUS_FACTORS, SCALE, TAP, rebox, weight_delta
from ..rules import is_target, parameter_rule
from ..spec import EMBEDDING_FACTORS, FACTORS, LEAVES, AdapterSpec
from .adapter import FactorBox, Mode, is_box, mode, new_factors, read_factors
from .discovery import Discovery

COLLECTIONS = ["params", "lora", SCALE]
Path = tuple[str, ...]
_NAMES = (*FACTORS, *EMBEDDING_FACTORS, SCALE, TAP, *PREVIOUS_FACTORS)


class CollectionMap:
    """The variables of one call, on the way in and on the way out.

    Factors of layers join the parameters at their own paths; `"lora"` itself stays, for layers that keep theirs
    there. Parameters with an adapter of their own go in as W + s A B, and come out as they were.

    Attributes:
      is_bare: whether no adapter came in at all.
    """

    def __init__(self, config: LoRAPlusConfig, wrapper: nn.Module, discovery: Discovery) -> None:
        assert wrapper.scope is not None
        self.config, self.discovery = config, discovery
        self.rng: Any = wrapper.scope.rngs.get("params")
        self.unboxes = mode() is Mode.PLAIN
        self.is_bare = True
        self._given: set[Path] = set()  # factors and scales that came in
        self._weights_there: set[Path] = set()  # parameters that came in
        self._weights: dict[Path, Any] = {}  # those with an adapter of their own, as they came in
        self._factors: dict[Path, Any] = {}  # theirs

    def enter(self, collections: Mapping[str, Any]) -> dict[str, Any]:
        """On the way in."""
        params, lora, scales = (_flatten(collections.get(name, {})) for name in COLLECTIONS)
        self._given, self.is_bare = {*lora, *scales}, not lora
        self._weights_there = set(params)
        for path in [p for p in params if self._rule(p) is not None]:
            spec, where = self._spec(path, params[path])
            a, b = read_factors(spec, lambda name, path=path: lora.get((*path, name)), where)
            self._factors |= {(*path, name): lora.pop((*path, name)) for name in spec.factors}
            self._weights[path] = leaf = params[path]
            value, scale = meta.unbox(leaf), scales.pop((*path, SCALE), None)
            scale = None if scale is None else scale.reshape(())
            params[path] = rebox(leaf, (value + weight_delta(a, b, spec, scale)).astype(value.dtype))
        inner = {"params": traverse_util.unflatten_dict(params | lora | scales)}
        # A norm of weights walks over all collections: what has done its work here must not be seen there.
        kept = {
            name: {p: leaf for p, leaf in _flatten(collections[name]).items() if p not in self._factors}
            for name in COLLECTIONS[1:]
            if name in collections
        }
        return inner | {name: traverse_util.unflatten_dict(flat) for name, flat in kept.items()}

    def leave(self, collections: Mapping[str, Any]) -> dict[str, Any]:
        """On the way out: the inverse of `enter`, new factors included."""
        groups: dict[str, dict[Path, Any]] = {name: {} for name in COLLECTIONS}
        for path, leaf in _flatten(collections.get("params", {})).items():
            # By where it came from, not by its name alone: a model may have a parameter called lora_a.
            ours = path in self._given or isinstance(leaf, FactorBox)
            owner = "params" if not ours else SCALE if path[-1] == SCALE else "lora"
            groups[owner][path] = leaf
        groups["lora"] = self.discovery.choose_layers(groups["lora"])
        for path, leaf in groups["params"].items():
            if self._rule(path) is not None:
                groups["params"][path] = leaf = self._weights.get(path, leaf)
                groups["lora"] |= self._factors_of(path, leaf)
        self.discovery.leaves |= {"/".join(path) for path in groups["params"]}
        for name in COLLECTIONS[1:]:
            groups[name] = _flatten(collections.get(name, {})) | groups[name]
        if self.unboxes:
            groups["lora"] = {
                p: leaf.value if is_box(p, leaf) else leaf for p, leaf in groups["lora"].items()
            }
        return {name: traverse_util.unflatten_dict(flat) for name, flat in groups.items() if flat}

    def check_used(self, own: set[str], called: set[str], *, whole: bool) -> None:
        """Raises ValueError for what came in as an adapter and is none of this model and config.

        A layer need not have been met to be the model's, since a call may leave it out; but its weight is there.

        Args:
          own: paths of layers that bring their own adapter.
          called: paths of layers that were called.
          whole: the call was one that `init_lora` traced too, so that every layer of ours is in `own`.
        """
        modules = {"/".join(path[:-1]) for path in self._given}
        targets = self.config.target_modules
        for rule in () if self.is_bare or isinstance(targets, str) else targets:
            if not any(matches((rule,), module) for module in modules):
                raise ValueError(f"target_modules: {rule!r} has no adapter in the variables")
        for path in sorted(self._given):
            name, module = "/".join(path), "/".join(path[:-1])
            if path[-1] not in _NAMES:
                raise ValueError(
                    f"the variables hold {name!r} among the adapters, where only {', '.join(_NAMES)} stand"
                )
            if not self._weights_there.intersection({path[:-1], *((*path[:-1], leaf) for leaf in LEAVES)}):
                raise ValueError(
                    f"the variables hold an adapter for {module!r}, where the model has no weight: they are of "
                    "another config or another model"
                )
            asked = path in self._factors or path[-1] == SCALE
            asked = asked or (self.config.target_modules and is_target(self.config, module))
            asked = asked or any(f"{module}/".startswith(f"{layer}/") or not layer for layer in own)
            if not asked and (whole or module in called):
                raise ValueError(
                    f"the variables hold an adapter for {module!r}, which no rule of the config names: they are of "
                    "another config or another model"
                )

    def _rule(self, path: Path) -> str | None:
        """The rule of `target_parameters` for a leaf."""
        return parameter_rule(self.config, "/".join(path)) if self.config.target_parameters else None

    def _spec(self, path: Path, leaf: Any) -> tuple[AdapterSpec, str]:
        """Of a parameter with an adapter of its own, and its name for messages."""
        name, rule, value = "/".join(path), self._rule(path), meta.unbox(leaf)
        if not hasattr(value, "shape"):
            raise ValueError(
                f"target_parameters: {rule!r} matches {name!r}, which is a {type(value).__name__} of arrays and "
                "not one array: let the model keep each under a name of its own"
            )
        rules: Any = self.config.target_parameters
        axes, shape = rules[rule], tuple(value.shape)
        if len(axes) != len(shape):
            raise ValueError(
                f"target_parameters: {rule!r} matches {name!r} of shape {shape}, which the axes {axes!r} do not "
                "fit: give a letter for each axis"
            )
        rank, scale = self.config.rank_of(name), self.config.scale_of(name)
        spec = AdapterSpec(leaf="", kind="parameter", axes=axes, shape=shape, rank=rank, scale=scale)
        return spec, f"{name!r} (target_parameters: {rule!r})"

    def _factors_of(self, path: Path, leaf: Any) -> dict[Path, Any]:
        """A parameter's factors as they came in, or new ones."""
        given = {(*path, name): self._factors.get((*path, name)) for name in FACTORS}
        if all(factor is not None for factor in given.values()):
            return given
        spec, where = self._spec(path, leaf)
        new = new_factors(spec, self.config.init, self.rng, path, meta.unbox(leaf).dtype, where)
        return {(*path, name): box for name, box in new.items()}


def _flatten(tree: Any) -> dict[Path, Any]:
    return dict(traverse_util.flatten_dict(dict(tree), is_leaf=is_box))
