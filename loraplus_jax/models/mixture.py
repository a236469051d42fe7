"""A mixture of experts: each token's sum over the gated MLPs that a router chose for it.

Axes in the comments: B sequences, T tokens, D hidden, E experts, I the width of an expert, K experts of a token.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from ..adapter.adapter_stack import ROW_AXES
from ..step.sharding import automatic_axes, mesh_axes_of_rows
from .attention_common import target_platform

Activation = Callable[[jax.Array], jax.Array]


def mix(
    x: jax.Array,
    shares: jax.Array,
    chosen: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation,
) -> jax.Array:
    """The sum of each token's experts, (B, T, D) in the dtype of x; no token is dropped.

    On a mesh each device computes its own rows, with its own experts where `"tensor"` divides them, and sums over
    `"tensor"`. GSPMD would sort the tokens of all devices, and gather all kernels.

    Args:
      x: (B, T, D).
      shares: (B, T, K), the factor of each expert's output.
      chosen: int32 (B, T, K), the experts of each token.
      gate_up: kernels (E, D, 2 I) of the gate, then of what it multiplies.
      down: kernels (E, I, D).
      activation: of the gate.
    """
    mesh, free, is_row = jax.sharding.get_abstract_mesh(), automatic_axes(), ROW_AXES.value is not None
    # Elsewhere XLA computes a ragged product as that of every row with every kernel, and JAX cannot batch one over
    # the rows of `apply_rows`.
    form = _grouped if target_platform() == "tpu" and not is_row else _in_blocks
    compute = functools.partial(_sum_of_experts, activation=activation, form=form)
    if is_row or not free:
        return compute(0, x, shares, chosen, gate_up, down)
    rows: tuple[str, ...] = mesh_axes_of_rows()
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
        rows = ()
    split = "tensor" if "tensor" in free and len(down) % mesh.shape["tensor"] == 0 else None

    def local(x: jax.Array, *args: jax.Array) -> jax.Array:
        if split is None:
            return compute(0, x, *args)
        first = jax.lax.axis_index(split) * len(args[-1])
        # Without it, JAX leaves the gradient of a gather from x unsummed over the axis.
        x = jax.lax.pcast(x, split, to="varying")
        return jax.lax.psum(compute(first, x, *args), split)

    of_rows, of_experts = PartitionSpec(rows), PartitionSpec(split)
    mapped = jax.shard_map(
        local,
        in_specs=(of_rows, of_rows, of_rows, of_experts, of_experts),
        out_specs=of_rows,
        axis_names=set(free),
    )
    return mapped(x, shares, chosen, gate_up, down)


def _sum_of_experts(
    first: int | jax.Array,
    x: jax.Array,
    shares: jax.Array,
    chosen: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation,
    form: Callable[..., jax.Array],
) -> jax.Array:
    """The part of the sum that is of the experts whose kernels are given, from number `first` on."""
    shape, chosen = x.shape, chosen - first
    x, shares, chosen = (value.reshape(-1, value.shape[-1]) for value in (x, shares, chosen))
    return form(x, shares, chosen, gate_up, down, activation).reshape(shape)


def _grouped(
    x: jax.Array,
    shares: jax.Array,
    chosen: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    activation: Activation,
) -> jax.Array:
    """Sorts the tokens by expert, each as often as it has experts, for products grouped by expert."""
    tokens, count = chosen.shape
    experts = len(down)
    # Those of other devices go last, in no group, where a product may leave anything.
    chosen = jnp.where((chosen >= 0) & (chosen < experts), chosen, experts).reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=experts + 1)[:experts].astype(jnp.int32)
    is_own = (chosen < experts)[order, None]
    rows = jnp.where(is_own, x[order // count], 0)
    gate, up = jnp.split(jax.lax.ragged_dot(rows, gate_up, sizes), 2, axis=-1)
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    y = jax.lax.ragged_dot(activation(gate) * up, down, sizes)
    y = jnp.where(is_own, y, 0)[jnp.argsort(order)].reshape(tokens, count, -1)
    return jnp.einsum("tkd,tk->td", y, shares)


def _in_blocks(
    x: jax.Array,
    shares: jax.Array,
    chosen: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    activation: Activation,
) -> jax.Array:
    """The same by batched products: the rows of each expert fill whole blocks, the last one with zeros.

    Computes with at most twice the rows, and twice the kernels, that the tokens choose, whatever they choose.
    """
    (tokens, count), experts = chosen.shape, len(down)
    size = -(-tokens * count // experts)
    blocks = (tokens * count + experts * (size - 1)) // size
    chosen = jnp.where((chosen >= 0) & (chosen < experts), chosen, experts).reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=experts + 1)
    ends = jnp.cumsum(-(-sizes // size))  # of each expert's blocks; those of other devices' rows go last
    first_row, first_slot = jnp.cumsum(sizes) - sizes, size * jnp.append(0, ends[:-1])
    # Where a row goes: beyond the last slot if it is for another device.
    slots = (first_slot - first_row)[chosen] + jnp.argsort(order)
    slots = jnp.where(chosen < experts, slots, blocks * size)
    token = jnp.full(blocks * size, tokens).at[slots].set(jnp.arange(len(slots)) // count, mode="drop")
    rows = x.at[token].get(mode="fill", fill_value=0).reshape(blocks, size, -1)
    expert = jnp.minimum(jnp.searchsorted(ends[:-1], jnp.arange(blocks), side="right"), experts - 1)

    # Else the backward pass would keep a copy of the kernels for each layer.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("gate", "up"))
    def products(rows: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        into, out = (w.at[expert].get(mode="promise_in_bounds") for w in (gate_up, down))
        gate, up = jnp.split(rows @ into, 2, axis=-1)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return (activation(gate) * up) @ out

    y = products(rows, gate_up, down).reshape(blocks * size, -1)
    y = y.at[slots].get(mode="fill", fill_value=0).reshape(tokens, count, -1)
    return jnp.einsum("tkd,tk->td", y, shares)
