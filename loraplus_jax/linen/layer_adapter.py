"""The adapter of one Linen layer: makes and reads its factors, and adds its low-rank term to a call."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from flax.core.scope import LazyRng

from ..adapter.config import Init, LoRAPlusConfig, Variant
from ..adapter.dora import output_norms
from ..adapter.lora import SCALE
from ..adapter.spec import MAGNITUDE, AdapterSpec, check_floating_weight, check_rank
from ..adapter.taps import PREVIOUS_FACTORS, TAP
from ..adapter.target_rules import is_adapted, is_target, matching_rule
from ..inits.random import factor_dtype, factor_inits
from ..interpreter.dataflow import mark_weight
from ..interpreter.weight import LowRankWeight
from .layer_table import LayerCall

OURS = "lora_plus"
"""A flag on a wrapped model's scopes; modules that the model runs with their own `.apply` or `.init` lack it."""


@dataclasses.dataclass(frozen=True)
class Tracing:
    """How a model runs.

    Attributes:
      boxed: whether new factors are `FactorBox` objects, from which `init_lora` reads the specs, or bare arrays.
      low_rank_only: whether adapted layers return only their low-rank term, and `mark_weight` of their weight.
      discoveries: collects the `Discovery` of each wrapped model that is initialized; None: not collected.
    """

    boxed: bool = False
    low_rank_only: bool = False
    discoveries: list[Any] | None = dataclasses.field(default=None, compare=False)


# Not a global variable or a ContextVar: nn.jit and jax.jit would reuse a trace of another value. Of a user context
# jit's caches have the value in their keys (jax 0.10.2).
TRACING: Any = jax.make_user_context(Tracing())


class FactorBox(struct.PyTreeNode, meta.AxisMetadata):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A new factor with its layer's spec; records the axes that `nn.scan` and `nn.vmap` add.

    This uses Flax's metadata protocol, the only way to distinguish stacked axes from those of the layer.

    Attributes:
      value: the factor.
      spec: spec of one layer of the stack, with the leaf's path relative to the module.
      stacked, layers: as in `AdapterSpec`.
    """

    value: Any
    spec: AdapterSpec = struct.field(pytree_node=False)
    stacked: tuple[int, ...] = struct.field(pytree_node=False, default=())
    layers: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

    def unbox(self) -> Any:
        """The bare factor."""
        return self.value

    def replace_boxed(self, val: Any) -> "FactorBox":
        """The box with another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "FactorBox":
        """Records an axis that `nn.scan` or `nn.vmap` adds on the way out."""
        return self.replace(stacked=(*self.stacked, index))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "FactorBox":
        """Drops an axis that `nn.scan` or `nn.vmap` removes on the way in."""
        return self.replace(stacked=self.stacked[:-1])


def is_box(_: Any, value: Any) -> bool:
    """Whether a value is a `FactorBox`; an `is_leaf` for `flax.traverse_util.flatten_dict`."""
    return isinstance(value, FactorBox)


class LoRAPlusLayer(nn.Module):
    """Base class of the layers with built-in adapters in `layers.py`.

    Attributes:
      rank, alpha, dropout, use_rslora, variant: as in `LoRAPlusConfig`.
      init_factors: `init` in `LoRAPlusConfig`.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    init_factors: Init = "lora"
    use_rslora: bool = False
    variant: Variant = "lora"


class LayerAdapter(NamedTuple):
    """The adapter of a layer or parameter: what every call reads of it, computed once.

    Attributes:
      spec: its spec without stacked axes, with the leaf's path relative to the module.
      shapes: the shapes of A, B and, if there are any, magnitudes, by name.
      letters, factor_letters: `base_letters` and `factor_letters` of the spec.
      config: the config that it is from.
      where: description of the layer, for messages.
    """

    spec: AdapterSpec
    shapes: Mapping[str, tuple[int, ...]]
    letters: str
    factor_letters: tuple[str, str]
    config: LoRAPlusConfig
    where: str

    @classmethod
    def of(cls, spec: AdapterSpec, config: LoRAPlusConfig, where: str) -> "LayerAdapter":
        """The adapter with this spec."""
        shapes = dict(zip(spec.factors, spec.factor_shapes, strict=True))
        return cls(spec, shapes, spec.base_letters, spec.factor_letters, config, where)


def check_reads_own_weight(module: nn.Module, where: str, advice: str) -> None:
    """Raises ValueError if a layer's class may use another weight than its parameter, such as a normalized one."""
    layer, problem = type(module), ""
    if layer.param is not nn.Module.param:
        problem = "overrides param"
    elif isinstance(module, nn.Embed) and layer.setup is not nn.Embed.setup:
        scope: Any = module.scope
        if module.embedding is not meta.unbox(scope.get_variable("params", "embedding")):
            problem = "changes its embedding in setup"
    if problem:
        raise ValueError(
            f"{where}, whose class {layer.__name__} {problem}, so that the layer may use another weight than its "
            f"variables hold; {advice}"
        )


# A model is traced many times, and a config and its regular expressions are the same each time.
@functools.lru_cache(maxsize=4096)
def adapter_of(
    config: LoRAPlusConfig,
    path: str | None,
    kind: str,
    leaf: str,
    axes: str,
    shape: tuple[int, ...],
    dtype: Any,
) -> LayerAdapter | None:
    """Makes the adapter of a layer by the rules of a config.

    Args:
      config: the rules.
      path: path of the layer; None matches every rule.
      kind, leaf, axes: as in `LayerCall`.
      shape: shape of the weight in the call, without stacked axes.
      dtype: its dtype.

    Returns:
      The adapter, or None if the config does not adapt the layer.

    Raises:
      ValueError: the dtype is an integer.
    """
    where = "a layer that the model runs with its own apply"
    if path is not None:
        if not is_target(config, path) or not is_adapted(config, path, kind):
            return None
        where = f"{path or 'the model'!r} (target_modules: {matching_rule(config, path)!r})"
    check_floating_weight(f"the {leaf} of {where}", dtype)
    spec = AdapterSpec(
        leaf=leaf,
        kind=kind,
        axes=axes,
        shape=shape,
        rank=config.rank_of(path or ""),
        scale=config.scale_of(path or ""),
        magnitude=config.variant == "dora",
    )
    return LayerAdapter.of(spec, config, where)


