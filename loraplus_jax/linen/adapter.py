"""The adapter of one Linen layer: makes and reads its factors, and adds its low-rank term to a call."""

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from flax.core.scope import LazyRng

from ..adapter.config import ALL_LINEAR, Init, LoRAPlusConfig, Variant
from ..adapter.dora import output_norms
from ..adapter.lora import SCALE
from ..adapter.rules import is_adapted, is_target, matching_rule
from ..adapter.spec import MAGNITUDE, AdapterSpec, check_rank
from ..adapter.taps import PREVIOUS_FACTORS, TAP
from ..inits.random import factor_inits
from ..interpreter.dataflow import mark_weight
from ..interpreter.low_rank import LowRankWeight
from .layer_table import LayerCall, layer_call

OURS = "lora_plus"
"""A flag on a wrapped model's scopes; modules that the model runs with their own `.apply` or `.init` lack it."""


class Mode(enum.Enum):
    """How a model runs.

    Attributes:
      PLAIN: normally; new factors are bare arrays.
      BOXED: normally, but new factors are `FactorBox` objects, from which `init_lora` reads the specs.
      LOW_RANK_ONLY: adapted layers return only their low-rank term, and `mark_weight` of the omitted weight.
    """

    PLAIN = enum.auto()
    BOXED = enum.auto()
    LOW_RANK_ONLY = enum.auto()


@dataclasses.dataclass(frozen=True)
class Tracing:
    """A mode, and the discoveries of the initializations in it."""

    mode: Mode
    discoveries: list[Any] = dataclasses.field(default_factory=list, compare=False)


# A context that nn.jit and jax.jit respect: they do not reuse a trace from another context.
_TRACING: Any = jax.make_user_context(Tracing(Mode.PLAIN))


def mode() -> Mode:
    """The current mode."""
    return _TRACING.value.mode


@contextlib.contextmanager
def run_in(new: Mode) -> Iterator[list[Any]]:
    """Runs the block in a mode; yields a list that collects the `Discovery` of each wrapped model."""
    outer = _TRACING.value
    discoveries = [] if outer.mode is Mode.PLAIN else outer.discoveries
    with _TRACING(Tracing(new, discoveries)):
        yield discoveries


def record_discovery(discovery: Any) -> None:
    """Adds a discovery to the list of the outermost `run_in`."""
    if discovery not in _TRACING.value.discoveries and mode() is not Mode.PLAIN:
        _TRACING.value.discoveries.append(discovery)


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
    """Whether a value is a box; an `is_leaf` for `flax.traverse_util.flatten_dict`."""
    return isinstance(value, FactorBox)


class Adapter(NamedTuple):
    """The settings of one adapter: rank, scale, initialization, dropout rate, and whether it is of variant dora."""

    rank: int
    scale: float
    init: Init = "lora"
    dropout: float = 0.0
    magnitude: bool = False


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


def has_own_adapter(module: nn.Module) -> bool:
    """Whether a module has a built-in adapter, or is a submodule of one that does."""
    return isinstance(module, LoRAPlusLayer) or isinstance(module.parent, LoRAPlusLayer)


def adapter_at(config: LoRAPlusConfig, path: str) -> Adapter:
    """The adapter settings of a config for a layer."""
    rank, scale = config.rank_of(path), config.scale_of(path)
    return Adapter(rank, scale, config.init, config.dropout, config.variant == "dora")


def place(config: LoRAPlusConfig, path: str) -> str:
    """Formats a layer and the rule that matches it, for messages."""
    return f"{path or 'the model'!r} (target_modules: {matching_rule(config, path)!r})"


def targeted_call(
    config: LoRAPlusConfig,
    module: nn.Module,
    method: Any,
    path: str | None,
    args: Any,
    kwargs: Any,
    *,
    excluded: bool = False,
) -> LayerCall | None:
    """Describes a call of a layer if the config adapts the layer; otherwise returns None.

    Args:
      config: the rules.
      module, method, args, kwargs: the call of a supported layer.
      path: path of the module; None matches every rule.
      excluded: whether to include layers in `exclude_modules`.

    Raises:
      ValueError: a rule other than `"all-linear"` matches an Einsum that cannot be adapted.
    """
    if path is not None and not is_target(config, path):
        return None
    try:
        call = layer_call(method, module, args, kwargs)
    except ValueError as error:
        if path is None or config.target_modules == ALL_LINEAR:
            return None
        rule = matching_rule(config, path)
        raise ValueError(f"target_modules: {rule!r} matches {path!r}: {error}") from None
    return call if path is None or excluded or is_adapted(config, path, call.kind) else None


