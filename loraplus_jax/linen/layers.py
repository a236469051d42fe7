"""Linen layers with an adapter of their own, and the adapter itself as every Linen layer uses it."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from flax.core.scope import LazyRng

from ..config import Init, LoRAPlusConfig
from ..inits import factor_inits
from ..lora import PREVIOUS_FACTORS, SCALE, TAP, inject_gradient, update_squares
from ..spec import AdapterSpec
from ..tree import FACTORS
from .dataflow import mark_weight
from .layer_table import Layer, layer_of

_BOXED: Any = jax.make_user_context(
    False
)  # a context that nn.jit and jax.jit heed: they keep no trace across it
_ALONE: Any = jax.make_user_context(False)


class FactorBox(struct.PyTreeNode, meta.AxisMetadata):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A new factor with what its layer knows of it; `nn.scan` and `nn.vmap` report the axes that they add.

    Flax's own metadata protocol: the only place where a stacked axis can be told from one of the layer's.
    """

    value: Any
    kind: str = struct.field(pytree_node=False)
    leaf: str = struct.field(pytree_node=False)
    axes: str = struct.field(pytree_node=False)
    rank: int = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False)
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


@contextlib.contextmanager
def box_new_factors() -> Iterator[None]:
    """Inside, new factors come as `FactorBox`es, from which `init_lora` reads the specs."""
    with _BOXED(True):
        yield


def boxes_factors() -> bool:
    """Whether new factors come as `FactorBox`es here."""
    return _BOXED.value


@contextlib.contextmanager
def low_rank_terms_only() -> Iterator[None]:
    """Inside, adapted layers return only their low-rank term, and `mark_weight` the weight that they leave out."""
    with _ALONE(True):
        yield


def is_low_rank_only() -> bool:
    """Whether terms stand alone here."""
    return _ALONE.value


def is_box(_: Any, value: Any) -> bool:
    """For `flax.traverse_util.flatten_dict`: a box is a leaf."""
    return isinstance(value, FactorBox)


class Adapter(NamedTuple):
    """What one adapter is made with: rank r, scale s, initial values and dropout, as in `LoRAPlusConfig`."""

    rank: int
    scale: float
    init: Init = "lora"
    dropout: float = 0.0


def add_adapter_term(
    y: jax.Array, module: nn.Module, layer: Layer, adapter: Adapter, *, collection: str, where: str
) -> jax.Array:
    """A layer's output `y` plus its adapter's term, in the dtype of `y`; the rest is as in `adapter_term`."""
    term = adapter_term(module, layer, adapter, collection=collection, where=where).astype(y.dtype)
    if not is_low_rank_only():
        return y + term
    assert module.scope is not None
    return term + mark_weight(meta.unbox(module.scope.get_variable("params", layer.leaf))).astype(y.dtype)


def adapter_term(
    module: nn.Module, layer: Layer, adapter: Adapter, *, collection: str, where: str
) -> jax.Array:
    """The adapter's term for one call of a layer, its factors living in `collection`.

    Created on first use with the layer's `param_dtype`, computed in the layer's `dtype` as Flax promotes it.
    `where` names the layer in messages.
    """
    a, b = (_factor(module, layer, adapter, name, collection, where) for name in FACTORS)
    x = layer.inputs
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = apply_dropout(module, x, adapter.dropout)
    scale = _scale(module, "params" if collection == "params" else SCALE, adapter.scale)
    y = layer.term(x, a, b, scale)
    assert module.scope is not None
    if not module.scope.has_variable(collection, TAP):
        return y
    tap, *before = (module.scope.get_variable(collection, name) for name in (TAP, *PREVIOUS_FACTORS.values()))
    inputs = jax.lax.stop_gradient(x)
    batch_axes = sum(role not in "io" for role in layer.axes)
    found = update_squares(layer.term, inputs, tuple(before), (a, b), scale, batch_axes)
    return inject_gradient(y, tap, found.reshape(tap.shape))


