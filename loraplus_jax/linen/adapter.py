"""The adapter of one Linen layer: its factors, made and read, and its low-rank term in a call."""

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

from ..config import ALL_LINEAR, Init, LoRAPlusConfig
from ..dataflow import mark_weight
from ..inits import factor_inits
from ..lora import PREVIOUS_FACTORS, SCALE, TAP, inject_gradient, update_squares
from ..rules import is_adapted, is_target, matching_rule
from ..spec import AdapterSpec
from .layer_table import LayerCall, layer_call

OURS = "lora_plus"
"""A flag on the scopes of a wrapped model, which a module that it runs by its own `.apply` or `.init` lacks."""


class Mode(enum.Enum):
    """What a model is run for.

    Attributes:
      PLAIN: its outputs; new factors are bare arrays.
      BOXED: the same, and new factors come as `FactorBox`, from which `init_lora` reads the specs.
      LOW_RANK_ONLY: adapted layers return their low-rank term only, and `mark_weight` of the weight left out.
    """

    PLAIN = enum.auto()
    BOXED = enum.auto()
    LOW_RANK_ONLY = enum.auto()


@dataclasses.dataclass(frozen=True)
class Tracing:
    """A mode, and what the initializations in it have met, for whoever began it."""

    mode: Mode
    discoveries: list[Any] = dataclasses.field(default_factory=list, compare=False)


# A context that nn.jit and jax.jit heed: they keep no trace across it.
_TRACING: Any = jax.make_user_context(Tracing(Mode.PLAIN))


def mode() -> Mode:
    """The mode here."""
    return _TRACING.value.mode


@contextlib.contextmanager
def run_in(new: Mode) -> Iterator[list[Any]]:
    """Runs what is inside in a mode; gives the list of `Discovery`, one a wrapped model, that fills there."""
    outer = _TRACING.value
    discoveries = [] if outer.mode is Mode.PLAIN else outer.discoveries
    with _TRACING(Tracing(new, discoveries)):
        yield discoveries


def record_discovery(discovery: Any) -> None:
    """Adds to the list of the outermost `run_in`."""
    if discovery not in _TRACING.value.discoveries and mode() is not Mode.PLAIN:
        _TRACING.value.discoveries.append(discovery)


class FactorBox(struct.PyTreeNode, meta.AxisMetadata):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A new factor with its layer's spec; `nn.scan` and `nn.vmap` report the axes that they add.

    Flax's own metadata protocol: the only place where a stacked axis can be told from one of the layer's.

    Attributes:
      value: the factor.
      spec: of one layer of the stack, its leaf's path relative to the module's.
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
        """The same knowledge about another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "FactorBox":
        """Called by `nn.scan` and `nn.vmap` on the way out."""
        return self.replace(stacked=(*self.stacked, index))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "FactorBox":
        """Called by `nn.scan` and `nn.vmap` on the way in."""
        return self.replace(stacked=self.stacked[:-1])


def is_box(_: Any, value: Any) -> bool:
    """For `flax.traverse_util.flatten_dict`: a box is a leaf."""
    return isinstance(value, FactorBox)


class Adapter(NamedTuple):
    """What one adapter is made with: rank r, scale s, initial values and dropout, as in `LoRAPlusConfig`."""

    rank: int
    scale: float
    init: Init = "lora"
    dropout: float = 0.0


class LoRAPlusLayer(nn.Module):
    """What the layers of `layers.py` share: the fields of their adapter, and that they bring it themselves.

    Attributes:
      rank, alpha, dropout, use_rslora: as in `LoRAPlusConfig`.
      init_factors: its `init`.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    init_factors: Init = "lora"
    use_rslora: bool = False


def is_own(module: nn.Module) -> bool:
    """Whether a module brings an adapter of its own, or is a part of one that does."""
    return isinstance(module, LoRAPlusLayer) or isinstance(module.parent, LoRAPlusLayer)


def adapter_at(config: LoRAPlusConfig, path: str) -> Adapter:
    """The adapter that a config gives a layer."""
    return Adapter(config.rank_of(path), config.scale_of(path), config.init, config.dropout)


def place(config: LoRAPlusConfig, path: str) -> str:
    """A layer and the rule that names it, for messages."""
    return f"{path or 'the model'!r} (target_modules: {matching_rule(config, path)!r})"