def new_factors(
    spec: AdapterSpec, init: Init, rng: LazyRng, names: tuple[str, ...], weight: jax.Array, where: str
) -> dict[str, FactorBox]:
    """Makes initial factors, by name.

    Args:
      spec: spec of a layer without stacked axes, or of a parameter.
      init: as in `LoRAPlusConfig`.
      rng: key of the scope; `names` is the path within it. Each factor's key is derived from its name. `make_rng`
        would advance the counter for the layer's own parameters, and under `nn.scan`, which traces twice, the base
        would be initialized differently than without adapters.
      weight: the weight, whose dtype the factors get (float32 if it holds integers), and whose norms the
        magnitudes.
      where: description of the layer, for messages.

    Raises:
      ValueError: the rank is above the input size or the output size.
    """
    check_rank(spec, where)
    inits: Any = factor_inits(init, spec.rank, spec.axes)
    dtype = weight.dtype if jnp.issubdtype(weight.dtype, jnp.floating) else jnp.float32
    factors = {
        name: make(LazyRng.create(rng, *names, name).as_jax_rng(), shape, dtype)
        for name, make, shape in zip(spec.factors, inits, spec.factor_shapes, strict=False)
    }
    if spec.magnitude:
        factors[MAGNITUDE] = output_norms(weight, spec.base_letters, spec.factor_letters)
    return {name: FactorBox(value, spec) for name, value in factors.items()}


def read_factors(spec: AdapterSpec, get: Callable[[str], Any], where: str) -> list[jax.Array]:
    """Reads A, B and, if the spec has them, magnitudes, and checks their shapes.

    `get` returns a factor by name, or None.

    Raises:
      ValueError: a factor is missing or has another shape.
    """
    factors = []
    for name, shape in zip(spec.factors, spec.factor_shapes, strict=True):
        value = meta.unbox(get(name))
        if value is None:
            raise ValueError(
                f"the variables contain no adapter for {where}; pass 'lora' from init_lora with 'params'"
            )
        if value.shape != shape:
            raise ValueError(f"{name} of {where} must have shape {shape} for this config, got {value.shape}")
        factors.append(value)
    return factors


def make_factors(module: nn.Module, call: LayerCall, adapter: Adapter, collection: str, where: str) -> None:
    """Adds a layer's initial factors to its scope unless they exist."""
    scope: Any = module.scope
    spec = call.spec(adapter.rank, adapter.scale, magnitude=adapter.magnitude)
    # The factors exist if an Embed's lookup and attend share them, or if the layer is called again.
    if scope.has_variable(collection, spec.factors[0]):
        return
    weight = meta.unbox(scope.get_variable("params", call.leaf))
    for name, box in new_factors(spec, adapter.init, scope.rngs["params"], (), weight, where).items():
        # Not scope.variable, which reserves the name.
        scope.put_variable(collection, name, box if mode() is not Mode.PLAIN else box.value)


def add_low_rank_term(
    y: jax.Array, module: nn.Module, call: LayerCall, adapter: Adapter, collection: str, where: str
) -> jax.Array:
    """Adds s (dropout(x) A) B, computed in the layer's `dtype`, to a layer's output `y` and keeps its dtype.

    With magnitudes, multiplies all but the bias by DoRA's factor.

    Args:
      y: output of the layer.
      module, call: the layer and the description of this call.
      adapter: settings of its adapter.
      collection: collection of its factors.
      where: description of the layer, for messages.
    """
    scope: Any = module.scope
    get = lambda name: scope.get_variable(collection, name)  # noqa: E731
    spec = call.spec(adapter.rank, adapter.scale, magnitude=adapter.magnitude)
    a, b, *magnitude = read_factors(spec, get, where)
    scale = scope.get_variable("params" if collection == "params" else SCALE, SCALE, adapter.scale)
    tap, *before = map(get, (TAP, *PREVIOUS_FACTORS))
    weight = LowRankWeight(
        w=meta.unbox(scope.get_variable("params", call.leaf)),
        a=a,
        b=b,
        letters=spec.base_letters,
        factor_letters=spec.factor_letters,
        scale=jnp.reshape(scale, ()) if isinstance(scale, jax.Array) else scale,
        dropout=adapter.dropout,
        key=module.make_rng("dropout") if adapter.dropout and module.has_rng("dropout") else None,
        tap=tap,
        before=before,
        omit=mode() is Mode.LOW_RANK_ONLY,
    ).with_magnitude(*magnitude)
    x = call.inputs
    if weight.c is not None and call.product is not None:  # its outputs are the inputs of the weight
        x = weight.scale_outputs(x)
        y = call.product(x)
    term = weight.low_rank_term(call.term, x).astype(y.dtype)
    if weight.omit:
        return term + mark_weight(weight.w).astype(y.dtype)
    if call.product is not None:
        return y + term
    has_bias = getattr(module, "use_bias", False)
    bias = meta.unbox(scope.get_variable("params", "bias")) if has_bias else None
    return weight.scale_outputs(y + term, call.result, bias)
