"""LoRA+ as an optimizer transform: B learns lambda times faster than A (arXiv 2402.12354, section 4).

`lora_plus_adamw` gives every role a separate `optax.adamw`; `lora_plus` turns any optax optimizer into a LoRA+ one.
Clipping is applied before the groups; within a group it would see only that group's norm.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from .._utils.validation import check_choice, check_number
from ..adapter.config import LoRAPlusConfig
from ..adapter.spec import Specs
from ..adapter.tree import leaves_by_path, replace_paths
from .adalora import AdaLoRAState
from .keep_float32 import KeepFloat32State
from .pair_state import PairState
from .roles import ROLES, LoRAPlusState, Policy, Role, find_states, is_kernel, label_params
from .schedules import Rate

FAST: tuple[Role, ...] = ("b", "vector")
"""The roles that learn lr_ratio times faster; `"vector"` occurs only with policy `"peft"`."""
PEFT_EMBEDDING_RATE = 1e-6
MIN_EPS = 1e-30
"""Adam's epsilon times 1 - b1 must not underflow to 0 in float32: while B is 0, A's gradients are 0 and A's step is
0 / epsilon.
"""
_OWN_OPTIMIZERS = "optax.multi_transform with label_params and an optimizer for each role"
_RIGHT_ORDERS: Mapping[type, str] = {
    KeepFloat32State: "keep_float32(lora_plus(tx, lr_ratio))",
    AdaLoRAState: "adalora(lora_plus(tx, lr_ratio), singular_tx, ...)",
    optax.contrib.ScheduleFreeState: "optax.contrib.schedule_free(lora_plus(tx, lr_ratio), ...)",
    optax.contrib.SAMState: "optax.contrib.sam(lora_plus(tx, lr_ratio), adv_optimizer)",
    optax.contrib.MechanicState: "optax.contrib.mechanize(lora_plus(tx, lr_ratio))",
    optax.LookaheadState: "optax.lookahead(lora_plus(tx, lr_ratio), ...)",
    optax.contrib.MadgradState: _OWN_OPTIMIZERS,
    optax.contrib.COCOBState: _OWN_OPTIMIZERS,
}
"""Transforms, by state, whose updates are differences to parameters in the state, and the order to use instead.

