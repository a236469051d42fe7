"""The supported Flax layers: which leaf is the weight, the roles of its axes, and the low-rank term.

The terms are written out and not left to `low_rank.evaluate`, which sees only the layer's program: it would
compute W + s A B for a layer's own `dot_general`, which may round, and for a transposed kernel of `ConvTranspose`.
"""

import dataclasses
import inspect
import re
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from opt_einsum.parser import parse_einsum_input

from ..adapter.einsum_letters import LETTERS, factor_letters, split_equation
from ..adapter.lora import low_rank_output
from ..interpreter.weight import Term


class LayerCall(NamedTuple):
    """The description of one call of a layer, and of its weight.

    Attributes:
      kind: layer kind, as in `AdapterSpec`.
      leaf: name of the weight in `"params"`.
      axes: one letter per axis of the weight, as in `AdapterSpec`.
      inputs: inputs of the call.
      term: function that computes the low-rank term from inputs and factors.
      result: the letters of the result's axes, "-" for those that the weight lacks; None if B's without the rank's
        are the last ones.
      product: for a call that contracts the outputs instead (`Embed.attend`), the layer's result for other inputs.
    """

    kind: str
    leaf: str
    axes: str
    inputs: jax.Array
    term: Term
    result: str | None = None
    product: Callable[[jax.Array], jax.Array] | None = None


