"""Finds the layers of a model that get adapters, while the model is initialized, and checks the rules."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import meta

from ..adapter.config import ALL_LINEAR, LoRAPlusConfig
from ..adapter.einsum_letters import factor_letters, layer_axis
from ..adapter.spec import check_layers_of
from ..adapter.target_rules import (
    TracedModule,
    check_coverage,
    is_adapted,
    is_target,
    layer_index,
    matching_rule,
)
from .layer_adapter import (
    OURS,
    FactorBox,
    LoRAPlusLayer,
    adapter_of,
    add_factors,
    check_reads_own_weight,
)
from .layer_table import METHODS

_NORMS = (nn.WeightNorm, nn.SpectralNorm)


class Discovery:
    """The modules and parameters found in the calls of one initialization.

    Attributes:
      seen: the traced modules by path.
      leaves: paths of the parameters.
      stacks: number of layers in a stack, by the path of the adapted module; only with `layers_to_transform`.
    """

    def __init__(self, config: LoRAPlusConfig, prefix: tuple[str, ...]) -> None:
        self.config, self.prefix = config, prefix
        self.seen: dict[str, TracedModule] = {}
        self.leaves: set[str] = set()
        self.stacks: dict[str, int] = {}
        self._norms: list[str] = []  # the norms that are currently running

    def intercept(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Runs a method of the model, and makes the layer's factors if a rule matches it."""
        module = context.module
        if isinstance(module, _NORMS):
            self._norms.append(type(module).__name__)
        try:
            y = next_fun(*args, **kwargs)
        finally:
            # The layer runs inside the norm's call, so a norm is running while its layer is inspected.
            if isinstance(module, _NORMS):
                self._norms.pop()
        is_own = isinstance(module, LoRAPlusLayer) or isinstance(module.parent, LoRAPlusLayer)
        if module.scope is not None and module.scope.has_flag(OURS) and not is_own:
            self._inspect(module, context.orig_method.func, args, kwargs)
        return y

    def _inspect(self, module: nn.Module, method: Any, args: Any, kwargs: Any) -> None:
        scope: Any = module.scope
        path = "/".join(module.path[len(self.prefix) :])
        entry = self.seen.setdefault(path, TracedModule(type(module).__name__))
        if method not in METHODS:
            params: Mapping[str, Any] = scope.variables().get("params", {})
            matrices = [name for name, leaf in params.items() if getattr(meta.unbox(leaf), "ndim", 0) >= 2]
            entry.weights = entry.weights or matrices
            return
        entry.adaptable = True
        if not is_target(self.config, path):
            return
        rule = matching_rule(self.config, path)
        try:
            call = METHODS[method](module, *args, **kwargs)
        except ValueError as error:
            if rule == ALL_LINEAR:
                return
            raise ValueError(f"target_modules: {rule!r} matches {path!r}: {error}") from None
        entry.record(call.kind, call.axes, path)
        if not is_adapted(self.config, path, call.kind):  # by exclude_modules
            return
        check_reads_own_weight(
            module,
            f"target_modules: {rule!r} matches {path!r}",
            "name the weight in target_parameters, or the layer in exclude_modules",
        )
        weight = meta.unbox(scope.get_variable("params", call.leaf))
        adapter = adapter_of(self.config, path, call.kind, call.leaf, call.axes, weight.shape, weight.dtype)
        assert adapter is not None
        if self._norms:
            raise ValueError(
                f"target_modules: {rule!r} matches {path!r} inside nn.{self._norms[-1]}, which would also "
                "change the adapter; name the original weight in target_parameters, or the layer in "
                "exclude_modules"
            )
        entry.adapted = True
        add_factors(scope, adapter, "params", weight)

    def choose_layers(self, lora: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
        """Drops new factors of layers outside `layers_to_transform`.

        The number in a module's path is ambiguous during the call: inside stacked layers Flax may have added it
        (`"block/Dense_0"`). In a stack, the factors of the other layers become zero and stay zero, since the
        gradients of a pair of zero factors are zero.
        """
        layers = self.config.layers_to_transform
        if layers is None:
            return dict(lora)
        kept = {}
        for path, box in lora.items():
            module = "/".join(path[:-1])
            if not isinstance(box, FactorBox):
                kept[path] = box
            elif box.stacked:
                check_layers_of(module, box.spec)
                letters = factor_letters(box.spec.axes, box.stacked)[path[-1].endswith("_b")]
                axis = layer_axis(letters, box.stacked)
                self.stacks[module] = size = box.value.shape[axis]
                in_stack = tuple(n for n in layers if n < size)
                mask = jnp.zeros(size, bool).at[jnp.array(in_stack, int)].set(True)
                mask = jnp.expand_dims(mask, [n for n in range(len(letters)) if n != axis])
                kept[path] = box.replace(value=jnp.where(mask, box.value, 0), layers=in_stack)
            elif layer_index(module) in layers:
                kept[path] = box
            elif module in self.seen:
                self.seen[module].adapted = False  # in another layer, or in none
        return kept

    def check(self) -> None:
        """Raises ValueError if a rule matches nothing, or two rules cover one weight."""
        check_coverage(self.config, self.seen, self.leaves, self.stacks)
