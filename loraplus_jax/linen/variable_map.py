"""Moves adapters into a wrapped model's parameters before a call, and out of them after it."""

import string
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from flax import traverse_util
from flax.core import lift, meta

from ..adapter.config import LoRAPlusConfig, matches
from ..adapter.lora import SCALE
from ..adapter.spec import EMBEDDING_FACTORS, FACTORS, LEAVES, MAGNITUDE
from ..adapter.taps import PREVIOUS_FACTORS, TAP
from ..adapter.target_rules import is_target, parameter_rule, parameter_spec
from ..adapter.tree import rebox
from ..interpreter.low_rank import call
from ..interpreter.weight import LowRankWeight
from ..quantization.packed_array import is_packed
from .discovery import Discovery
from .layer_adapter import TRACING, FactorBox, LayerAdapter, get_factors, is_box, new_factors

COLLECTIONS = ["params", "lora", SCALE]
Path = tuple[str, ...]
_NAMES = (*FACTORS, *EMBEDDING_FACTORS, MAGNITUDE, SCALE, TAP, *PREVIOUS_FACTORS)
_UNUSED = "the variables contain {!r}, which an adapter of the config's variant {} does not use"


class VariableMap:
    """Maps the variables of one call into the wrapped model and back.

    Factors of layers join the parameters at the same paths. `"lora"` itself stays, for layers with built-in
    adapters. Parameters in `target_parameters` enter as `LowRankWeight`, for `keep_low_rank`, and leave unchanged.

    Attributes:
      is_bare: whether the variables contain no adapters.
    """

    def __init__(self, config: LoRAPlusConfig, wrapper: nn.Module, discovery: Discovery) -> None:
        assert wrapper.scope is not None
        self.config, self.discovery = config, discovery
        self.rng: Any = wrapper.scope.rngs.get("params")
        self.unboxes = not TRACING.value.boxed
        self.is_bare = True
        self._adapter_paths: set[Path] = set()  # factors and scales passed to the call
        self._param_paths: set[Path] = set()  # parameters passed to the call
        self._targets: dict[Path, Any] = {}  # original values of packed ones and those in target_parameters
        self._factors: dict[Path, Any] = {}  # factors of these parameters

    def enter(self, collections: Mapping[str, Any]) -> dict[str, Any]:
        """The variables as the wrapped model sees them."""
        params, lora, scales = (_flatten(collections.get(name, {})) for name in COLLECTIONS)
        self._adapter_paths, self.is_bare = {*lora, *scales}, not lora
        self._param_paths = set(params)
        for path in [p for p in params if self._rule(p) is not None]:
            self._targets[path] = leaf = params[path]
            adapter = self._adapter(path, leaf)
            a, b, *magnitude = get_factors(adapter, lambda name, path=path: lora.get((*path, name)))
            self._factors |= {(*path, name): lora.pop((*path, name)) for name in adapter.shapes}
            scale = scales.pop((*path, SCALE), None)
            weight = LowRankWeight(
                w=meta.unbox(leaf),
                a=a,
                b=b,
                letters=adapter.letters,
                factor_letters=adapter.factor_letters,
                scale=adapter.spec.scale if scale is None else scale.reshape(()),
                stops=True,
                omit=TRACING.value.low_rank_only,
            ).with_magnitude(*magnitude)
            params[path] = rebox(leaf, weight)
        if unused := ["/".join(path) for path in lora if path[:-1] in self._targets]:
            raise ValueError(_UNUSED.format(unused[0], self.config.variant))
        for path, leaf in params.items():
            if is_packed(value := meta.unbox(leaf)):
                self._targets[path] = leaf
                weight = LowRankWeight(value, letters=string.ascii_lowercase[: value.ndim])
                params[path] = rebox(leaf, weight)
        inner = {"params": traverse_util.unflatten_dict(params | lora | scales)}
        # nn.WeightNorm and nn.SpectralNorm walk over all collections and must not see factors that were
        # merged here.
        kept = {
            name: {p: leaf for p, leaf in _flatten(collections[name]).items() if p not in self._factors}
            for name in COLLECTIONS[1:]
            if name in collections
        }
        return inner | {name: traverse_util.unflatten_dict(flat) for name, flat in kept.items()}

    def leave(self, collections: Mapping[str, Any]) -> dict[str, Any]:
        """The variables as the caller sees them, including new factors; the inverse of `enter`."""
        groups: dict[str, dict[Path, Any]] = {name: {} for name in COLLECTIONS}
        for path, leaf in _flatten(collections.get("params", {})).items():
            # Decided by origin, not by name: a model may have a parameter called lora_a.
            ours = path in self._adapter_paths or isinstance(leaf, FactorBox)
            collection = "params" if not ours else SCALE if path[-1] == SCALE else "lora"
            groups[collection][path] = leaf
        groups["lora"] = self.discovery.choose_layers(groups["lora"])
        for path, leaf in groups["params"].items():
            groups["params"][path] = leaf = self._targets.get(path, leaf)
            if self._rule(path) is not None:
                groups["lora"] |= self._factors_of(path, leaf)
        self.discovery.leaves |= {"/".join(path) for path in groups["params"]}
        for name in COLLECTIONS[1:]:
            groups[name] = _flatten(collections.get(name, {})) | groups[name]
        if self.unboxes:
            groups["lora"] = {
                p: leaf.value if is_box(p, leaf) else leaf for p, leaf in groups["lora"].items()
            }
        return {name: traverse_util.unflatten_dict(flat) for name, flat in groups.items() if flat}

    def check_used(self, own: set[str], called: set[str], *, complete: bool) -> None:
        """Raises ValueError for adapters in the variables that do not belong to this model and config.

        A layer that the call skips may have an adapter, if its weight is in the variables.

        Args:
          own: paths of layers with built-in adapters.
          called: paths of layers that were called.
          complete: whether the call runs the model like `init_lora`, so that `own` has all layers with built-in
            adapters.
        """
        modules = {"/".join(path[:-1]) for path in self._adapter_paths}
        targets = self.config.target_modules
        for rule in () if self.is_bare or isinstance(targets, str) else targets:
            if not any(matches((rule,), module) for module in modules):
                raise ValueError(f"target_modules: {rule!r} matches no adapter in the variables")
        for path in sorted(self._adapter_paths):
            name, module = "/".join(path), "/".join(path[:-1])
            if path[-1] not in _NAMES:
                raise ValueError(
                    f"the variables contain {name!r} among the adapters; names must be one of "
                    f"{', '.join(_NAMES)}"
                )
            is_own = any(f"{module}/".startswith(f"{layer}/") or not layer for layer in own)
            if path[-1] == MAGNITUDE and self.config.variant != "dora" and module in called and not is_own:
                raise ValueError(_UNUSED.format(name, self.config.variant))
            has_weight = self._param_paths & {path[:-1], *((*path[:-1], leaf) for leaf in LEAVES)}
            expected = path in self._factors or path[-1] == SCALE
            expected = expected or (self.config.target_modules and is_target(self.config, module))
            if not has_weight or (not expected and not is_own and (complete or module in called)):
                problem = (
                    "which no rule of the config matches" if has_weight else "where the model has no weight"
                )
                raise ValueError(
                    f"the variables contain an adapter for {module!r}, {problem}; pass adapters of the same model "
                    "and config"
                )

    def _rule(self, path: Path) -> str | None:
        """The rule of `target_parameters` that matches a parameter, or None."""
        return parameter_rule(self.config, "/".join(path)) if self.config.target_parameters else None

    def _adapter(self, path: Path, leaf: Any) -> LayerAdapter:
        """The adapter of a parameter in `target_parameters`."""
        name, rule, value = "/".join(path), self._rule(path), meta.unbox(leaf)
        if not hasattr(value, "shape"):
            raise ValueError(
                f"target_parameters: {rule!r} matches {name!r}, which must be a single array, got a "
                f"{type(value).__name__} of arrays; let the model store each under its own name"
            )
        spec = parameter_spec(self.config, name, str(rule), tuple(value.shape), value.dtype, "")
        return LayerAdapter.of(spec, self.config, f"{name!r} (target_parameters: {rule!r})")

    def _factors_of(self, path: Path, leaf: Any) -> dict[Path, Any]:
        adapter = self._adapter(path, leaf)
        factors = {(*path, name): self._factors.get((*path, name)) for name in adapter.shapes}
        if all(factor is not None for factor in factors.values()):
            return factors
        boxes = new_factors(adapter, self.rng, path, meta.unbox(leaf))
        return {(*path, name): box for name, box in boxes.items()}


def _flatten(tree: Any) -> dict[Path, Any]:
    return dict(traverse_util.flatten_dict(dict(tree), is_leaf=is_box))


def keep_low_rank(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A lifted transform, as that of `nn.jit`: runs `fn` with its `LowRankWeight` variables kept apart."""

    def run(scope_fn: Any, repack: Any, variables: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        def inner(variables: Any) -> Any:
            scope = scope_fn(variables, rngs)
            y = fn(scope, *args, **kwargs)
            return y, repack(scope)

        return call(inner, variables)

    # The layer below nn.jit and nn.remat: it hands over the variables as a tree, before they are a scope. The three
    # filters, one group each, pass all variables in and out and all keys (flax.core.lift, 0.12.8).
    return lift.pack(run, (True,), (True,), (True,), name="low_rank", enable_kwargs=True)
