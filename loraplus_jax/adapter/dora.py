"""DoRA: adapters that train each output's magnitude apart from its direction (arXiv 2402.09353).

The weight is m V / ||V|| with V = W + s A B, norms over the input axes, and m = ||W|| at first. As m / ||V||
multiplies whole outputs, V is never formed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._utils.multihost import gather_to_host
from ..quantization.packed_array import is_packed
from .spec import Specs
from .tree import flatten, replace_leaves, weight_of, with_collection


def output_norms(weight: Any, letters: str, factor_letters: tuple[str, str]) -> jax.Array:
    """The norms of the outputs' weights, over the input axes: float32 or wider, in B's axes with 1 for the rank.

    `weight` is an array or `PackedArray`; the letters are those of its `AdapterSpec`.
    """
    return jnp.sqrt(_output_squares(widen(weight), letters, factor_letters[1]))


def output_scale(
    weight: Any,
    a: jax.Array,
    b: jax.Array,
    magnitude: jax.Array,
    scale: jax.Array | float,
    letters: str,
    factor_letters: tuple[str, str],
) -> jax.Array:
    """DoRA's factor c = m / ||V|| for every output of V = W + s A B (arXiv 2402.09353, section 4).

    The norms are constants to the gradient (section 4.3). They need products with A and with AᵀA instead of V:
    ||V||² = ||W||² + 2 s Σ (AᵀW) ∘ B + s² Bᵀ AᵀA B. Where m is 0, c is 1: an output whose weights are all zero is
    adapted as by LoRA, and zero factors and magnitudes, as from `disabled`, have no effect.

    Args:
      weight: W, array or `PackedArray`.
      a, b, magnitude: the factors, and m in B's axes with 1 for the rank.
      scale: s, a scalar.
      letters, factor_letters: as in `AdapterSpec`.

    Returns:
      c in B's axes without the rank's, float32 or wider.
    """
    left, right = factor_letters
    # ||W|| is computed again in every pass: stored, it could disagree with the base.
    w, a, b = (jax.lax.stop_gradient(widen(x)) for x in (weight, a, b))
    batch = "".join(c for c in left if c in right and c != "r")
    axes = dict(zip(left, jax.typeof(a).sharding.spec, strict=False)) | dict(
        zip(right, jax.typeof(b).sharding.spec, strict=False)
    )
    explicit = any(axes.values())

    def product(inputs: str, result: str, *values: jax.Array) -> jax.Array:
        sharding = jax.P(*(axes.get(c) for c in result)) if explicit else None
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum(f"{inputs}->{result}", *values, precision=highest, out_sharding=sharding)

    projected = product(f"{left},{letters}", right, a, w)
    gram = product(f"{left},{left.replace('r', 'Z')}", f"{batch}Zr", a, a)
    change = 2 * projected + scale * product(f"{batch}Zr,{right.replace('r', 'Z')}", right, gram, b)
    rank = right.index("r")
    squares = _output_squares(w, letters, right) + scale * jnp.sum(b * change, rank, keepdims=True)
    norms = jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny))
    return jnp.squeeze(jnp.where(magnitude == 0, 1, widen(magnitude) / norms), rank)


def _output_squares(w: jax.Array, letters: str, right: str) -> jax.Array:
    sums = jnp.sum(jnp.square(w), [n for n, c in enumerate(letters) if c not in right])
    kept = [c for c in letters if c in right]
    return jnp.expand_dims(sums.transpose([kept.index(c) for c in right if c != "r"]), right.index("r"))


def widen(x: Any) -> jax.Array:
    """The values of an array or `PackedArray`, float32 or wider."""
    x = x.dequantize() if is_packed(x) else x
    # JAX promotes no floats of 8 bits.
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32) if x.dtype.itemsize > 1 else jnp.float32)


def set_magnitudes(lora: Mapping[str, Any], base: Mapping[str, Any], specs: Specs) -> dict[str, Any]:
    """Sets the magnitudes of adapters of variant dora to the norms of their weights, so that A B = 0 has no effect.

    Args:
      lora, specs: the tree of adapters, or variables with it in the collection `"lora"`, and their table.
      base: variables without adapters, `{"params": ...}`; weights may be packed or sharded.

    Returns:
      A tree like `lora` with the new magnitudes, float32 or wider; other leaves are the same.

    Raises:
      ValueError: a weight is missing or has another shape.
    """
    flat, new = flatten(base), {}
    for module, spec in specs.items():
        if not spec.magnitude:
            continue
        norms = _jit_norms(weight_of("the base", flat, spec), spec.base_letters, spec.factor_letters)
        # On the host they are the same on every process, as all that is trained is at first.
        is_traced = isinstance(norms, Tracer)
        new[spec.factor_paths(module)[2]] = norms if is_traced else jnp.asarray(gather_to_host(norms))
    wrapped = with_collection(lora, specs)
    return replace_leaves(
        lora, new if wrapped is not lora else {f"lora/{path}": x for path, x in new.items()}
    )


_jit_norms = jax.jit(output_norms, static_argnums=(1, 2))