def _contraction(kind: str, module: Any, inputs: jax.Array, equation: str) -> LayerCall:
    axes, equations = split_equation(equation)
    _, weight, result = re.split(",|->", equation)
    letters = dict(zip(weight, LETTERS, strict=False))
    result = "".join(letters.get(c, "-") for c in result)

    def term(x: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        x, a, b = promote_dtype(x, a, b, dtype=module.dtype)
        return low_rank_output(x, a, b, scale, equations, module.precision)

    return LayerCall(kind, "kernel", axes, inputs, term, result)


def _dense(module: nn.Dense, inputs: jax.Array) -> LayerCall:
    def term(x: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        x, a, b = promote_dtype(x, a, b, dtype=module.dtype)
        return low_rank_output(x, a, b, scale, precision=module.precision)

    return LayerCall("dense", "kernel", "io", inputs, term)


def _dense_general(module: nn.DenseGeneral, inputs: jax.Array) -> LayerCall:
    letters = string.ascii_uppercase[: inputs.ndim]
    # Flax also sorts them before it makes the kernel.
    axis, batch = (
        [letters[n] for n in sorted(n % inputs.ndim for n in _sequence(dims))]
        for dims in (module.axis, module.batch_dims)
    )
    features = string.ascii_lowercase[: len(_sequence(module.features))]
    free = [c for c in letters if c not in (*axis, *batch)]
    kernel = "".join((*batch, *axis, features))
    equation = f"{letters},{kernel}->{''.join((*batch, *free, features))}"
    return _contraction("dense_general", module, inputs, equation)


def _einsum(module: nn.Einsum, inputs: jax.Array, einsum_str: str | None = None) -> LayerCall:
    equation: Any = einsum_str or module.einsum_str
    shapes = (inputs.shape, module.shape)
    operands, result, _ = parse_einsum_input((equation.replace(" ", ""), *shapes), shapes=True)
    return _contraction("einsum", module, inputs, f"{operands}->{result}")


def _conv(module: Any, inputs: jax.Array) -> LayerCall:
    kind = nn.Conv if module.shared_weights else nn.ConvLocal
    window = len(_sequence(module.kernel_size))
    if not module.shared_weights:  # a kernel for each position
        axes = "abcdefgh"[:window] + "io"
        return LayerCall("conv", "kernel", axes, inputs, _by_weight(kind, module, axes))
    axes = "i" * (window + 1) + "o"
    if module.mask is not None:
        return LayerCall("conv", "kernel", axes, inputs, _by_weight(kind, module, axes))

    def term(x: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        groups, rank = module.feature_group_count, a.shape[-1]
        # All groups share A; each has its own part of B's outputs.
        h = _bare(kind, module, jnp.tile(a, groups), x, features=groups * rank)
        h, b = promote_dtype(h.reshape(*h.shape[:-1], groups, rank), b, dtype=module.dtype)
        b = b.reshape(rank, groups, -1)
        y = jnp.einsum("...gr,rgo->...go", h * jnp.asarray(scale, h.dtype), b, precision=module.precision)
        return y.reshape(*y.shape[:-2], -1)

    return LayerCall("conv", "kernel", axes, inputs, term)


def _conv_transpose(module: nn.ConvTranspose, inputs: jax.Array) -> LayerCall:
    axes = "i" * len(_sequence(module.kernel_size)) + ("oi" if module.transpose_kernel else "io")
    if module.mask is not None:
        return LayerCall("conv_transpose", "kernel", axes, inputs, _by_weight(nn.ConvTranspose, module, axes))

    def term(x: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        kernel = jnp.swapaxes(a, -1, -2) if module.transpose_kernel else a
        h, b = promote_dtype(
            _bare(nn.ConvTranspose, module, kernel, x, features=a.shape[-1]), b, dtype=module.dtype
        )
        return jnp.matmul(h * jnp.asarray(scale, h.dtype), b, precision=module.precision)

    return LayerCall("conv_transpose", "kernel", axes, inputs, term)


def _embed(module: nn.Embed, inputs: jax.Array) -> LayerCall:
    # As in Flax's Embed, whose table may hold integers.
    def term(x: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        a, b = promote_dtype(a, b, dtype=module.dtype, inexact=False)
        is_single = module.num_embeddings == 1  # then Embed ignores the indices
        # W's rows beyond the last are NaN. With NaN in A too, B's gradient is NaN though the model masks such rows.
        h = jnp.take(a, jnp.zeros_like(x) if is_single else x, axis=0, fill_value=0)
        return jnp.matmul(h * jnp.asarray(scale, h.dtype), b)

    return LayerCall("embed", "embedding", "io", inputs, term)


def _attend(module: nn.Embed, query: jax.Array) -> LayerCall:
    def term(x: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        x, a, b = promote_dtype(x, a, b, dtype=module.dtype)
        return low_rank_output(x, b, a, scale, ("...o,ro->...r", "...r,ir->...i"))

    def product(x: jax.Array) -> jax.Array:
        embedding = meta.unbox(module.scope.get_variable("params", "embedding"))  # pyright: ignore
        return _bare(nn.Embed, module, embedding, x, leaf="embedding", method="attend")

    return LayerCall("embed", "embedding", "io", query, term, product=product)


def _by_weight(kind: type[nn.Module], module: nn.Module, axes: str) -> Term:
    """The term computed by the layer itself with the kernel s A B.

    With a mask, or with a separate kernel per pixel, A and B cannot be applied one after the other.
    """
    left, right = factor_letters(axes)
    result = string.ascii_lowercase[: len(axes)]

    def term(x: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        return _bare(
            kind, module, jnp.einsum(f"{left},{right}->{result}", a * jnp.asarray(scale, a.dtype), b), x
        )

    return term


def _bare(
    kind: type[nn.Module],
    module: nn.Module,
    weight: jax.Array,
    x: jax.Array,
    *,
    leaf: str = "kernel",
    method: str | None = None,
    **changes: Any,
) -> jax.Array:
    """Applies a plain Flax layer with a weight, without bias, and with `module`'s fields except `changes`."""
    names = [f.name for f in dataclasses.fields(kind) if f.init and f.name not in ("parent", "name")]
    fields = {name: getattr(module, name) for name in names} | changes
    fields |= {"use_bias": False} if "use_bias" in fields else {}
    result: Any = kind(**fields, parent=None).apply({"params": {leaf: weight}}, x, method=method)
    return result


def _sequence(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value,)  # an int may be a NumPy integer


# By method and not by class: nn.vmap(nn.Dense) is a subclass that calls a plain Dense inside, and a user's subclass
# may call super().
METHODS: dict[Any, Callable[..., LayerCall]] = {
    inspect.unwrap(method): make
    for method, make in (
        (nn.Dense.__call__, _dense),
        (nn.DenseGeneral.__call__, _dense_general),
        (nn.Einsum.__call__, _einsum),
        (nn.Conv.__call__, _conv),
        (nn.ConvTranspose.__call__, _conv_transpose),
        (nn.Embed.__call__, _embed),
        (nn.Embed.attend, _attend),
    )
}
"""For each supported layer's method, as `inspect.unwrap` returns it, a function that describes a call of it.

It takes the layer, whose parameters must exist, and the arguments of the call, and raises ValueError for an Einsum
that cannot be adapted, see `split_equation`.
"""
