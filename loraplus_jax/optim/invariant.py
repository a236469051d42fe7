"""Optimizers whose steps do not depend on how W's update is split into A and B: LoRA-RITE and LoRA-Muon.

Replacing A by A R and B by R⁻¹ B leaves A B as it is, and with these optimizers also every later A B. So a ratio of
the rates of B and A has no meaning for them.

In the equations here a factor is (batch..., r, n): its rows are rank components. The other factor's Gram matrix
S, (r, r), gives R = S^(-1/2), and with it an orthonormal basis of its rows; a gradient in that basis is R g.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._validation import check_number
from ..spec import Specs
from ..tree import leaves_by_path, replace_paths
from .pairs import pair_layouts

_TINY = 1e-10
"""Eigenvalues of a Gram matrix below this share of the largest count as zero: those of a B that is still zero."""


class RiteFactor(NamedTuple):
    """What LoRA-RITE keeps of one factor, float32 or wider.

    Attributes:
      moment: of the preconditioned gradients, (batch..., r, n).
      second: second moment, (batch..., r, r).
      escaped: second moment that left the other factor's subspace, (batch...,).
      basis: of the other factor, (batch..., r, n of the other).
    """

    moment: jax.Array
    second: jax.Array
    escaped: jax.Array
    basis: jax.Array


class PairState(NamedTuple):
    """The state of an optimizer of pairs: number of updates, a state by factor's path, and that of other leaves."""

    step: jax.Array
    factors: dict[str, Any]
    others: Any


