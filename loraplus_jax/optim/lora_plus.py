"""LoRA+ as an optimizer transform: B learns lambda times faster than A (arXiv 2402.12354, section 4).

`lora_plus_adamw` builds the optimizer; `lora_plus` turns any optax optimizer into a LoRA+ one. Clipping belongs
outside the groups: inside them it would act on each group's norm alone.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import optax
from jax.core import Tracer

from .._validation import check_number, in_float32, suggest
from ..spec import Specs
from ..tree import ROLES, Policy, Role, label_params
from .schedules import Rate, scale_rate

FAST: tuple[Role, ...] = ("b", "vector")
"""The roles that learn lr_ratio times faster; the second occurs under the policy `"peft"` only."""
PEFT_EMBEDDING_RATE = 1e-6
MIN_EPS = 1e-30
"""Adam's epsilon, times 1 - b1, must not count as 0 in float32: while B is 0, so are A's gradients, and A's step is
0 / epsilon.
"""


class Group(NamedTuple):
    """What one role is trained with.

    Attributes:
      rate: its learning rate, or under `lora_plus` its multiple of the wrapped optimizer's.
      decay: its weight decay, multiplied by the rate in each step as AdamW does; None when the wrapped
        optimizer keeps its own.
    """

    rate: Rate
    decay: Any


class LoRAPlusTransform(optax.GradientTransformationExtraArgs):
    """An optax transform that also knows its groups, for `describe`; otherwise as any other transform.

    Attributes:
      groups: role to `Group`.
      relative: whether rates are multiples of a wrapped optimizer's.
    """

    groups: Mapping[Role, Group]
    relative: bool


def lora_plus_adamw(
    learning_rate: Rate,
    *,
    lr_ratio: float | jax.Array = 16.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: Literal["coupled", "equal"] = "coupled",
    max_grad_norm: float | None = None,
    rates: Mapping[str, Rate] | None = None,
    decays: Mapping[str, float] | None = None,
    specs: Specs | None = None,
    policy: Policy = "lora_plus",
    adjustable: bool = False,
) -> LoRAPlusTransform:
    """AdamW in which B's learning rate is `lr_ratio` times A's at every step, whatever the schedule.

    `optax.multi_transform` over `label_params` routes every role to its decay and rate; with `lr_ratio=1` the steps
    are those of `optax.adamw` over all parameters to the bit.

    Args:
      learning_rate: eta_A, for A and every role but B; a number, a traced scalar or an optax schedule.
      lr_ratio: lambda = eta_B / eta_A, above 0; it may be traced.
      b1, b2, eps: of Adam; eps at least `MIN_EPS`.
      weight_decay: w; a step shrinks a parameter by rate * w.
      decay: `"coupled"` shrinks B lambda times faster than A, as torch's and optax's AdamW do with such groups;
        `"equal"` shrinks both at A's pace.
      max_grad_norm: clips the norm over all groups together, before them.
      rates: other rates by role (`"embedding"`, `"magnitude"`, `"extra"`, or `"a"`); B's follows from lr_ratio.
      decays: other weight decays by role.
      specs: the table from `init_lora`, which tells embeddings apart and checks shapes.
      policy: `"peft"` groups as `create_loraplus_optimizer` of PEFT does: what is trained in full and has one axis
        learns at B's rate, biases and scales among it without decay; embeddings at 1e-6 if `rates` says no other.
      adjustable: keeps `learning_rate`, `lr_ratio`, `weight_decay` in the state, and those of `rates` and `decays`
        as `embedding_rate`, `extra_decay` and so on. There `optax.tree.get(state, "lr_ratio")` reads and
        `optax.tree.set(state, lr_ratio=2.0)` changes them in a run, without compiling again. A group without a rate
        or decay of its own follows the common one; a schedule goes on to set its own rate.

    Raises:
      ValueError: a ratio, rate or norm that is not a finite number above 0, an eps below `MIN_EPS`, or an unknown
        role or policy.

    Example:
      >>> tx = lora_plus_adamw(1e-3, lr_ratio=4.0)
      >>> tx.groups["b"].rate
      0.004
    """
    check_positive("lr_ratio", lr_ratio)
    check_number("eps", eps, at_least=MIN_EPS)
    check_number("b1", b1, at_least=0.0, below=1.0)
    check_number("b2", b2, at_least=0.0, below=1.0)
    rates, decays = dict(rates or {}), dict(decays or {})
    if policy == "peft":
        rates, decays = {"embedding": PEFT_EMBEDDING_RATE, **rates}, {"vector": 0.0, **decays}
    _check_groups(learning_rate, weight_decay, rates, decays)
    if decay not in ("coupled", "equal"):
        raise ValueError(f"decay must be 'coupled' or 'equal', got {decay!r}")

    def group(role: Role) -> Group:
        fast = role in FAST
        rate = rates.get("a" if fast else role, learning_rate)
        equal = role == "b" and decay == "equal"
        w = decays.get(role, decays.get("a", weight_decay) / lr_ratio if equal else weight_decay)
        return Group(scale_rate(rate, lr_ratio) if fast else rate, w)

    groups: dict[Role, Group] = {role: group(role) for role in ROLES}
    clip = []
    if max_grad_norm is not None:
        check_positive("max_grad_norm", max_grad_norm)
        clip = [optax.clip_by_global_norm(max_grad_norm)]
    # AdamW is Adam's direction, then decay, then rate. The first is the same for every role and is taken over the
    # whole tree: XLA rounds the bias correction of a part of a tree otherwise, and lambda = 1 would not be plain
    # LoRA to the bit.
    decay_and_rate: dict[Any, Any] = {
        role: optax.chain(optax.add_decayed_weights(g.decay), optax.scale_by_learning_rate(g.rate))
        for role, g in groups.items()
    }
    by_role = optax.multi_transform(decay_and_rate, _labels(specs, policy))
    chain = optax.chain(*clip, optax.scale_by_adam(b1=b1, b2=b2, eps=eps), by_role)
    if adjustable:
        again = functools.partial(lora_plus_adamw, b1=b1, b2=b2, eps=eps, decay=decay)
        again = functools.partial(again, max_grad_norm=max_grad_norm, specs=specs, policy=policy)
        common = {"learning_rate": learning_rate, "lr_ratio": lr_ratio, "weight_decay": weight_decay}
        chain = _adjustable(again, common, rates, decays)
    return _transform(chain, groups, relative=False)


def lora_plus(
    tx: optax.GradientTransformation,
    *,
    lr_ratio: float | jax.Array = 16.0,
    specs: Specs | None = None,
    policy: Policy = "lora_plus",
    adjustable: bool = False,
) -> LoRAPlusTransform:
    """Makes any optax optimizer a LoRA+ one: its finished updates of B are multiplied by `lr_ratio`.

    For AdamW the steps equal `lora_plus_adamw`'s with coupled decay. The wrapped optimizer keeps its own schedule,
    decay and clipping, and B is scaled once however many adapters there are. Multiplying B's *gradient* instead
    would do nothing under Adam.

    Args:
      tx: the whole optimizer, its learning rate included (AdamW, Lion, SGD with momentum, Adafactor, ...).
      lr_ratio: lambda, above 0; it may be traced.
      specs: the table from `init_lora`.
      policy: as in `lora_plus_adamw`, rates only: decay and the embeddings' rate are the wrapped optimizer's.
      adjustable: keeps `lr_ratio` in the state, as `lora_plus_adamw` does; whether the wrapped optimizer's own rate
        can be changed is its affair (`optax.inject_hyperparams`).

    Example:
      >>> tx = lora_plus(optax.sgd(0.1), lr_ratio=4.0)
    """
    check_positive("lr_ratio", lr_ratio)

    labels = _labels(specs, policy)

    def is_b(tree: Any) -> Any:
        return jax.tree.map(lambda role: role in FAST, labels(tree))

    def scaled_by(lr_ratio: float | jax.Array) -> optax.GradientTransformation:
        return optax.chain(tx, optax.masked(optax.scale(lr_ratio), is_b))  # pyright: ignore[reportArgumentType]

    scaled = (optax.inject_hyperparams(scaled_by) if adjustable else scaled_by)(lr_ratio)
    groups: dict[Role, Group] = {role: Group(lr_ratio if role in FAST else 1.0, None) for role in ROLES}
    return _transform(scaled, groups, relative=True)


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is traced, or a finite number above 0, and one of float32."""
    number = _number(value)
    if number is not None and not (math.isfinite(number) and number > 0 and in_float32(number)):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def _adjustable(
    make: Callable[..., optax.GradientTransformation], common: dict, rates: dict, decays: dict
) -> optax.GradientTransformation:
    """`make(**common, rates=rates, decays=decays)`, every value by a name of its own in the state."""
    by_name = {f"{role}_rate": ("rates", role) for role in rates}
    by_name |= {f"{role}_decay": ("decays", role) for role in decays}

    def flat(**values: Any) -> optax.GradientTransformation:
        groups: dict[str, dict] = {"rates": {}, "decays": {}}
        for name in by_name:
            kind, role = by_name[name]
            groups[kind][role] = values.pop(name)
        return make(**values, **groups)

    # Optax takes the names of what it keeps from the signature.
    names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in (*common, *by_name)]
    flat.__signature__ = inspect.Signature(names)  # pyright: ignore[reportFunctionMemberAccess]
    own = {name: {"rates": rates, "decays": decays}[kind][role] for name, (kind, role) in by_name.items()}
    return optax.inject_hyperparams(flat)(**common, **own)


