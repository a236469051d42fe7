"""Which layers of a model get an adapter: found while the model is initialized, and checked against the rules."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import meta

from ..config import LoRAPlusConfig
from ..rules import TracedModule, check_coverage, is_adapted, is_target, layer_index, matching_rule
from ..spec import factor_letters, layer_axis
from .adapter import OURS, FactorBox, adapter_at, is_own, make_factors, named_call, place
from .layer_table import can_adapt

_NORMS = (nn.WeightNorm, nn.SpectralNorm)


class Discovery:
    """What is met in the calls of one initialization.

    Attributes:
      seen: module path to what was met there.
      leaves: paths of the parameters.
      stacks: path of an adapted module to the number of its layers, where they are stacked and only some are meant.
    """

    def __init__(self, config: LoRAPlusConfig, prefix: tuple[str, ...]) -> None:
        self.config, self.prefix = config, prefix
        self.seen: dict[str, TracedModule] = {}
        self.leaves: set[str] = set()
        self.stacks: dict[str, int] = {}
        self._norms: list[str] = []  # those that are running

    def intercept(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Runs a method of the model, and makes the factors of a layer that a rule names."""
        module = context.module
        if isinstance(module, _NORMS):
            self._norms.append(type(module).__name__)
        try:
            y = next_fun(*args, **kwargs)
        finally:
            if isinstance(module, _NORMS):
                self._norms.pop()
        if module.scope is not None and module.scope.has_flag(OURS) and not is_own(module):
            self._note(module, context.orig_method.func, args, kwargs)
        return y

    def _note(self, module: nn.Module, method: Any, args: Any, kwargs: Any) -> None:
        path = "/".join(module.path[len(self.prefix) :])
        entry = self.seen.setdefault(path, TracedModule(type(module).__name__))
        if not can_adapt(method):
            own: Mapping[str, Any] = module.scope.variables().get("params", {})  # pyright: ignore
            matrices = [name for name, leaf in own.items() if getattr(meta.unbox(leaf), "ndim", 0) >= 2]
            entry.weights = entry.weights or matrices
            return
        entry.adaptable = True
        if not is_target(self.config, path):
            return
        call = named_call(self.config, module, method, path, args, kwargs, excluded=True)
        if call is None:
            return
        entry.note(call.kind, call.axes, path)
        if not is_adapted(self.config, path, call.kind):
            return
        if self._norms:
            raise ValueError(
                f"{path!r} has its weight from nn.{self._norms[-1]}, which changes whatever the layer has, an "
                f"adapter too (target_modules: {matching_rule(self.config, path)!r}): name the weight that it "
                "starts from in target_parameters, or leave the layer out by exclude_modules"
            )
        entry.adapted = True
        make_factors(module, call, adapter_at(self.config, path), "params", place(self.config, path))

    def choose_layers(self, lora: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
        """New factors without those of layers that are not among `layers_to_transform`.

        The number in a module's path does not tell while it is called: it may be one that Flax gave
        (`"block/Dense_0"`) inside of stacked layers. In a stack the factors of the others are zero, and no gradient
        moves a pair of zero factors.
        """
        chosen = self.config.layers_to_transform
        if chosen is None:
            return dict(lora)
        kept = {}
        for path, box in lora.items():
            module = "/".join(path[:-1])
            if not isinstance(box, FactorBox):
                kept[path] = box
            elif box.stacked:
                letters = factor_letters(box.spec.axes, box.stacked)[path[-1].endswith("_b")]
                axis = layer_axis(letters, box.stacked)
                self.stacks[module] = size = box.value.shape[axis]
                here = tuple(n for n in chosen if n < size)
                mask = jnp.zeros(size, bool).at[jnp.array(here, int)].set(True)
                mask = jnp.expand_dims(mask, [n for n in range(len(letters)) if n != axis])
                kept[path] = box.replace(value=jnp.where(mask, box.value, 0), layers=here)
            elif layer_index(module) in chosen:
                kept[path] = box
            elif module in self.seen:
                self.seen[module].adapted = False  # it is in another layer, or in none
        return kept

    def check(self) -> None:
        """Raises ValueError for a rule that matched nothing, or for a weight that two rules cover."""
        check_coverage(self.config, self.seen, self.leaves, self.stacks)