def _factor(
    module: nn.Module, layer: Layer, adapter: Adapter, name: str, collection: str, where: str
) -> jax.Array:
    scope, rank = module.scope, adapter.rank
    assert scope is not None
    known = {"kind": layer.kind, "leaf": layer.leaf, "axes": layer.axes, "rank": rank, "scale": adapter.scale}
    spec = AdapterSpec(shape=layer.shape, **known)
    side = list(FACTORS).index(name)
    shape = spec.factor_shapes[side]

    def create() -> Any:
        if rank > min(layer.sides):
            raise ValueError(
                f"rank {rank} is above min(in, out) of {where}, whose {layer.leaf} is {layer.shape} with the sides "
                f"{layer.sides}: at most {min(layer.sides)}"
            )
        # A key by name: make_rng would advance the counter that the layer's own parameters draw from, and
        # under nn.scan, which traces twice, the base would start elsewhere than without adapters.
        key = LazyRng.create(scope.rngs["params"], name).as_jax_rng()
        init: Any = factor_inits(adapter.init, rank, layer.axes)[side]
        value = init(key, shape, module.param_dtype)  # pyright: ignore[reportAttributeAccessIssue]
        return FactorBox(value, **known) if boxes_factors() else value

    # Not scope.variable: that reserves the name, and an Embed's lookup and `attend` share their factors.
    if not scope.has_variable(collection, name):
        if not scope.is_mutable_collection(collection):
            raise ValueError(
                f"the variables hold no adapter for {where}: pass 'lora' from init_lora beside 'params'"
            )
        scope.put_variable(collection, name, create())
    value = meta.unbox(scope.get_variable(collection, name))
    if value.shape != shape:
        raise ValueError(f"{name} of {where} has shape {value.shape}, the config asks for {shape}")
    return value


def apply_dropout(module: nn.Module, x: jax.Array, rate: float) -> jax.Array:
    """Dropout on an adapter's input when a `dropout` rng reaches the module, `x` itself otherwise."""
    if rate == 0.0 or not module.has_rng("dropout"):
        return x
    rngs = {"dropout": module.make_rng("dropout")}
    result: Any = nn.Dropout(rate, deterministic=False, parent=None).apply({}, x, rngs=rngs)
    return result


def _scale(module: nn.Module, collection: str, default: float) -> jax.Array | float:
    scope = module.scope
    assert scope is not None
    if not scope.has_variable(collection, SCALE):
        return default
    return jnp.reshape(scope.get_variable(collection, SCALE), ())


class LoRAPlusLayer(nn.Module):
    """What the layers here share: the fields of their adapter, and that they bring it themselves.

    Attributes:
      rank, alpha, dropout, use_rslora: as in `LoRAPlusConfig`.
      init_factors: its `init`.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    init_factors: Init = "lora"
    use_rslora: bool = False


def _adapter_of(module: LoRAPlusLayer) -> Adapter:
    """The module's adapter, its fields checked as those of a config are."""
    config = LoRAPlusConfig(
        target_modules=".*",
        rank=module.rank,
        alpha=module.alpha,
        use_rslora=module.use_rslora,
        dropout=module.dropout,
        init=module.init_factors,
    )
    return Adapter(config.rank, config.scale, config.init, config.dropout)


def _with_term(adapter: Adapter, module: nn.Module, method: Any, y: jax.Array, *args: Any) -> jax.Array:
    """What a Flax layer's method gave, plus the adapter's term."""
    layer = layer_of(inspect.unwrap(method), module, args, {})
    assert layer is not None
    where = "/".join(module.path) or type(module).__name__
    return add_adapter_term(y, module, layer, adapter, collection="lora", where=where)


class LoRAPlusDense(LoRAPlusLayer, nn.Dense):
    """`nn.Dense` with a low-rank adapter: y = x W + bias + s (dropout(x) A) B, s = alpha / rank.

    A drop-in for `nn.Dense`: the same arguments, and the same `kernel` and `bias` in `"params"`. The factors
    `lora_a (in, rank)` and `lora_b (rank, features)` stand in the collection `"lora"`, are of `param_dtype` and
    computed in `dtype`. At the start it equals the base layer exactly. Under `nn.scan` or `nn.vmap` map
    `"lora"` as you map `"params"`.

    Example:
      >>> x = jnp.ones((2, 4))
      >>> variables = LoRAPlusDense(3, rank=2).init(jax.random.key(0), x)
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'lora_a': (4, 2), 'lora_b': (2, 3)}
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The layer's output `(..., features)` for inputs `(..., in)`."""
        return _with_term(_adapter_of(self), self, nn.Dense.__call__, super().__call__(inputs), inputs)


