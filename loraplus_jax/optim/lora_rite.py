"""Optimizers whose steps do not depend on how W's update is split into A and B: LoRA-RITE and LoRA-Muon.

Replacing A by A R and B by R⁻¹ B leaves A B as it is, and with these optimizers also every later A B. So a ratio of
the rates of B and A has no meaning for them.

In the equations here a factor is (batch..., r, n): its rows are rank components. The other factor's Gram matrix
S, (r, r), gives R = S^(-1/2), and with it an orthonormal basis of its rows; a gradient in that basis is R g.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._utils.validation import check_number
from ..adapter.spec import Specs
from .pair_state import corrected_average, inverse_root, transform_pairs


class RiteFactor(NamedTuple):
    """What LoRA-RITE keeps of one factor, float32 or wider."""

    moment: jax.Array  # of the preconditioned gradients, (batch..., r, n)
    second: jax.Array  # second moment, (batch..., r, r)
    escaped: jax.Array  # second moment that left the other factor's subspace, (batch...,)
    basis: jax.Array  # of the other factor, (batch..., r, n of the other)


def scale_by_lora_rite(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, *, specs: Specs | None = None
) -> optax.GradientTransformation:
    """LoRA-RITE's direction for pairs (arXiv 2410.20625, algorithm 1), and Adam's for other leaves.

    Both moments are kept in a basis of the other factor's rows and follow it as it turns; what the second moment
    loses by the turn is added to all directions. Costs eight eigendecompositions of (r, r) a pair.

    Args:
      b1, b2: decay of the first and second moment.
      eps: added to the root of the second moment.
      specs: the table from `init_lora`, as for `scale_by_riemannian`.

    Returns:
      An `optax.GradientTransformation` with the state `PairState`. It applies no learning rate, and its `update`
      requires `params`.

    Raises:
      ValueError: a number is out of range, the tree has no pair, or a pair's axes are ambiguous.
    """
    check_number("b1", b1, at_least=0, below=1)
    check_number("b2", b2, at_least=0, below=1)
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
        second = turn @ old.second @ turn.mT
        # Rounding leaves it unsymmetric, and eigvalsh reads only one triangle.
        second = (second + second.mT) / 2
        lost = jnp.linalg.eigvalsh(old.second) - jnp.linalg.eigvalsh(second)
        escaped = old.escaped + jnp.maximum(lost.max(-1), 0)
        second = corrected_average(second, grad @ grad.mT / grad.shape[-1], b2, count)
        escaped = corrected_average(escaped, jnp.zeros_like(escaped), b2, count)
        values, vectors = jnp.linalg.eigh(second)
        values = 1 / (jnp.sqrt(jnp.maximum(values, 0) + escaped[..., None]) + eps)
        step = (vectors * values[..., None, :]) @ (vectors.mT @ grad)
        moment = corrected_average(turn @ old.moment, step, b1, count)
        return root @ moment, RiteFactor(moment, second, escaped, basis)

    return transform_pairs(init, update, optax.scale_by_adam(b1, b2), specs)


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    specs: Specs | None = None,
) -> optax.GradientTransformation:
    """The optimizer LoRA-RITE: `scale_by_lora_rite` with a rate, that of A and of B alike, and decoupled decay.

    Returns:
      An `optax.GradientTransformation`, whose `update` requires `params`.
    """
    return optax.chain(
        scale_by_lora_rite(b1, b2, eps, specs=specs),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
