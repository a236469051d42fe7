"""Transforms that see the factors A and B of a pair together, and float32 copies of factors in bfloat16."""

import string
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._validation import check_number
from ..factor_pairs import Pair, factor_pairs, spec_path
from ..spec import Specs
from ..tree import leaves_by_path, replace_paths


def scale_by_riemannian(reg: float = 1e-2, *, specs: Specs | None = None) -> optax.GradientTransformation:
    """Preconditions the gradients of a pair by its other factor (arXiv 2402.02347, section 4).

    g_A becomes g_A (B·Bᵀ + reg I)⁻¹, and g_B becomes (Aᵀ·A + reg I)⁻¹ g_B, in our layout, A (in, r) and B (r, out);
    the paper writes the transpose. Other leaves pass unchanged. Put it before an optimizer, which keeps its rates:
    `optax.chain(scale_by_riemannian(), lora_plus_adamw(1e-4, 4.0))`. It has no state, and costs two products and a
    solution of r equations a pair, in float32 or wider.

    Args:
      reg: added to the diagonal of both; PEFT's default.
      specs: the table from `init_lora`; needed where shapes do not tell which axes of a factor are a batch.

    Raises:
      ValueError: `reg` is not above 0, the tree has no pair, or a pair's axes are ambiguous.
    """
    check_number("reg", reg, above=0)

    def init(params: Any) -> optax.EmptyState:
        pair_layouts(leaves_by_path(params), specs)  # for its errors
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("scale_by_riemannian needs the factors: pass params to update")
        leaves, grads = leaves_by_path(params), leaves_by_path(updates)
        new = {}
        for pair, layouts in pair_layouts(leaves, specs).items():
            rows = [layout.wide_rows(leaves[path]) for layout, path in zip(layouts, pair, strict=True)]
            for layout, path, other in zip(layouts, pair, rows[::-1], strict=True):
                gram = other @ other.mT
                gram += jnp.broadcast_to(reg * jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
                grad = layout.rows(grads[path].astype(gram.dtype))
                # Solved for the identity: a solve with all columns of the gradient is one thread of LAPACK.
                solved = jnp.linalg.inv(gram) @ grad
                new[path] = layout.restore(solved, grads[path].shape).astype(grads[path].dtype)
        return replace_paths(updates, new), state

    return optax.GradientTransformation(init, update)


class Layout(NamedTuple):
    """How a factor becomes rows: (batch..., r, all other axes as one).

    Attributes:
      order: its axes in that order.
      batch: how many of them are batch axes, such as those of stacked layers.
    """

    order: tuple[int, ...]
    batch: int

    def rows(self, x: Any) -> Any:
        """A factor (or its gradient) as rows, one for each rank component."""
        x = x.transpose(self.order)
        return x.reshape(*x.shape[: self.batch + 1], -1)

    def wide_rows(self, x: Any) -> Any:
        """The same in float32 or wider."""
        return self.rows(widen(x))

    def restore(self, rows: Any, shape: tuple[int, ...]) -> Any:
        """The inverse of `rows`, for a factor of a shape."""
        return rows.reshape([shape[axis] for axis in self.order]).transpose(np.argsort(self.order))


def pair_layouts(leaves: Mapping[str, Any], specs: Specs | None = None) -> dict[Pair, tuple[Layout, Layout]]:
    """The pairs of a tree, given as path to leaf, with the layouts of A and B.

    Raises:
      ValueError: there is no pair, or shapes leave open which axes are a batch.
    """
    found = factor_pairs(leaves, specs)
    if not found:
        raise ValueError(
            f"found no pair of factors among {', '.join(list(leaves)[:3]) or 'no leaves'}; this transform needs A "
            "and B in one tree: put it outside optax.multi_transform and optax.masked"
        )
    layouts = {}
    for module, pair in found.items():
        spec = (specs or {}).get(spec_path(module))
        a, b = (tuple(leaves[path].shape) for path in pair)
        letters = spec.factor_letters if spec is not None else _letters(module, a, b)
        layouts[pair] = layouts_of(letters)
    return layouts


def layouts_of(letters: tuple[str, str]) -> tuple[Layout, Layout]:
    """The layouts of A and B from their einsum letters, such as those of a spec.

    >>> layouts_of(("lir", "lro"))
    (Layout(order=(0, 2, 1), batch=1), Layout(order=(0, 1, 2), batch=1))
    """
    batch = [c for c in letters[0] if c in letters[1] and c != "r"]
    orders = ((*batch, "r", *(c for c in side if c not in (*batch, "r"))) for side in letters)
    a, b = (
        Layout(tuple(map(side.index, order)), len(batch)) for side, order in zip(letters, orders, strict=True)
    )
    return a, b


def _letters(module: str, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[str, str]:
    """One letter per axis of A and B, `r` for the rank, the same letter for a batch axis of both."""
    names = [c for c in string.ascii_letters if c != "r"]
    found = []
    for batch in range(min(len(a), len(b)) - 1):
        if a[:batch] != b[:batch]:
            break
        shared, rest_a, rest_b = (
            "".join(names[:batch]),
            names[batch : len(a) - 1],
            names[len(a) : len(a) + len(b) - batch - 1],
        )
        if a[-1] == b[batch]:  # A (batch..., in..., r), B (batch..., r, out...)
            found.append((f"{shared}{''.join(rest_a)}r", f"{shared}r{''.join(rest_b)}"))
        elif a[batch] == b[batch + 1]:  # PyTorch's: A (r, in...), B (out, r, ...)
            found.append((f"{shared}r{''.join(rest_a)}", f"{shared}{rest_b[0]}r{''.join(rest_b[1:])}"))
    if len(found) != 1:
        raise ValueError(
            f"{module or 'the tree'}: factors {a} and {b} may have several batch axes; pass specs from init_lora"
        )
    return found[0]


class KeepFloat32State(NamedTuple):
    """The state of `keep_float32`: float32 copies of the parameters, and the state of the wrapped optimizer."""

    masters: Any
    inner_state: Any


def keep_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer keep parameters and moments in float32 while the model holds them in bfloat16.

    bfloat16 has 8 bits of precision, so an update below 1/512 of a parameter is lost when it is added. Here it is
    added to a float32 copy, and the parameters are that copy rounded. Libraries that make factors in the base's
    dtype, such as qwix and tunix, train so. Costs 4 bytes a parameter, and as many more for each moment in float32.

    Args:
      tx: any optimizer; it sees float32 parameters and gradients.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> KeepFloat32State:
        # Copies, since a step that donates parameters and state must not donate a buffer twice.
        masters = jax.tree.map(lambda p: jnp.array(widen(p)), params)
        return KeepFloat32State(masters, inner.init(masters))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("keep_float32 needs the parameters: pass params to update")
        updates, inner_state = inner.update(
            jax.tree.map(widen, updates), state.inner_state, state.masters, **extra
        )
        masters = optax.apply_updates(state.masters, updates)
        # In float32: optax adds them in that dtype before it rounds.
        moved = jax.tree.map(lambda new, p: new - widen(p), masters, params)
        return moved, KeepFloat32State(masters, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def widen(x: Any) -> Any:
    """An array in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