class LoRAPlusDenseGeneral(LoRAPlusLayer, nn.DenseGeneral):
    """`nn.DenseGeneral` with a low-rank adapter, otherwise as `LoRAPlusDense`.

    The factors are `lora_a (batch..., in..., rank)` and `lora_b (batch..., rank, features...)`.

    Example:
      >>> layer = LoRAPlusDenseGeneral((4, 5), axis=(-2, -1), rank=2)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3, 6)))
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'lora_a': (3, 6, 2), 'lora_b': (2, 4, 5)}
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """As `nn.DenseGeneral`."""
        return _with_term(_adapter_of(self), self, nn.DenseGeneral.__call__, super().__call__(inputs), inputs)


class LoRAPlusEinsum(LoRAPlusLayer, nn.Einsum):
    """`nn.Einsum` with a low-rank adapter, otherwise as `LoRAPlusDense`.

    An axis of the kernel that stands in the input and in the result is a batch axis and stands in both factors.

    Raises:
      ValueError: the equation has no contracted axis, or no output axis of the kernel's own.

    Example:
      >>> layer = LoRAPlusEinsum((2, 6, 5), "ebi,eio->ebo", rank=3, use_bias=False)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 4, 6)))
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'lora_a': (2, 6, 3), 'lora_b': (2, 3, 5)}
    """

    @nn.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        """As `nn.Einsum`."""
        y = super().__call__(inputs, einsum_str)
        return _with_term(_adapter_of(self), self, nn.Einsum.__call__, y, inputs, einsum_str)


class LoRAPlusConv(LoRAPlusLayer, nn.Conv):
    """`nn.Conv` with a low-rank adapter, otherwise as `LoRAPlusDense`.

    A convolution of the same window, strides, padding and dilation to `rank` channels with `lora_a (window...,
    in / groups, rank)`, then `lora_b (rank, features)` at every place. With groups all share A's window.

    Example:
      >>> variables = LoRAPlusConv(8, (3, 3), rank=2).init(jax.random.key(0), jnp.ones((1, 5, 5, 4)))
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'lora_a': (3, 3, 4, 2), 'lora_b': (2, 8)}
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """As `nn.Conv`."""
        return _with_term(_adapter_of(self), self, nn.Conv.__call__, super().__call__(inputs), inputs)


class LoRAPlusEmbed(LoRAPlusLayer, nn.Embed):
    """`nn.Embed` with a low-rank adapter, used by the lookup and by `attend`; otherwise as `LoRAPlusDense`.

    The factors are `lora_a (num_embeddings, rank)` and `lora_b (rank, features)`. Dropout acts in `attend` only.

    Example:
      >>> variables = LoRAPlusEmbed(9, 4, rank=2).init(jax.random.key(0), jnp.array([1, 2]))
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'lora_a': (9, 2), 'lora_b': (2, 4)}
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """As `nn.Embed`."""
        return _with_term(_adapter_of(self), self, nn.Embed.__call__, super().__call__(inputs), inputs)

    def attend(self, query: jax.Array) -> jax.Array:
        """As `nn.Embed.attend`."""
        return _with_term(_adapter_of(self), self, nn.Embed.attend, super().attend(query), query)


class LoRAPlusMultiHeadDotProductAttention(LoRAPlusLayer, nn.MultiHeadDotProductAttention):
    """`nn.MultiHeadDotProductAttention` with adapters on its projections, otherwise as `LoRAPlusDense`.

    Attributes:
      projections: which of `query`, `key`, `value` and `out` have one.

    Example:
      >>> layer = LoRAPlusMultiHeadDotProductAttention(2, rank=2, projections=("query", "value"))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3, 6)))
      >>> sorted(variables["lora"])
      ['query', 'value']
    """

    projections: tuple[str, ...] = ("query", "key", "value", "out")

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """As `nn.MultiHeadDotProductAttention`."""
        known = ("query", "key", "value", "out")
        if odd := [name for name in self.projections if name not in known]:
            raise ValueError(f"projections must be among {', '.join(known)}, got {odd[0]!r}")
        adapter = _adapter_of(self)

        def project(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, y = context.module, next_fun(*args, **kwargs)
            if module.parent is not self or module.name not in self.projections:
                return y
            return _with_term(adapter, module, nn.DenseGeneral.__call__, y, *args)

        with nn.intercept_methods(project):
            return super().__call__(*args, **kwargs)
