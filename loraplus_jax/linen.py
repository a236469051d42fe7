"""Linen layers with an adapter of their own, and the adapter itself as every Linen layer uses it."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from flax.core.scope import LazyRng
from flax.linen.dtypes import promote_dtype

from .config import Init, LoRAPlusConfig
from .inits import factor_inits
from .lora import SCALE, delta

_BOXED = contextvars.ContextVar("boxed", default=False)


class Box(struct.PyTreeNode, meta.AxisMetadata):  # pyright: ignore[reportIncompatibleMethodOverride]
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

    def unbox(self) -> Any:
        """The bare factor."""
        return self.value

    def replace_boxed(self, val: Any) -> "Box":
        """The same knowledge about another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Box":
        """Called by `nn.scan` and `nn.vmap` on the way out."""
        return self.replace(stacked=(*self.stacked, index))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Box":
        """Called by `nn.scan` and `nn.vmap` on the way in."""
        return self.replace(stacked=self.stacked[:-1])


@contextlib.contextmanager
def boxed_factors() -> Iterator[None]:
    """Inside, new factors come as `Box`es, from which `init_lora` reads the specs."""
    token = _BOXED.set(True)
    try:
        yield
    finally:
        _BOXED.reset(token)


def dense_delta(
    module: nn.Dense, x: jax.Array, config: LoRAPlusConfig, *, collection: str, where: str
) -> jax.Array:
    """The adapter's term for a Dense layer's input `(..., in)`, its factors living in `collection`.

    Created on first use with the layer's `param_dtype`, computed in the layer's `dtype` as Flax promotes it.
    `where` names the layer in messages.
    """
    wide, rank = (x.shape[-1], module.features), config.rank
    if rank > min(wide):
        raise ValueError(
            f"rank {rank} is above min(in, out) of {where}, whose kernel is {wide}: at most {min(wide)}"
        )
    a_init, b_init = factor_inits(config.init, rank)
    known = {"kind": "dense", "leaf": "kernel", "axes": "io", "rank": rank, "scale": config.scale}

    scope = module.scope
    assert scope is not None

    def factor(name: str, init: Any, shape: tuple[int, int]) -> jax.Array:
        def create() -> Any:
            # A key by name: make_rng would advance the counter that the layer's own parameters draw from, and
            # under nn.scan, which traces twice, the base would start elsewhere than without adapters.
            key = LazyRng.create(scope.rngs["params"], name).as_jax_rng()
            value = init(key, shape, module.param_dtype)
            return Box(value, **known) if _BOXED.get() else value

        if not scope.has_variable(collection, name) and not scope.is_mutable_collection(collection):
            raise ValueError(
                f"the variables hold no adapter for {where}: pass 'lora' from init_lora beside 'params'"
            )
        value = scope.variable(collection, name, create).value
        if value.shape != shape:
            raise ValueError(f"{name} of {where} has shape {value.shape}, the config asks for {shape}")
        return value

    a, b = factor("lora_a", a_init, (wide[0], rank)), factor("lora_b", b_init, (rank, wide[1]))
    x, a, b = promote_dtype(x, a, b, dtype=module.dtype)
    scale = _scale(module, "params" if collection == "params" else SCALE, config.scale)
    return delta(dropped(module, x, config.dropout), a, b, scale, module.precision)


def dropped(module: nn.Module, x: jax.Array, rate: float) -> jax.Array:
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


class LoRAPlusDense(nn.Dense):
    """`nn.Dense` with a low-rank adapter: y = x W + bias + s (dropout(x) A) B, s = alpha / rank.

    A drop-in for `nn.Dense`: the same arguments, and the same `kernel` and `bias` in `"params"`. The factors
    `lora_a (in, rank)` and `lora_b (rank, features)` stand in the collection `"lora"`, are of `param_dtype` and
    computed in `dtype`. At the start it equals the base layer exactly. Under `nn.scan` or `nn.vmap` map
    `"lora"` as you map `"params"`.

    Attributes:
      rank, alpha, dropout: as in `LoRAPlusConfig`.
      init_factors: its `init`.

    Example:
      >>> x = jnp.ones((2, 4))
      >>> variables = LoRAPlusDense(3, rank=2).init(jax.random.key(0), x)
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'lora_a': (4, 2), 'lora_b': (2, 3)}
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    init_factors: Init = "lora"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The layer's output `(..., features)` for inputs `(..., in)`."""
        config = LoRAPlusConfig(
            target_modules=".*",
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            init=self.init_factors,
        )
        where = "/".join(self.path) or "LoRAPlusDense"
        return super().__call__(inputs) + dense_delta(self, inputs, config, collection="lora", where=where)
