"""What is trained at which rate, what one step really does, and the norms of each role."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..factor_pairs import spec_path
from ..spec import Specs
from ..tree import Role, count, label_params, leaves_by_path, leaves_by_role
from .lora_plus import Group, LoRAPlusTransform
from .schedules import rate_at


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """One trainable leaf: where it is, what it is, and what it is trained with at a step."""

    path: str
    shape: tuple[int, ...]
    role: Role
    rank: int | None
    rate: str
    decay: str
    count: int


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
        head = ("path", "shape", "role", "rank", "rate", "decay", "count")
        lines = [head, *(tuple(_cell(v) for v in dataclasses.astuple(row)) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
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
    trainable: Any,
    tx_or_rates: LoRAPlusTransform | Mapping[str, Any],
    specs: Specs | None = None,
    *,
    frozen: Any = None,
    step: int = 0,
) -> Description:
    """Every trainable leaf with its role, its group's rate and decay at a step, and its size.

    Args:
      trainable: trainable variables, arrays or shapes.
      tx_or_rates: from `lora_plus_adamw` or `lora_plus`; for an optimizer of your own a dict from role to rate or
        `Group`.
      specs: the table from `init_lora`.
      frozen: the frozen variables, to count the total.
      step: where schedules are read.

    Raises:
      TypeError: an optimizer that does not know its groups.
      ValueError: a role without a rate.
    """
    groups, relative = _groups(tx_or_rates)
    labels = leaves_by_path(label_params(trainable, specs))

    def row(path: str, leaf: Any) -> LeafRow:
        role = labels[path]
        if role not in groups:
            raise ValueError(f"no rate is given for role {role!r} of {path}")
        group = groups[role]
        spec = (specs or {}).get(spec_path(path.rpartition("/")[0]))
        rate = f"{float(rate_at(group.rate, step)):.3g}" + (" x base" if relative else "")
        decay = "own" if group.decay is None else f"{float(group.decay):.3g}"
        return LeafRow(path, tuple(leaf.shape), role, spec.rank if spec else None, rate, decay, leaf.size)

    rows = tuple(row(path, leaf) for path, leaf in leaves_by_path(trainable).items())
    trained = count(trainable)
    return Description(rows, trained, None if frozen is None else trained + count(frozen))


def probe(
    tx: optax.GradientTransformation,
    opt_state: Any,
    params: Any,
    grads: Any = None,
    *,
    specs: Specs | None = None,
) -> dict[str, jax.Array]:
    """The realised step: root mean square of each role's update, and their ratio `"b/a"`.

    Nothing is changed. With real gradients of a fresh adapter the ratio is infinite under `init="lora"`, since A's
    gradient is zero while B is; without `grads` every gradient is taken as one, and an Adam-type optimizer shows
    the ratio of its rates.

    Args:
      tx, opt_state: the optimizer and its state.
      params: trainable variables.
      grads: gradients, of the same structure.
      specs: the table from `init_lora`.
    """
    grads = jax.tree.map(jnp.ones_like, params) if grads is None else grads
    updates, _ = tx.update(grads, opt_state, params)
    labels = label_params(params, specs)
    result = {}
    for role, leaves in leaves_by_role(updates, labels).items():
        squares = sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)
        result[role] = jnp.sqrt(squares / sum(leaf.size for leaf in leaves))
    if "a" in result and "b" in result:
        result["b/a"] = result["b"] / result["a"]
    return result


def _groups(tx_or_rates: Any) -> tuple[Mapping[Any, Group], bool]:
    if isinstance(tx_or_rates, LoRAPlusTransform):
        return tx_or_rates.groups, tx_or_rates.relative
    if isinstance(tx_or_rates, Mapping):
        as_group = lambda rate: rate if isinstance(rate, Group) else Group(rate, None)  # noqa: E731
        return {role: as_group(rate) for role, rate in tx_or_rates.items()}, False
    raise TypeError(
        f"describe needs an optimizer from lora_plus_adamw or lora_plus, or a dict from role to rate, got "
        f"{type(tx_or_rates).__name__}; an optax.chain around one hides its groups"
    )


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "scalar"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
