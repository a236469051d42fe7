"""Keeps float32 copies of parameters that are stored in fewer bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..adapter.dora import widen


class KeepFloat32State(NamedTuple):
    """The state of `keep_float32`: float32 copies of the parameters, and the state of the wrapped optimizer."""

    masters: Any
    inner_state: Any


def keep_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer `tx` keep parameters and moments in float32 while the model holds them in bfloat16.

    bfloat16 has 8 bits of precision, so an update below 1/512 of a parameter is lost when it is added. Here it is
    added to a float32 copy, and the parameters are that copy rounded. Libraries that make factors in the base's
    dtype, such as qwix and tunix, train so. Costs 4 bytes a parameter, and as many more for each moment.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state `KeepFloat32State`. Its `update` requires `params`,
      and its updates are float32 or wider.
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
