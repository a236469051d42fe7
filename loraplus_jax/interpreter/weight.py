"""A weight that stays W + s A B, or packed, through a traced program."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..adapter.dora import output_scale, widen
from ..adapter.lora import is_explicit
from ..adapter.taps import inject_gradient, update_squares
from .dataflow import mark_weight

Term = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
"""`term(x, a, b, scale)`: s (x A) B for the input of an operation or a layer, and factors without stacked axes."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "a", "b", "scale", "c", "key", "tap", "before"],
    meta_fields=["letters", "factor_letters", "dropout", "omit", "stops"],
)
@dataclasses.dataclass(frozen=True)
class LowRankWeight:
    """A weight W + s A B, or a packed W alone.

    Attributes:
      w: W, in any order of axes; an array or a `PackedArray`.
      a, b: the factors; they may have another dtype than W. Both None for a packed W alone.
      letters: the einsum letters of W's axes.
      factor_letters: those of A and B, with `r` for the rank.
      scale: s.
      c: DoRA's factor for each output, with B's axes without the rank's; the weight is then c (W + s A B).
      dropout: rate of dropout on the input of a contraction; 0 for none.
      key: its key.
      tap, before: for `make_theory`, the leaf whose gradient is the measurement, and A and B of the previous step.
      omit: whether to leave W out and mark it for `trace_dataflow` instead.
      stops: whether the program's `stop_gradient` of the weight stops the gradients of A and B too; otherwise it
        freezes W alone, as a layer does that is made to be adapted.
    """

    w: Any
    a: Any = None
    b: Any = None
    letters: str = ""
    factor_letters: tuple[str, str] = ("", "")
    scale: Any = 1.0
    c: Any = None
    dropout: float = 0.0
    key: Any = None
    tap: Any = None
    before: Any = None
    omit: bool = False
    stops: bool = False

    @property
    def outputs(self) -> str:
        """The letters of the batch and output axes, in B's order."""
        return self.factor_letters[1].replace("r", "")

    def with_magnitude(self, magnitude: Any = None) -> "LowRankWeight":
        """The weight with DoRA's magnitudes, or itself if they are None."""
        if magnitude is None:
            return self
        if self.omit:  # W, and with it its norms
            return dataclasses.replace(
                self, c=jnp.squeeze(jnp.ones_like(magnitude), self.factor_letters[1].index("r"))
            )
        arguments = (self.w, self.a, self.b, magnitude, self.scale, self.letters, self.factor_letters)
        return dataclasses.replace(self, c=output_scale(*arguments))

    def sum(self, user: str = "output") -> jax.Array:
        """W + s A B, times c if there is one, in W's dtype, computed in float32 or wider.

        Args:
          user: the operation that needs it, for `trace_dataflow`.

        Raises:
          ValueError: dropout is on; it applies to the input of the low-rank term.
        """
        if self.key is not None:
            raise ValueError(
                "dropout of an adapter is not supported where an operation needs the whole weight, here of shape "
                f"{self.w.shape}: set dropout=0, or leave the layer out of target_modules"
            )
        if self.a is None:
            return self.base(whole=user)
        left, right = self.factor_letters
        sizes = dict(zip(self.letters, self.w.shape, strict=True))
        # A single row or column is what a lookup computes, however many a loop takes.
        is_row = any(
            math.prod(sizes.get(c, 1) for c in side) == 1 for side in ({*left} - {*right}, {*right} - {*left})
        )
        base = self.base(whole="" if is_row else user)
        # On TPU a product of float32 arrays rounds them to bfloat16 unless the precision is HIGHEST, and a sum in
        # bfloat16 would lose a small s A B beside W.
        a, b = widen(self.a), widen(self.b)
        delta = jnp.einsum(
            f"{left},{right}->{self.letters}",
            *(a, b),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=jax.typeof(base).sharding if is_explicit(base, a, b) else None,
        ) * jnp.asarray(self.scale, a.dtype)
        total = widen(base) + delta
        return self.scale_outputs(total, self.letters).astype(base.dtype)

    def base(self, *, whole: str = "") -> jax.Array:
        """W, or zeros with `omit`; `whole` names for `trace_dataflow` the operation that needs the sum."""
        w = self.w.dequantize() if hasattr(self.w, "dequantize") else self.w
        if not self.omit:
            return w
        return jnp.zeros_like(w) + mark_weight(w, whole=whole).astype(w.dtype)

    def scale_outputs(
        self, y: jax.Array, letters: str | None = None, bias: jax.Array | None = None
    ) -> jax.Array:
        """c y + (1 - c) bias in y's dtype, or y if there is no c: scales all of y but the bias in it.

        Args:
          y: an array.
          letters: those of its axes, any others for axes that c lacks; None if c's are the last ones.
          bias: as many values as c has, in the order of `letters`.
        """
        if self.c is None:
            return y
        names: str = letters or "-" * (y.ndim - self.c.ndim) + self.outputs
        sizes = dict(zip(self.outputs, self.c.shape, strict=True))
        c = self.c.transpose([self.outputs.index(letter) for letter in names if letter in sizes])
        c = c.reshape([sizes.get(letter, 1) for letter in names])
        if is_explicit(c, y):  # a product takes arrays of one sharding only
            axes = zip(c.shape, (*jax.typeof(y).sharding.spec, *(None,) * y.ndim), strict=False)
            c = jax.sharding.reshard(c, jax.P(*(axis if size > 1 else None for size, axis in axes)))
        fixed = 0 if bias is None else (1 - c) * bias.reshape(c.shape)
        return (c * y + fixed).astype(y.dtype)

    def low_rank_term(self, term: Term, x: jax.Array) -> jax.Array:
        """The term with dropout, unless x are indices; with a tap, the tap's gradient becomes `update_squares`."""
        if self.key is not None and jnp.issubdtype(x.dtype, jnp.floating):
            keep = 1.0 - self.dropout
            x = jnp.where(jax.random.bernoulli(self.key, keep, x.shape), x / keep, jnp.zeros_like(x))
        y = term(x, self.a, self.b, self.scale)
        if self.tap is None or self.before is None:
            return y
        left, right = self.factor_letters
        batch_axes = len(set(left) & set(right)) - 1
        # The measurement is no part of the loss: no gradient may reach x through it.
        inputs = jax.lax.stop_gradient(x)
        squares = update_squares(term, inputs, self.before, (self.a, self.b), self.scale, batch_axes)
        return inject_gradient(y, self.tap, squares.reshape(self.tap.shape))