def new_factors(
    adapter: LayerAdapter, rng: LazyRng, names: tuple[str, ...], weight: jax.Array
) -> dict[str, FactorBox]:
    """Makes initial factors; raises ValueError if the rank is above the input size or the output size.

    Args:
      adapter: the adapter.
      rng: key of the scope; `names` is the path within it.
      weight: the weight, which determines the dtype by `factor_dtype`, and whose norms are the magnitudes.

    Returns:
      A dict from the name to the box of A, B and, if there are any, magnitudes, in the adapter's shapes.
    """
    spec = adapter.spec
    check_rank(spec, adapter.where)
    inits: Any = factor_inits(adapter.config.init, spec.rank, spec.axes)
    # Keys by name. make_rng would advance the counter for the layer's own parameters: under nn.scan, which traces
    # twice, the base would be initialized differently than without adapters.
    factors = {
        name: make(LazyRng.create(rng, *names, name).as_jax_rng(), shape, factor_dtype(weight))
        for (name, shape), make in zip(adapter.shapes.items(), inits, strict=False)
    }
    if spec.magnitude:
        factors[MAGNITUDE] = output_norms(weight, adapter.letters, adapter.factor_letters)
    return {name: FactorBox(value, spec) for name, value in factors.items()}


def get_factors(adapter: LayerAdapter, get: Callable[[str], Any]) -> list[jax.Array]:
    """Reads A, B and, if the adapter has them, magnitudes; `get` returns a factor by name, or None.

    Returns:
      The arrays in this order, without boxes, in the adapter's shapes.

    Raises:
      ValueError: a factor is missing or has another shape.
    """
    factors = []
    for name, shape in adapter.shapes.items():
        value = meta.unbox(get(name))
        if value is None:
            raise ValueError(
                f"the variables contain no adapter for {adapter.where}; pass 'lora' from init_lora with 'params'"
            )
        if value.shape != shape:
            raise ValueError(
                f"{name} of {adapter.where} must have shape {shape} for this config, got {value.shape}"
            )
        factors.append(value)
    return factors


def add_factors(scope: Any, adapter: LayerAdapter, collection: str, weight: jax.Array) -> None:
    """Adds a layer's initial factors to its scope unless they exist."""
    # They do if an Embed's lookup and attend share them, or if the layer is called again.
    if not any(scope.has_variable(collection, name) for name in adapter.shapes):
        for name, box in new_factors(adapter, scope.rngs["params"], (), weight).items():
            # Not scope.variable, which reserves the name.
            scope.put_variable(collection, name, box if TRACING.value.boxed else box.value)


def add_low_rank_term(
    y: jax.Array, module: nn.Module, call: LayerCall, adapter: LayerAdapter, collection: str, w: jax.Array
) -> jax.Array:
    """Adds s (dropout(x) A) B, computed in the layer's `dtype`, to a layer's output `y`.

    With magnitudes, multiplies all but the bias by DoRA's factor.

    Args:
      y: output of the layer.
      module, call: the layer and the description of this call.
      adapter: its adapter.
      collection: collection of its factors.
      w: its weight.

    Returns:
      An array of the shape and dtype of `y`; with `Tracing.low_rank_only`, the term alone and the weight's mark.
    """
    scope: Any = module.scope
    get = functools.partial(scope.get_variable, collection)
    a, b, *magnitude = get_factors(adapter, get)
    scale = scope.get_variable("params" if collection == "params" else SCALE, SCALE, adapter.spec.scale)
    dropout = adapter.config.dropout
    weight = LowRankWeight(
        w=w,
        a=a,
        b=b,
        letters=adapter.letters,
        factor_letters=adapter.factor_letters,
        # Stacked like the layers: in a call the axes that nn.scan or nn.vmap left have size 1.
        scale=jnp.reshape(scale, ()) if isinstance(scale, jax.Array) else scale,
        dropout=dropout,
        key=module.make_rng("dropout") if dropout and module.has_rng("dropout") else None,
        tap=get(TAP),
        before=[get(name) for name in PREVIOUS_FACTORS],
        omit=TRACING.value.low_rank_only,
    )
    # Factors wider than the layer's products would widen its inputs too.
    dtype = y.dtype if jnp.issubdtype(y.dtype, jnp.inexact) else a.dtype
    x = call.inputs
    if magnitude and not weight.omit:
        weight = weight.with_magnitude(*magnitude)
        if call.product is not None and weight.c is not None:  # c scales the inputs of this product
            x = weight.scale_outputs(x)
            y = call.product(x)
    run_term = lambda x, a, b, s: call.term(x, a.astype(dtype), b.astype(dtype), s)  # noqa: E731
    term = weight.low_rank_term(run_term, x).astype(y.dtype)
    if weight.omit:
        return term + mark_weight(w).astype(y.dtype)
    if weight.c is None or call.product is not None:
        return y + term
    has_bias = getattr(module, "use_bias", False)
    bias = meta.unbox(scope.get_variable("params", "bias")) if has_bias else None
    return weight.scale_outputs(y + term, call.result, bias)