def _number(value: Any) -> float | None:
    """The value as a float, NaN if it is no number; None while it is traced."""
    if isinstance(value, Tracer):
        return None
    try:
        return math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _check_groups(learning_rate: Rate, weight_decay: float, rates: dict, decays: dict) -> None:
    for role in (*rates, *decays):
        if role not in ROLES:
            raise ValueError(f"there is no group {role!r}{suggest(role, ROLES)}")
    if fast := [role for role in FAST if role in rates]:
        raise ValueError(f"rates: the rate of {fast[0]!r} is lr_ratio times A's; set lr_ratio instead")
    for name, rate in {"learning_rate": learning_rate, **rates}.items():
        if not callable(rate):
            check_positive(name, rate)
    for name, w in {"weight_decay": weight_decay, **decays}.items():
        number = _number(w)
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise ValueError(f"weight decay {name!r} must be a finite number of at least 0, got {w!r}")


def _labels(specs: Specs | None, policy: Policy) -> Callable[[Any], Any]:
    if policy not in get_args(Policy):
        raise ValueError(f"policy must be one of {', '.join(get_args(Policy))}, got {policy!r}")
    return functools.partial(label_params, specs=specs, policy=policy)


def _transform(
    tx: optax.GradientTransformation, groups: Mapping[Role, Group], *, relative: bool
) -> LoRAPlusTransform:
    transform = LoRAPlusTransform(tx.init, optax.with_extra_args_support(tx).update)
    transform.groups, transform.relative = groups, relative
    return transform
