"""What is trained at which rate, what one step really does, and the norms of each role."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..factor_pairs import spec_path
from ..roles import Role, find_states, labels_of, leaves_by_role
from ..spec import Specs
from ..tree import count, leaves_by_path
from .lora_plus import LoRAPlusTransform, check_floating


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """One trainable leaf: where it is, what it is, and what it is trained with.

    Attributes:
      rate: the learning rate, or its multiple of a wrapped optimizer's; None where another one trains the leaf.
      decay: the weight decay; None where it is a wrapped optimizer's.
      relative: whether the rate is a multiple.
    """

    path: str
    shape: tuple[int, ...]
    role: Role
    rank: int | None
    rate: float | None
    decay: float | None
    count: int
    relative: bool = False


@dataclasses.dataclass(frozen=True)
class Description:
    """The audit table of a set of trainable leaves; `str()` lays it out.

    Attributes:
      rows: one a leaf.
      trainable: values trained.
      total: values in the whole model, or None when `frozen` was not given.
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
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, self.summary])

    @property
    def summary(self) -> str:
        """`trainable 1,234 of 56,789 (2.17 %)`."""
        if self.total is None:
            return f"trainable {self.trainable:,}"
        share = 100 * self.trainable / self.total
        return f"trainable {self.trainable:,} of {self.total:,} ({share:.3g} %)"


def describe(
    trainable: Any, optimizer: Any, specs: Specs | None = None, *, frozen: Any = None, step: int = 0
) -> Description:
    """Every trainable leaf with its role, learning rate, weight decay and size, as the optimizer applies them.

    Args:
      trainable: trainable variables, arrays or shapes.
      optimizer: a transform from `lora_plus_adamw` or `lora_plus`, whose schedules are read at `step`; or the state
        of any optimizer with one in it (`optax.chain`, `optax.inject_hyperparams`, `nnx.Optimizer.opt_state`),
        which holds the rates of its last update.
      specs: the table from `init_lora`, for ranks.
      frozen: the frozen variables, to count the total.
      step: where a transform's schedules are read.

    Raises:
      TypeError: an optimizer without LoRA+ in it, or a leaf that cannot be trained (packed integers).
    """
    check_floating(trainable)
    if isinstance(optimizer, LoRAPlusTransform):
        rates, relative = optimizer.rates(step), optimizer.relative
        groups: dict[str, Any] = {
            path: (role, *rates[role], relative)
            for path, role in leaves_by_path(optimizer.labels(trainable)).items()
        }
    else:
        groups = {
            path: (role, state.rates[role], state.decays.get(role), state.relative)
            for state in find_states(optimizer)
            for path, role in state.roles
        }
    if not groups.keys() & leaves_by_path(trainable).keys():
        raise TypeError(
            "describe needs a transform from lora_plus_adamw or lora_plus, or an optimizer state that holds one, "
            f"and the tree it was made for, got {type(optimizer).__name__}; for an optax.chain pass its state"
        )
    rows = []
    for path, leaf in leaves_by_path(trainable).items():
        role, rate, decay, relative = groups.get(path, ("extra", None, None, False))
        rate, decay = (None if x is None else float(np.asarray(x)) for x in (rate, decay))
        spec = (specs or {}).get(spec_path(path.removesuffix("/value").rpartition("/")[0]))
        rank = spec.rank if spec and role in ("a", "b", "embedding") else None
        rows.append(LeafRow(path, tuple(leaf.shape), role, rank, rate, decay, leaf.size, relative))
    trained = count(trainable)
    return Description(tuple(rows), trained, None if frozen is None else trained + count(frozen))


def probe(
    tx: optax.GradientTransformation, opt_state: Any, params: Any, grads: Any = None
) -> dict[str, jax.Array]:
    """The realised step: root mean square of each role's update, and their ratio `"b/a"`.

    Nothing is changed. With real gradients of a fresh adapter the ratio is infinite under `init="lora"`, since A's
    gradient is zero while B is; without `grads` every gradient is taken as one, and an Adam-type optimizer shows
    the ratio of its rates. Roles are those by which the optimizer routes; see `labels_of`.

    Args:
      tx, opt_state: the optimizer and its state.
      params: trainable variables.
      grads: gradients, of the same structure.
    """
    grads = jax.tree.map(jnp.ones_like, params) if grads is None else grads
    updates, _ = tx.update(grads, opt_state, params)
    result = {}
    for role, leaves in leaves_by_role(updates, labels_of(opt_state, params)).items():
        squares = sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)
        result[role] = jnp.sqrt(squares / sum(leaf.size for leaf in leaves))
    if "a" in result and "b" in result:
        result["b/a"] = result["b"] / result["a"]
    return result