def named_call(
    config: LoRAPlusConfig,
    module: nn.Module,
    method: Any,
    path: str | None,
    args: Any,
    kwargs: Any,
    *,
    excluded: bool = False,
) -> LayerCall | None:
    """What a call of a layer says of it, if the config names the layer; a path of None is named by any.

    Args:
      config: the rules.
      module, method, args, kwargs: the call of a layer that can be adapted.
      path: the module's.
      excluded: whether a layer that `exclude_modules` leaves out counts as named.

    Raises:
      ValueError: a rule other than `"all-linear"` names an Einsum that no adapter can follow.
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
    spec: AdapterSpec, init: Init, rng: LazyRng, names: tuple[str, ...], dtype: Any, where: str
) -> dict[str, FactorBox]:
    """Initial factors by name.

    Args:
      spec: of a layer without stacked axes, or of a parameter.
      init: as in `LoRAPlusConfig`.
      rng: the key of the scope, and `names` the path within it. The key goes by the factor's name: `make_rng` would
        advance the counter that the layer's own parameters draw from, and under `nn.scan`, which traces twice, the
        base would start elsewhere than without adapters.
      dtype: of the factors.
      where: the layer, for messages.

    Raises:
      ValueError: the rank is above one of the sides.
    """
    if spec.rank > min(spec.sides):
        raise ValueError(
            f"rank {spec.rank} is above min(in, out) = {min(spec.sides)} of {where}, a weight of shape "
            f"{spec.shape} with the sides {spec.sides}"
        )
    inits: Any = factor_inits(init, spec.rank, spec.axes)
    return {
        name: FactorBox(make(LazyRng.create(rng, *names, name).as_jax_rng(), shape, dtype), spec)
        for name, make, shape in zip(spec.factors, inits, spec.factor_shapes, strict=True)
    }


def read_factors(spec: AdapterSpec, get: Callable[[str], Any], where: str) -> tuple[jax.Array, jax.Array]:
    """A and B, checked against the spec; `get` gives a factor by its name, or None.

    Raises:
      ValueError: a factor is missing or has another shape.
    """
    factors = []
    for name, shape in zip(spec.factors, spec.factor_shapes, strict=True):
        value = meta.unbox(get(name))
        if value is None:
            raise ValueError(
                f"the variables hold no adapter for {where}: pass 'lora' from init_lora beside 'params'"
            )
        if value.shape != shape:
            raise ValueError(f"{name} of {where} has shape {value.shape}, the config asks for {shape}")
        factors.append(value)
    return factors[0], factors[1]


def make_factors(module: nn.Module, call: LayerCall, adapter: Adapter, collection: str, where: str) -> None:
    """Puts a layer's initial factors into its scope, in the layer's `param_dtype`, unless they are there."""
    scope: Any = module.scope
    spec = call.spec(adapter.rank, adapter.scale)
    # An Embed's lookup and its attend share their factors, and so do all uses of a shared layer.
    if scope.has_variable(collection, spec.factors[0]):
        return
    dtype = module.param_dtype  # pyright: ignore[reportAttributeAccessIssue]
    for name, box in new_factors(spec, adapter.init, scope.rngs["params"], (), dtype, where).items():
        # Not scope.variable: it reserves the name.
        scope.put_variable(collection, name, box if mode() is not Mode.PLAIN else box.value)


def add_low_rank_term(
    y: jax.Array, module: nn.Module, call: LayerCall, adapter: Adapter, collection: str, where: str
) -> jax.Array:
    """A layer's output `y` plus s (dropout(x) A) B in the dtype of `y`, computed in the layer's `dtype`.

    Args:
      y: what the layer gave.
      module, call: the layer, and what this call says of it.
      adapter: its adapter.
      collection: where its factors are.
      where: the layer, for messages.
    """
    scope: Any = module.scope
    get = lambda name: scope.get_variable(collection, name)  # noqa: E731
    a, b = read_factors(call.spec(adapter.rank, adapter.scale), get, where)
    x = call.inputs
    if adapter.dropout and jnp.issubdtype(x.dtype, jnp.floating) and module.has_rng("dropout"):
        dropout: Any = nn.Dropout(adapter.dropout, deterministic=False, parent=None)
        x = dropout.apply({}, x, rngs={"dropout": module.make_rng("dropout")})
    scale = scope.get_variable("params" if collection == "params" else SCALE, SCALE, adapter.scale)
    scale = jnp.reshape(scale, ()) if isinstance(scale, jax.Array) else scale
    term = call.term(x, a, b, scale)
    if scope.has_variable(collection, TAP):  # a step is being measured, see theory.py
        tap, *before = map(get, (TAP, *PREVIOUS_FACTORS))
        batch_axes = sum(role not in "io" for role in call.axes)
        inputs = jax.lax.stop_gradient(x)
        squares = update_squares(call.term, inputs, (before[0], before[1]), (a, b), scale, batch_axes)
        term = inject_gradient(term, tap, squares.reshape(tap.shape))
    term = term.astype(y.dtype)
    if mode() is Mode.LOW_RANK_ONLY:
        return term + mark_weight(meta.unbox(scope.get_variable("params", call.leaf))).astype(y.dtype)
    return y + term
