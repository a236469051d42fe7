"""Riemannian preconditioning: the gradient of each factor is scaled by the other factor."""

from typing import Any

import jax.numpy as jnp
import optax

from .._utils.validation import check_number
from ..adapter.dora import widen
from ..adapter.spec import Specs
from ..adapter.tree import leaves_by_path, replace_paths
from .pair_state import pair_factors


def scale_by_riemannian(reg: float = 1e-2, *, specs: Specs | None = None) -> optax.GradientTransformation:
    """Preconditions the gradients of a pair by its other factor (arXiv 2402.02347, section 4).

    g_A becomes g_A (B·Bᵀ + reg I)⁻¹, and g_B becomes (Aᵀ·A + reg I)⁻¹ g_B, in our layout, A (in, r) and B (r, out);
    the paper writes the transpose. Other leaves pass unchanged. Put it before an optimizer, which keeps its rates:
    `optax.chain(scale_by_riemannian(), lora_plus_adamw(1e-4, 4.0))`. It has no state, and costs two products and a
    solution of r equations a pair, in float32 or wider.

    Args:
      reg: added to the diagonal of both; PEFT's default.
      specs: the table from `init_lora`; needed where shapes do not tell which axes of a factor are a batch.

    Returns:
      An `optax.GradientTransformation`, whose `update` requires `params` and keeps the gradients' dtypes.

    Raises:
      ValueError: `reg` is not above 0, the tree has no pair, or a pair's axes are ambiguous.
    """
    check_number("reg", reg, above=0)

    def init(params: Any) -> optax.EmptyState:
        pair_factors(leaves_by_path(params), specs)  # for its errors
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("scale_by_riemannian needs the factors: pass params to update")
        leaves, grads = leaves_by_path(params), leaves_by_path(updates)
        new = {}
        for pair in pair_factors(leaves, specs):
            rows = [factor.rows(widen(leaves[factor.path])) for factor in pair]
            for factor, other in zip(pair, rows[::-1], strict=True):
                gram = other @ other.mT
                gram += jnp.broadcast_to(reg * jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
                grad = grads[factor.path]
                # Solved for the identity: a solve with all columns of the gradient is one thread of LAPACK.
                solved = jnp.linalg.inv(gram) @ factor.rows(grad.astype(gram.dtype))
                new[factor.path] = factor.restore(solved).astype(grad.dtype)
        return replace_paths(updates, new), state

    return optax.GradientTransformation(init, update)