There is no check for others: it would take two updates and a second set of parameters, and `probe` shows them.
"""


def _with_record(
    tx: optax.GradientTransformation,
    labels: Callable[[Any], Any],
    rates: Callable[[Any], dict[Role, tuple[Any, Any]]],
    *,
    ratio: Any,
    relative: bool,
    undecayed: Callable[[Any], frozenset[str]] = lambda _: frozenset(),
) -> optax.GradientTransformationExtraArgs:
    """Wraps `tx` to store its roles and rates in its state."""
    # So that `update` may always pass them on, such as the loss that optax's reduce_on_plateau needs.
    inner = optax.with_extra_args_support(tx)

    def record(state: Any, count: Any, step: Any, roles: tuple, undecayed: frozenset[str]) -> Any:
        used = {role for _, role in roles}
        used_rates = {role: pair for role, pair in rates(step).items() if role in used}
        # Copies, since a step that donates its state must not donate a hyperparameter's buffer twice.
        as_float = lambda x: jnp.array(x, jnp.float32)  # noqa: E731
        return LoRAPlusState(
            inner_state=state,
            count=count,
            rates={role: as_float(rate) for role, (rate, _) in used_rates.items()},
            decays={role: as_float(decay) for role, (_, decay) in used_rates.items() if decay is not None},
            roles=roles,
            relative=relative,
            undecayed=undecayed,
        )

    def init(params: Any) -> Any:
        check_floating(params)
        zero, state = jnp.zeros((), jnp.int32), inner.init(params)
        _check_wrapped(state, ratio)
        roles = tuple(leaves_by_path(labels(params)).items())
        return record(state, zero, zero, roles, undecayed(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        count = optax.safe_increment(state.count)
        return updates, record(inner_state, count, state.count, state.roles, state.undecayed)

    return optax.GradientTransformationExtraArgs(init, update)


def lora_plus_adamw(
    learning_rate: Rate,
    lr_ratio: float | jax.Array,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: Literal["coupled", "equal"] = "coupled",
    decay_mask: Any = None,
    embedding_learning_rate: Rate | None = None,
    head_learning_rate: Rate | None = None,
    magnitude_learning_rate: Rate | None = None,
    max_grad_norm: float | None = None,
    precondition: optax.GradientTransformation | None = None,
    direction: optax.GradientTransformation | None = None,
    specs: Specs | None = None,
    policy: Policy = "lora_plus",
) -> optax.GradientTransformationExtraArgs:
    """AdamW with a learning rate for B that is `lr_ratio` times A's at every step of the schedule.

    `optax.multi_transform` gives every role of `label_params` a separate `optax.adamw`; with `lr_ratio=1` the steps
    are bit-identical to those of `optax.adamw` over all parameters. Numbers may be traced:
    `optax.inject_hyperparams(lora_plus_adamw)(learning_rate=..., lr_ratio=4.0)` stores them in the state, where
    `optax.tree.set(state, lr_ratio=jnp.float32(2.0))` changes one without recompiling.

    Args:
      learning_rate: eta_A, for A and every role except B; a number, a traced scalar or an optax schedule.
      lr_ratio: lambda = eta_B / eta_A, above 0; a number or a traced scalar.
      b1, b2, eps: Adam's parameters; eps is at least `MIN_EPS`.
      weight_decay: w; a step shrinks a parameter by rate * w.
      decay: `"coupled"` shrinks B lambda times faster than A, as AdamW in PyTorch and optax does with such groups;
        `"equal"` shrinks both as fast as A.
      decay_mask: which leaves decay: `"kernels"` for factors and kernels, but not biases, the scales of norms and
        DoRA's magnitudes; or as in `optax.adamw` a tree of booleans, which may be a prefix of the parameters', or a
        function that returns one. None for all. A function needs `static_args="decay_mask"` in
        `optax.inject_hyperparams`.
      embedding_learning_rate: of embedding adapters; defaults to eta_A, or to 1e-6 with policy `"peft"`.
      head_learning_rate: of fully trained parameters (role `"extra"`); defaults to eta_A.
      magnitude_learning_rate: of DoRA's magnitudes; defaults to eta_A, and is B's with policy `"peft"`.
      max_grad_norm: maximum global gradient norm, over all groups; None disables clipping.
      precondition: a transform of the clipped gradients of all roles together, such as `scale_by_riemannian()`.
      direction: computes the steps of all roles together in Adam's place, such as `scale_by_lora_rite()`; `b1`,
        `b2` and `eps` then have no effect.
      specs: the table from `init_lora`, to check shapes.
      policy: `"peft"` groups like `create_loraplus_optimizer` of PEFT: fully trained parameters with one axis, and
        stacked ones named `bias` or `scale`, use B's learning rate; biases and the scales of LayerNorms (a `scale`
        next to a `bias`) have no weight decay.

    Returns:
      A transform with the state `LoRAPlusState`, whose rates are absolute.

    Raises:
      TypeError: a value is not a number; on `init`, a leaf is not floating point.
      ValueError: a number is out of range, eps is below `MIN_EPS`, or the policy is unknown; on `init`, lambda is
        not 1 with a direction for which it has no meaning.

    Example:
      >>> tx = lora_plus_adamw(1e-3, lr_ratio=4.0)
      >>> state = tx.init({"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((2, 3))})
      >>> {role: round(rate.item(), 4) for role, rate in state.rates.items()}
      {'a': 0.001, 'b': 0.004}
    """
    labels = _checked_labels(lr_ratio, specs, policy)
    check_choice("decay", decay, ("coupled", "equal"))
    if isinstance(decay_mask, str):
        check_choice("decay_mask", decay_mask, ("kernels",))
    check_number("b1", b1, at_least=0.0, below=1.0, allow_arrays=True)
    check_number("b2", b2, at_least=0.0, below=1.0, allow_arrays=True)
    check_number("eps", eps, at_least=MIN_EPS, allow_arrays=True)
    check_number("weight_decay", weight_decay, at_least=0.0, allow_arrays=True)
    if policy == "peft" and magnitude_learning_rate is not None:
        raise ValueError("magnitude_learning_rate requires policy lora_plus; with peft it is B's rate")
    if policy == "peft" and embedding_learning_rate is None:
        embedding_learning_rate = PEFT_EMBEDDING_RATE
    own_rates: dict[Role, Any] = {
        "a": learning_rate,
        "embedding": embedding_learning_rate,
        "magnitude": magnitude_learning_rate,
        "extra": head_learning_rate,
    }
    arguments = ("learning_rate", "embedding_learning_rate", "magnitude_learning_rate", "head_learning_rate")
    for name, rate in zip(arguments, own_rates.values(), strict=True):
        if not callable(rate) and (rate is not None or name == "learning_rate"):
            # `optax.inject_hyperparams` passes a schedule's value, which may be 0 before a warmup or after a decay.
            bound = {"at_least" if isinstance(rate, jax.Array) else "above": 0.0}
            check_number(name, rate, **bound, allow_arrays=True)
    if isinstance(lr_ratio, int | float) and lr_ratio == 1:
        fast = learning_rate  # the same object, so that the groups below are equal
    elif callable(learning_rate):
        fast = lambda step: lr_ratio * learning_rate(step)  # noqa: E731
    else:
        fast = lr_ratio * learning_rate
    own_rates |= dict.fromkeys(FAST, fast)
    own_decays: dict[Role, Any] = {"b": weight_decay / lr_ratio} if decay == "equal" else {}
    if policy == "peft":
        own_decays["vector"] = 0.0
    groups: dict[Role, tuple[Any, Any]] = {}
    for role in ROLES:
        rate = learning_rate if own_rates[role] is None else own_rates[role]
        groups[role] = rate, own_decays.get(role, weight_decay)
    undecayed = functools.partial(_undecayed, decay_mask)
    keys: dict[tuple[Role, bool], tuple[Any, Any]] = {(role, True): group for role, group in groups.items()}
    if decay_mask is not None:
        keys |= {(role, False): (rate, 0.0) for role, (rate, _) in groups.items()}
    # Roles with equal settings share one AdamW, so that with lr_ratio 1 there is one, as in plain LoRA. A traced
    # number or a schedule equals only itself: the state's structure must not depend on values that jit hides.
    first: dict[Any, tuple[Role, bool]] = {}
    key_of = {
        key: first.setdefault(tuple(x if isinstance(x, int | float) else id(x) for x in group), key)
        for key, group in keys.items()
    }

    def make_chain(rate: Any, w: Any) -> Any:
        if direction is None:
            return optax.adamw(rate, b1, b2, eps, weight_decay=w)
        return optax.chain(optax.add_decayed_weights(w), optax.scale_by_learning_rate(rate))

    def group_name(role: Role, decays: bool) -> str:
        return role if decays else f"{role}, no decay"

    def names(tree: Any) -> Any:
        # Of the whole tree, since the trees of single groups lack leaves, which a user's function may not expect.
        roles, without = labels(tree), undecayed(tree)
        chosen = {
            path: group_name(*key_of[role, path not in without])
            for path, role in leaves_by_path(roles).items()
        }
        return replace_paths(roles, chosen)

    chains: dict[Any, Any] = {group_name(*key): make_chain(*keys[key]) for key in first.values()}
    tx = optax.multi_transform(chains, names)
    before = [transform for transform in (precondition, direction) if transform is not None]
    if max_grad_norm is not None:
        check_number("max_grad_norm", max_grad_norm, above=0.0, allow_arrays=True)
        before.insert(0, optax.clip_by_global_norm(max_grad_norm))
    if before:
        tx = optax.chain(*before, tx)
    return _with_record(
        tx,
        labels,
        lambda step: {r: (rate(step) if callable(rate) else rate, w) for r, (rate, w) in groups.items()},
        ratio=lr_ratio,
        relative=False,
        undecayed=undecayed,
    )


def lora_plus(
    tx: optax.GradientTransformation,
    lr_ratio: float | jax.Array,
    *,
    specs: Specs | None = None,
    policy: Policy = "lora_plus",
) -> optax.GradientTransformationExtraArgs:
    """Turns any optax optimizer into a LoRA+ one, by multiplying its final updates of B by `lr_ratio`.

    The wrapped optimizer keeps its schedule, decay and clipping; for AdamW the steps equal those of
    `lora_plus_adamw` with coupled decay. `optax.inject_hyperparams(lora_plus)(tx, lr_ratio=...)` stores the ratio
    in the state.

    Some transforms keep parameters in their state and return the difference to them: `keep_float32`, `adalora`,
    `optax.lookahead`, and `schedule_free`, `sam` and `mechanize` of `optax.contrib`. They belong outside, as in
    `keep_float32(lora_plus(tx, 4.0))`, since each of their steps would correct the multiplied one before it. So do
    constraints such as `optax.keep_params_nonnegative`. With another such transform, `probe` shows another ratio
    than lambda after a few steps.

    Args:
      tx: the complete optimizer, including its learning rate (AdamW, Lion, SGD with momentum, Adafactor, ...).
      lr_ratio: lambda, above 0; a number or a traced scalar.
      specs: the table from `init_lora`.
      policy: as in `lora_plus_adamw`, but only for learning rates: the wrapped optimizer sets decay and the rate of
        embeddings.

    Returns:
      A transform with the state `LoRAPlusState`, whose rates are multiples of the rate of `tx`: `lr_ratio` for B
      and the role `"vector"`, and 1 for all others.

    Raises:
      ValueError, TypeError: lambda is not a number above 0; on `init`, the wrapped optimizer is a LoRA+ one, or one
        of those that belong outside, or lambda is not 1 with one for which it has no meaning.

    Example:
      >>> tx = lora_plus(optax.sgd(0.1), lr_ratio=4.0)
    """
    labels = _checked_labels(lr_ratio, specs, policy)

    def is_fast(tree: Any) -> Any:
        return jax.tree.map(lambda role: role in FAST, labels(tree))

    # The updates and not the gradients, whose size Adam ignores.
    scaled = optax.chain(tx, optax.masked(optax.scale(lr_ratio), is_fast))  # pyright: ignore[reportArgumentType]
    rates: dict[Role, tuple[Any, Any]] = {role: (lr_ratio if role in FAST else 1.0, None) for role in ROLES}
    return _with_record(scaled, labels, lambda _: rates, ratio=lr_ratio, relative=True)


def _check_wrapped(state: Any, ratio: Any) -> None:
    """Raises ValueError if a ratio does not belong around an optimizer, by the optimizer's state."""
    for inner in find_states(state, PairState, LoRAPlusState, *_RIGHT_ORDERS):
        if isinstance(inner, LoRAPlusState):
            raise ValueError("lr_ratio applies twice: a LoRA+ optimizer must not wrap another")
        if not isinstance(inner, PairState):
            name, right_order = type(inner).__name__.removesuffix("State"), _RIGHT_ORDERS[type(inner)]
            raise ValueError(
                f"a LoRA+ optimizer must not wrap {name}, which keeps parameters in its state: B, moved lr_ratio "
                f"times as far, would no longer match them; instead use {right_order}"
            )
        if not isinstance(ratio, Tracer) and not np.isclose(ratio, 1, rtol=1e-5):
            raise ValueError(
                f"lr_ratio must be 1 with LoRA-RITE and LoRA-Muon, got {float(ratio):g}: their steps of A B do not "
                "depend on how it is split into A and B, so a faster B has no meaning"
            )


def check_floating(trainable: Any) -> None:
    """Raises TypeError for a leaf that has no gradient, such as the packed integers of a quantized base."""
    for path, leaf in leaves_by_path(trainable).items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(f"{path} must be floating point, got {leaf.dtype}; pass trainable variables only")


def _undecayed(mask: Any, tree: Any) -> frozenset[str]:
    """The paths of the leaves that a `decay_mask` exempts; see `lora_plus_adamw`."""
    if mask is None:
        return frozenset()
    leaves = leaves_by_path(tree)
    if isinstance(mask, str):
        return frozenset(path for path, leaf in leaves.items() if not is_kernel(path, leaf))
    mask = mask(tree) if callable(mask) else mask
    full = jax.tree.map(lambda keep, part: jax.tree.map(lambda _: keep, part), mask, tree)
    return frozenset(path for path, keep in leaves_by_path(full).items() if not keep)


def _checked_labels(lr_ratio: Any, specs: Specs | None, policy: Policy) -> Callable[[Any], Any]:
    if isinstance(lr_ratio, LoRAPlusConfig):
        raise TypeError("lr_ratio must be a number, got a LoRAPlusConfig; pass config.lr_ratio")
    check_number("lr_ratio", lr_ratio, above=0.0, allow_arrays=True)
    check_choice("policy", policy, get_args(Policy))
    return functools.partial(label_params, specs=specs, policy=policy)