def scale_by_lora_rite(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, *, specs: Specs | None = None
) -> optax.GradientTransformation:
    """LoRA-RITE's direction for pairs (arXiv 2410.20625, algorithm 1), and Adam's for other leaves.

    Both moments are kept in a basis of the other factor's rows and follow it as it turns; what the second moment
    loses by the turn is added to all directions. Keeps two factors' size and an (r, r) matrix for each factor, and
    costs products with r rows and eight eigendecompositions of (r, r) a pair.

    Args:
      b1, b2: decay of the first and second moment.
      eps: added to the root of the second moment.
      specs: the table from `init_lora`, as for `scale_by_riemannian`.

    Raises:
      ValueError: a number is out of range, the tree has no pair, or a pair's axes are ambiguous.
    """
    _check_decays(b1=b1, b2=b2)
    check_number("eps", eps, above=0)

    def init(own: jax.Array, other: jax.Array) -> RiteFactor:
        batch, rank = own.shape[:-2], own.shape[-2]
        square = jnp.zeros((*batch, rank, rank), own.dtype)
        return RiteFactor(jnp.zeros_like(own), square, jnp.zeros(batch, own.dtype), jnp.zeros_like(other))

    def update(
        grad: jax.Array, other: jax.Array, old: RiteFactor, count: jax.Array
    ) -> tuple[jax.Array, RiteFactor]:
        root = inverse_root(other @ other.mT)
        grad, basis = root @ grad, root @ other
        turn = basis @ old.basis.mT
        second = _symmetric(turn @ old.second @ turn.mT)
        lost = jnp.linalg.eigvalsh(old.second) - jnp.linalg.eigvalsh(second)
        escaped = old.escaped + jnp.maximum(lost.max(-1), 0)
        second = _average(second, grad @ grad.mT / grad.shape[-1], b2, count)
        escaped = _average(escaped, jnp.zeros_like(escaped), b2, count)
        values, vectors = jnp.linalg.eigh(second)
        values = 1 / (jnp.sqrt(jnp.maximum(values, 0) + escaped[..., None]) + eps)
        step = (vectors * values[..., None, :]) @ (vectors.mT @ grad)
        moment = _average(turn @ old.moment, step, b1, count)
        return root @ moment, RiteFactor(moment, second, escaped, basis)

    return _of_pairs(init, update, optax.scale_by_adam(b1, b2), specs)


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    specs: Specs | None = None,
) -> optax.GradientTransformation:
    """The optimizer LoRA-RITE: `scale_by_lora_rite` with a rate, that of A and of B alike, and decoupled decay."""
    return optax.chain(
        scale_by_lora_rite(b1, b2, eps, specs=specs),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_lora_muon(b1: float = 0.95, *, specs: Specs | None = None) -> optax.GradientTransformation:
    """LoRA-Muon's direction for pairs (arXiv 2606.12921), and Adam's for other leaves.

    ½ R msign(R m), where m is the momentum of a factor's gradients and msign sets all singular values to 1: the
    steepest descent of A B in the spectral norm, one half of it by each factor. Keeps one factor's size a factor.

    Args:
      b1: decay of the momentum.
      specs: the table from `init_lora`, as for `scale_by_riemannian`.

    Raises:
      ValueError: as `scale_by_lora_rite`.
    """
    _check_decays(b1=b1)

    def update(
        grad: jax.Array, other: jax.Array, old: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        root, moment = inverse_root(other @ other.mT), _average(old, grad, b1, count)
        step = root @ moment
        return root @ (inverse_root(step @ step.mT) @ step) / 2, moment

    return _of_pairs(lambda own, _: jnp.zeros_like(own), update, optax.scale_by_adam(b1), specs)


def lora_muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.95,
    weight_decay: float = 0.0,
    *,
    specs: Specs | None = None,
) -> optax.GradientTransformation:
    """The optimizer LoRA-Muon: `scale_by_lora_muon` with a rate, that of A and of B alike, and decay.

    Args:
      learning_rate: rate or schedule; the spectral norm of a step of A B, to first order.
      b1: decay of the momentum.
      weight_decay: of A B, to first order: each factor decays by half of it.
      specs: the table from `init_lora`, as for `scale_by_riemannian`.
    """
    return optax.chain(
        scale_by_lora_muon(b1, specs=specs),
        optax.add_decayed_weights(weight_decay / 2),
        optax.scale_by_learning_rate(learning_rate),
    )


def inverse_root(matrix: jax.Array) -> jax.Array:
    """S^(-1/2) of symmetric matrices (..., r, r), zero in the directions in which S is zero."""
    values, vectors = jnp.linalg.eigh(matrix)
    floor = jnp.maximum(_TINY * values[..., -1:], jnp.finfo(values.dtype).tiny)
    # The inner `where` keeps the unused branch finite.
    root = jnp.where(values > floor, 1 / jnp.sqrt(jnp.where(values > floor, values, 1)), 0)
    return (vectors * root[..., None, :]) @ vectors.mT


def _of_pairs(
    init_factor: Callable[..., Any],
    update_factor: Callable[..., Any],
    others: optax.GradientTransformation,
    specs: Specs | None,
) -> optax.GradientTransformation:
    """A transform from one of a factor's gradient and the other factor, and one for leaves in no pair."""

    def rows_of(leaves: Any, layouts: Any) -> dict[str, jax.Array]:
        return {
            path: layout.wide_rows(leaves[path])
            for pair, both in layouts.items()
            for layout, path in zip(both, pair, strict=True)
        }

    def rest(leaves: Any, layouts: Any) -> dict[str, Any]:
        factors = {path for pair in layouts for path in pair}
        return {path: leaf for path, leaf in leaves.items() if path not in factors}

    def init(params: Any) -> PairState:
        leaves = leaves_by_path(params)
        layouts = pair_layouts(leaves, specs)
        rows = rows_of(leaves, layouts)
        states = {
            path: init_factor(rows[path], rows[other])
            for pair in layouts
            for path, other in zip(pair, pair[::-1], strict=True)
        }
        return PairState(jnp.zeros((), jnp.int32), states, others.init(rest(leaves, layouts)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("an optimizer of pairs needs the factors: pass params to update")
        leaves, grads = leaves_by_path(params), leaves_by_path(updates)
        layouts = pair_layouts(leaves, specs)
        rows, slopes = rows_of(leaves, layouts), rows_of(grads, layouts)
        count: Any = optax.safe_increment(state.step)
        new, states = {}, {}
        for pair, both in layouts.items():
            for layout, path, other in zip(both, pair, pair[::-1], strict=True):
                step, states[path] = update_factor(slopes[path], rows[other], state.factors[path], count)
                new[path] = layout.restore(step, grads[path].shape).astype(grads[path].dtype)
        moved: Any
        moved, kept = others.update(rest(grads, layouts), state.others, rest(leaves, layouts))
        return replace_paths(updates, new | moved), PairState(count, states, kept)

    return optax.GradientTransformation(init, update)


def _average(old: jax.Array, new: jax.Array, decay: float, count: jax.Array) -> jax.Array:
    """A moving average with Adam's correction for its start at zero: over the first `count` values alone."""
    corrected = decay * (1 - decay ** (count - 1.0)) / (1 - decay**count)
    return (corrected * old + (1 - corrected) * new).astype(old.dtype)


def _symmetric(matrix: jax.Array) -> jax.Array:
    return (matrix + matrix.mT) / 2


def _check_decays(**decays: float) -> None:
    for name, value in decays.items():
        check_number(name, value, at_least=0, below=1)
