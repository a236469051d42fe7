"""Inspects learning rates per parameter (`describe`), and the updates that a step makes (`probe`)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._utils.validation import check_choice
from ..adapter.spec import Specs
from ..adapter.tree import count, leaves_by_path, replace_paths
from .find_pairs import spec_paths
from .lora_plus import check_floating
from .roles import LoRAPlusState, Role, find_states, labels_of, leaves_by_role


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """One trainable leaf.

    Attributes:
      path: path in the trainable variables, str.
      shape: shape, tuple of int.
      role: a `Role`, str.
      rank: rank of the factor, int; None for other leaves, and without specs.
      rate: learning rate, or the multiple of a wrapped optimizer's, float; None if another optimizer trains the
        leaf.
      decay: weight decay, float; None if a wrapped or another optimizer sets it.
      count: number of values, int.
      relative: whether `rate` is a multiple, bool.
      merged: the operations for which each call adds up W + s A B, str, empty if there are none; None if `merged`
        was not passed to `describe` or `rank` is None.
    """

    path: str
    shape: tuple[int, ...]
    role: Role
    rank: int | None
    rate: float | None
    decay: float | None
    count: int
    relative: bool = False
    merged: str | None = None


@dataclasses.dataclass(frozen=True)
class Description:
    """A table of all trainable leaves; `str()` formats it.

    Attributes:
      rows: one `LeafRow` per leaf, tuple.
      trainable: number of trainable values, int.
      total: number of values in the whole model, int; None if `frozen` was not passed.
    """

    rows: tuple[LeafRow, ...]
    trainable: int
    total: int | None

    def __str__(self) -> str:
        lines = [("path", "shape", "role", "rank", "rate", "decay", "count")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            rate = "-" if row.rate is None else f"{row.rate:.3g}" + (" x base" if row.relative else "")
            decay = "-" if row.decay is None else f"{row.decay:.3g}"
            rank = "-" if row.rank is None else str(row.rank)
            lines.append((row.path, shape, row.role, rank, rate, decay, f"{row.count:,}"))
        if any(row.merged is not None for row in self.rows):
            kinds = {None: "-", "": "by rank"}
            products = ("product", *(kinds.get(r.merged, f"merged for {r.merged}") for r in self.rows))
            lines = [(*line, product) for line, product in zip(lines, products, strict=True)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, self.summary])

    @property
    def summary(self) -> str:
        """The number of trainable values, such as `trainable 1,234 of 56,789 (2.17 %)`."""
        if self.total is None:
            return f"trainable {self.trainable:,}"
        share = 100 * self.trainable / self.total
        return f"trainable {self.trainable:,} of {self.total:,} ({share:.3g} %)"


def describe(
    trainable: Any,
    optimizer: Any,
    specs: Specs | None = None,
    *,
    frozen: Any = None,
    step: int = 0,
    merged: Mapping[str, str] | None = None,
) -> Description:
    """Lists every trainable leaf with its role and size, and the learning rate and weight decay it gets.

    Args:
      trainable: trainable variables, arrays or shapes.
      optimizer: a transform from `lora_plus_adamw` or `lora_plus`, or one that contains it (`optax.chain`,
        `optax.inject_hyperparams`), for the rates at `step`; or its state, for the rates of its last update.
      specs: the table from `init_lora`, for ranks.
      frozen: frozen variables, to count the total.
      step: step at which to evaluate a transform's schedules.
      merged: the operations for which each call adds up a weight, by path, from `functions.whole_weights` or
        `nnx.check_reads`; the table then says how each product is computed.

    Returns:
      A `Description` with one row per leaf, in the order of `trainable`.

    Raises:
      ValueError: `merged` names a path that the specs lack, or `step` is not 0 with a state, or with a
        transform such as `optax.MultiSteps` that does not pass on every update.
      TypeError: the optimizer contains no LoRA+ transform, or a leaf is not trainable (packed integers).
    """
    check_floating(trainable)
    if isinstance(optimizer, optax.GradientTransformation | optax.MultiSteps):
        states = _states_at(optimizer, trainable, step)
    elif step:
        raise ValueError(f"step must be 0 with a state, which has its last rates, got {step}")
    else:
        states = find_states(optimizer)
    groups: dict[str, Any] = {
        path: (
            role,
            state.rates[role],
            0.0 if path in state.undecayed else state.decays.get(role),
            state.relative,
        )
        for state in states
        for path, role in state.roles
    }
    if not groups.keys() & leaves_by_path(trainable).keys():
        raise TypeError(
            "optimizer must contain lora_plus or lora_plus_adamw for these trainable variables, got "
            f"{type(optimizer).__name__}"
        )
    for name in merged or ():
        check_choice("merged", name, sorted(specs or {}))
    module_of = lambda path: path.removesuffix("/value").rpartition("/")[0]  # noqa: E731
    is_factor = lambda path: path in groups and groups[path][0] in ("a", "b", "embedding")  # noqa: E731
    keys = spec_paths({module_of(path) for path in groups if is_factor(path)}, specs)
    rows = []
    for path, leaf in leaves_by_path(trainable).items():
        role, rate, decay, relative = groups.get(path, ("extra", None, None, False))
        rate, decay = (None if x is None else float(np.asarray(x)) for x in (rate, decay))
        key = keys[module_of(path)] if is_factor(path) else ""
        rank = specs[key].rank if is_factor(path) and specs and key in specs else None
        whole = None if merged is None or rank is None else merged.get(key, "")
        rows.append(LeafRow(path, tuple(leaf.shape), role, rank, rate, decay, leaf.size, relative, whole))
    trained = count(trainable)
    return Description(tuple(rows), trained, None if frozen is None else trained + count(frozen))


def _states_at(tx: Any, params: Any, step: int) -> list[LoRAPlusState]:
    """The LoRA+ states of an optimizer in its update at a step."""

    def run() -> list[LoRAPlusState]:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        state = tx.init(zeros)
        # Multiples are the same at every step; the wrapped optimizer's update may need more, such as the loss.
        if step and not all(found.relative for found in find_states(state)):
            # A schedule reads its step from an optax state's leaf `count`; no public call sets all of them.
            counts = {
                p: jnp.full_like(x, step)
                for p, x in leaves_by_path(state).items()
                if f"/{p}".endswith("/count")
            }
            _, state = tx.update(zeros, replace_paths(state, counts), zeros)
        return [found.replace(inner_state=None) for found in find_states(state)]

    try:
        states = jax.jit(run)()  # under jit, where the compiler drops the moments
    except TypeError as error:  # JAX's errors about traced numbers are such, too
        raise ValueError(
            "the optimizer has no rates by step, as its update needs more than gradients or a schedule cannot be "
            f"traced: {str(error).splitlines()[0]:.160}; pass its state and step=0"
        ) from error
    if step and any(not state.relative and state.count != step + 1 for state in states):
        raise ValueError(f"step must be 0 with an optimizer that skips updates, got {step}; pass the inner")
    return states


def probe(
    tx: optax.GradientTransformation, opt_state: Any, params: Any, grads: Any = None, **extra_args: Any
) -> dict[str, jax.Array]:
    """Computes the root mean square of each role's next update, and the ratio `"b/a"`, without changing anything.

    With all gradients one, an Adam-type optimizer shows the ratio of its learning rates. With the real gradients of
    a new adapter with `init="lora"` the ratio is infinite, since A's are zero while B is. After a few steps, a
    ratio other than lambda shows that `lora_plus` wraps a transform which belongs outside; see there.

    The updates of `keep_float32` also round the parameters: pass its inner optimizer, `state.inner_state` and
    `state.masters`.

    Args:
      tx, opt_state: optimizer and its state.
      params: trainable variables.
      grads: gradients, with the structure of `params`; by default all ones. In the middle of `optax.MultiSteps`
        they stand for all micro-batches that are left.
      extra_args: what else the optimizer's `update` needs, such as `value=loss`.

    Returns:
      Scalars by role, for the roles that occur, and under `"b/a"` if both A and B occur.
    """
    grads = jax.tree.map(jnp.ones_like, params) if grads is None else grads

    def update(earlier: Any, done: jax.Array, state: Any) -> tuple[Any, jax.Array, Any]:
        updates, new = tx.update(grads, state, params, **extra_args)
        # What accumulates gives zeros; of several, each may end at another micro-batch.
        kept = jax.tree.map(lambda old, new: jnp.where(jnp.any(new), new, old), earlier, updates)
        pairs = zip(*(find_states(each, optax.MultiStepsState) for each in (state, new)), strict=True)
        ended = [jnp.all(after.mini_step <= before.mini_step) for before, after in pairs]
        return kept, done | jnp.array(ended, bool), new

    first = jax.tree.map(jnp.zeros_like, params)
    carry = update(first, jnp.zeros(len(find_states(opt_state, optax.MultiStepsState)), bool), opt_state)
    if carry[1].size:
        carry = jax.lax.while_loop(lambda carry: ~carry[1].all(), lambda carry: update(*carry), carry)
    updates, *_ = carry
    groups = leaves_by_role(updates, labels_of(opt_state, params))
    result = {role: optax.tree.norm(leaves) / math.sqrt(count(leaves)) for role, leaves in groups.items()}
    if "a" in result and "b" in result:
        result["b/a"] = result["b"] / result["a"]
    return result
