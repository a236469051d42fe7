"""What optimizers of pairs share: A and B of a tree, and states by pair."""

import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..adapter.dora import widen
from ..adapter.spec import Factor, Specs
from ..adapter.tree import leaves_by_path, replace_paths
from .find_pairs import factor_pairs, spec_paths


def pair_factors(leaves: Mapping[str, Any], specs: Specs | None = None) -> list[tuple[Factor, Factor]]:
    """A and B of every pair in a tree, passed as path to leaf.

    Raises:
      ValueError: there is no pair, or shapes leave open which axes are a batch.
    """
    found, pairs = [], factor_pairs(leaves, specs)
    paths = spec_paths(pairs, specs)
    for module, pair in pairs.items():
        spec = (specs or {}).get(paths[module])
        a, b = (tuple(leaves[path].shape) for path in pair)
        letters = _letters(module, a, b) if spec is None else spec.factor_letters
        batch = "".join(c for c in letters[0] if c in letters[1] and c != "r")
        found.append(tuple(Factor(*each, batch) for each in zip(pair, (a, b), letters, strict=True)))
    if not found:
        raise ValueError(
            f"found no pair of factors among {', '.join(list(leaves)[:3]) or 'no leaves'}; this transform needs A "
            "and B in one tree: put it outside optax.multi_transform and optax.masked"
        )
    return found


def _letters(module: str, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[str, str]:
    """One letter per axis of A and B, `r` for the rank, the same letter for a batch axis of both."""
    names = string.ascii_letters.replace("r", "")
    found = []
    for batch in range(min(len(a), len(b)) - 1):
        if a[:batch] != b[:batch]:
            break
        shared, ins, outs = names[:batch], names[batch : len(a) - 1], names[len(a) :][: len(b) - batch - 1]
        # A (batch..., in..., r), B (batch..., r, out...), or PyTorch's: A (r, in...), B (out, r, ...). Both match
        # the factors of a square matrix, whose rank is the smaller axis.
        flax, torch = a[-1] == b[batch], a[batch] == b[batch + 1]
        is_matrix = len(a) == len(b) == batch + 2
        if flax and not (torch and is_matrix and a[batch] < a[-1]):
            found.append((f"{shared}{ins}r", f"{shared}r{outs}"))
        elif torch:
            found.append((f"{shared}r{ins}", f"{shared}{outs[0]}r{outs[1:]}"))
    if len(found) != 1:
        raise ValueError(f"{module or 'the tree'}: factors {a} and {b} may have batch axes; pass specs")
    return found[0]


_TINY = 1e-10
"""Eigenvalues of a Gram matrix below this share of the largest, or below rounding, count as zero."""


class PairState(NamedTuple):
    """The state of an optimizer of pairs: number of updates, a state by factor's path, and that of other leaves."""

    step: jax.Array
    factors: dict[str, Any]
    others: Any


def inverse_root(matrix: jax.Array) -> jax.Array:
    """S^(-1/2) of symmetric matrices (..., r, r), zero in the directions in which S is zero up to rounding."""
    values, vectors = jnp.linalg.eigh(matrix)
    share = max(_TINY, matrix.shape[-1] * float(jnp.finfo(values.dtype).eps))
    floor = jnp.maximum(share * values[..., -1:], jnp.finfo(values.dtype).tiny)
    # The inner `where` keeps the unused branch finite.
    root = jnp.where(values > floor, 1 / jnp.sqrt(jnp.where(values > floor, values, 1)), 0)
    return (vectors * root[..., None, :]) @ vectors.mT


def transform_pairs(
    init_factor: Callable[..., Any],
    update_factor: Callable[..., Any],
    others: optax.GradientTransformation,
    specs: Specs | None,
) -> optax.GradientTransformation:
    """Makes a transform from one of a factor's gradient and the other factor, and one for leaves in no pair.

    Returns:
      An `optax.GradientTransformation` with the state `PairState`. Its `update` requires `params`, and keeps the
      dtypes of the factors' gradients.
    """

    def factors_of(leaves: Any) -> tuple[dict[str, tuple[Factor, str]], dict[str, jax.Array]]:
        """By a factor's path: itself and the other factor's path; and its rows."""
        factors = {
            factor.path: (factor, other.path)
            for a, b in pair_factors(leaves, specs)
            for factor, other in ((a, b), (b, a))
        }
        return factors, {path: factor.rows(widen(leaves[path])) for path, (factor, _) in factors.items()}

    def rest(leaves: Any, factors: Any) -> dict[str, Any]:
        return {path: leaf for path, leaf in leaves.items() if path not in factors}

    def init(params: Any) -> PairState:
        leaves = leaves_by_path(params)
        factors, rows = factors_of(leaves)
        states = {path: init_factor(rows[path], rows[other]) for path, (_, other) in factors.items()}
        return PairState(jnp.zeros((), jnp.int32), states, others.init(rest(leaves, factors)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("an optimizer of pairs needs the factors: pass params to update")
        leaves, grads = leaves_by_path(params), leaves_by_path(updates)
        factors, rows = factors_of(leaves)
        count: Any = optax.safe_increment(state.step)
        new, states = {}, {}
        for path, (factor, other) in factors.items():
            grad = factor.rows(widen(grads[path]))
            step, states[path] = update_factor(grad, rows[other], state.factors[path], count)
            new[path] = factor.restore(step).astype(grads[path].dtype)
        moved: Any
        moved, kept = others.update(rest(grads, factors), state.others, rest(leaves, factors))
        return replace_paths(updates, new | moved), PairState(count, states, kept)

    return optax.GradientTransformation(init, update)


def corrected_average(old: jax.Array, new: jax.Array, decay: float, count: jax.Array) -> jax.Array:
    """A moving average with Adam's correction for its start at zero: over the first `count` values alone."""
    corrected = decay * (1 - decay ** (count - 1.0)) / (1 - decay**count)
    return (corrected * old + (1 - corrected) * new).astype(old.dtype)
