"""Linen layers with built-in adapters."""

import inspect
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from ..adapter.config import LoRAPlusConfig
from .layer_adapter import (
    LoRAPlusLayer,
    adapter_of,
    add_factors,
    add_low_rank_term,
    check_reads_own_weight,
)
from .layer_table import METHODS


def _add_term(y: jax.Array, layer: LoRAPlusLayer, method: Any, *args: Any, module: Any = None) -> jax.Array:
    """Adds a layer's low-rank term to `y`, what a method of Flax's returned, or to that of its submodule."""
    module = layer if module is None else module
    # A config validates the fields.
    config = LoRAPlusConfig(
        target_modules=".*",
        rank=layer.rank,
        alpha=layer.alpha,
        use_rslora=layer.use_rslora,
        dropout=layer.dropout,
        init=layer.init_factors,
        variant=layer.variant,
    )
    scope: Any = module.scope
    where = f"the adapter of {'/'.join(module.path) or 'the model'!r} is in a layer"
    check_reads_own_weight(module, where, "use apply_lora_plus with target_parameters")
    # Flax wraps every method of a module; the table has the functions inside.
    call = METHODS[inspect.unwrap(method)](module, *args)
    weight = meta.unbox(scope.get_variable("params", call.leaf))
    path = "/".join(module.path) or type(module).__name__
    adapter: Any = adapter_of(config, path, call.kind, call.leaf, call.axes, weight.shape, weight.dtype)
    adapter = adapter._replace(where=repr(path))  # the rule is not the user's
    if scope.is_mutable_collection("lora"):
        add_factors(scope, adapter, "lora", weight)
    return add_low_rank_term(y, module, call, adapter, "lora", weight)


class LoRAPlusDense(LoRAPlusLayer, nn.Dense):
    """`nn.Dense` with a low-rank adapter: y = x W + bias + s (dropout(x) A) B, s = alpha / rank.

    A drop-in replacement for `nn.Dense`, with the same arguments and the same `kernel` and `bias` in `"params"`.
    The factors `lora_a (in, rank)` and `lora_b (rank, features)` are in the collection `"lora"`; they are float32,
    with `param_dtype` float64 also float64, and are computed in `dtype`. Initially the output equals the base
    layer's exactly. Under `nn.scan` or `nn.vmap`, map `"lora"` like `"params"`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((2, 4))
      >>> variables = LoRAPlusDense(3, rank=2).init(jax.random.key(0), x)
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'lora_a': (4, 2), 'lora_b': (2, 3)}
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns the output `(..., features)` for inputs `(..., in)`."""
        return _add_term(super().__call__(inputs), self, nn.Dense.__call__, inputs)


class LoRAPlusDenseGeneral(LoRAPlusLayer, nn.DenseGeneral):
    """`nn.DenseGeneral` with a low-rank adapter, otherwise like `LoRAPlusDense`.

    The factors are `lora_a (batch..., in..., rank)` and `lora_b (batch..., rank, features...)`.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = LoRAPlusDenseGeneral((4, 5), axis=(-2, -1), rank=2)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3, 6)))
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'lora_a': (3, 6, 2), 'lora_b': (2, 4, 5)}
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Like `nn.DenseGeneral`."""
        return _add_term(super().__call__(inputs), self, nn.DenseGeneral.__call__, inputs)


class LoRAPlusEinsum(LoRAPlusLayer, nn.Einsum):
    """`nn.Einsum` with a low-rank adapter, otherwise like `LoRAPlusDense`.

    A kernel axis that is in both the input and the result is a batch axis, kept in both factors.

    Raises:
      ValueError: the kernel has no contracted axis or no output axis, or an operand has a letter twice.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = LoRAPlusEinsum((2, 6, 5), "ebi,eio->ebo", rank=3, use_bias=False)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 4, 6)))
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'lora_a': (2, 6, 3), 'lora_b': (2, 3, 5)}
    """

    @nn.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        """Like `nn.Einsum`."""
        y = super().__call__(inputs, einsum_str)
        return _add_term(y, self, nn.Einsum.__call__, inputs, einsum_str)


class LoRAPlusConv(LoRAPlusLayer, nn.Conv):
    """`nn.Conv` with a low-rank adapter, otherwise like `LoRAPlusDense`.

    The adapter is a convolution to `rank` channels with the same window, strides, padding and dilation, by
    `lora_a (window..., in / groups, rank)`, followed by `lora_b (rank, features)` at every position. All groups
    share `lora_a`.

    Example:
      >>> import jax.numpy as jnp
      >>> variables = LoRAPlusConv(8, (3, 3), rank=2).init(jax.random.key(0), jnp.ones((1, 5, 5, 4)))
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'lora_a': (3, 3, 4, 2), 'lora_b': (2, 8)}
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Like `nn.Conv`."""
        return _add_term(super().__call__(inputs), self, nn.Conv.__call__, inputs)


class LoRAPlusEmbed(LoRAPlusLayer, nn.Embed):
    """`nn.Embed` with a low-rank adapter, used by the lookup and by `attend`; otherwise like `LoRAPlusDense`.

    The factors are `lora_embedding_a (num_embeddings, rank)` and `lora_embedding_b (rank, features)`, which have a
    separate learning rate. Dropout applies only to `attend`.

    Example:
      >>> import jax.numpy as jnp
      >>> variables = LoRAPlusEmbed(9, 4, rank=2).init(jax.random.key(0), jnp.array([1, 2]))
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'lora_embedding_a': (9, 2), 'lora_embedding_b': (2, 4)}
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Like `nn.Embed`."""
        return _add_term(super().__call__(inputs), self, nn.Embed.__call__, inputs)

    def attend(self, query: jax.Array) -> jax.Array:
        """Like `nn.Embed.attend`."""
        return _add_term(super().attend(query), self, nn.Embed.attend, query)


class LoRAPlusMultiHeadDotProductAttention(LoRAPlusLayer, nn.MultiHeadDotProductAttention):
    """`nn.MultiHeadDotProductAttention` with adapters on its projections, otherwise like `LoRAPlusDense`.

    Attributes:
      projections: the projections to adapt, among `query`, `key`, `value` and `out`.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = LoRAPlusMultiHeadDotProductAttention(2, rank=2, projections=("query", "value"))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3, 6)))
      >>> sorted(variables["lora"])
      ['query', 'value']
    """

    projections: tuple[str, ...] = ("query", "key", "value", "out")

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Like `nn.MultiHeadDotProductAttention`."""
        known = ("query", "key", "value", "out")
        if unknown := [name for name in self.projections if name not in known]:
            raise ValueError(f"projections must be among {', '.join(known)}, got {unknown[0]!r}")

        def project(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, y = context.module, next_fun(*args, **kwargs)
            if module.parent is not self or module.name not in self.projections:
                return y
            return _add_term(y, self, nn.DenseGeneral.__call__, *args, module=module)

        with nn.intercept_methods(project):
            return super().__call__(*args, **kwargs)
