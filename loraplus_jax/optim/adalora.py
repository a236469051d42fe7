"""AdaLoRA: trains A B as P Λ Q and gives the rank to the modules that need it (arXiv 2303.10512).

The model stays plain LoRA, with A = P and B = Λ Q. P, the singular values Λ and Q are in the optimizer's state, and
the chain rule gives their gradients. One column of P, its value in Λ and the row of Q are a triplet, a component of
the rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._utils.validation import check_int, check_number
from ..adapter.dora import widen
from ..adapter.spec import Factor, Specs
from ..adapter.tree import leaves_by_path, replace_paths
from .pair_state import pair_factors

_Q_STD = 0.02
"""PEFT's standard deviation of new rows of Q."""


class Triplets(NamedTuple):
    """Numbers of all triplets, float32 or wider: P by A's path, Λ (batch..., r) and Q by B's path."""

    p: dict[str, jax.Array]
    values: dict[str, jax.Array]
    q: dict[str, jax.Array]


class AdaLoRAState(NamedTuple):
    """The state of `adalora`.

    Attributes:
      step: number of updates, int32.
      triplets: P, Λ and Q.
      sensitivity, uncertainty: the averages whose product is a weight's importance.
      initial_budget, target_budget: numbers of triplets that train at first and in the end, int32.
      inner_state, singular_state: states of the wrapped optimizer and of Λ's.
    """

    step: jax.Array
    triplets: Triplets
    sensitivity: Triplets
    uncertainty: Triplets
    initial_budget: jax.Array
    target_budget: jax.Array
    inner_state: Any
    singular_state: Any


def adalora(
    tx: optax.GradientTransformation,
    singular_tx: optax.GradientTransformation,
    *,
    steps: int,
    target_rank: float,
    initial_steps: int,
    final_steps: int,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality: float = 1e-3,
    seed: int = 0,
    specs: Specs | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains P, Λ and Q of all pairs, and keeps only the most important triplets (arXiv 2303.10512, algorithm 1).

    A weight's importance is the product of two moving averages: of its sensitivity `|w g|`, and of how far that is
    from its average. A triplet's is that of its value in Λ plus the means over its column of P and its row of Q
    (section 3.2). For `initial_steps` all triplets train. Then the budget falls by a cubic to `target_rank` a
    module: every `every` steps Λ becomes 0 in all triplets except the most important ones of all modules, layers
    and batch indices. Until the next such step they all train, so that a triplet can return. In the last
    `final_steps` the choice is fixed (section 3.3).

    PEFT's names are in parentheses; its `init_r` is the rank of the factors. Its regularizer is the mean over
    factors of norms that are not squared, so its default 0.5 pulls about as strongly, with 144 factors, as 1e-3
    here.

    A component that is 0 in A and B, as in layers without adapter, does not count and stays 0. Besides the moments
    the state holds three float32 numbers for each number in a factor: that of P or Q, and two averages.

    Args:
      tx: optimizer of P (with A's role), of Q (with B's) and of all other leaves, such as
        `lora_plus_adamw(1e-4, 4.0)`.
      singular_tx: optimizer of Λ, such as `optax.adamw(1e-4)`.
      steps: all steps of the training (`total_step`).
      target_rank: mean rank of a module in the end (`target_r`); the paper starts with 1.5 times as much.
      initial_steps: steps before the budget falls (`tinit`).
      final_steps: steps with the target budget (`tfinal`).
      every: steps between two choices of triplets (`deltaT`).
      beta1, beta2: decay of the average sensitivity and of the average uncertainty.
      orthogonality: weight of ‖PᵀP - I‖² + ‖QQᵀ - I‖², summed over pairs (`orth_reg_weight`).
      seed: seed of the rows of Q.
      specs: the table from `init_lora`, as for `scale_by_riemannian`.

    Returns:
      A transform whose state holds the roles and rates of `tx`, if that has them.

    Raises:
      ValueError, TypeError: a number is out of range, `initial_steps` and `final_steps` leave no step between them,
        `target_rank` is above the mean rank, the tree has no pair, or a pair's axes are ambiguous.

    Example:
      >>> from loraplus_jax import lora_plus_adamw
      >>> tx = adalora(lora_plus_adamw(1e-4, 4.0), optax.adamw(1e-4), steps=1000, target_rank=8,
      ...              initial_steps=100, final_steps=300, every=10)
    """
    check_int("steps", steps, at_least=1)
    check_number("target_rank", target_rank, above=0)
    check_int("initial_steps", initial_steps, at_least=0)
    check_int("final_steps", final_steps, at_least=0)
    check_int("every", every, at_least=1)
    check_number("beta1", beta1, at_least=0, below=1)
    check_number("beta2", beta2, at_least=0, below=1)
    check_number("orthogonality", orthogonality, at_least=0)
    check_int("seed", seed, at_least=0)
    if initial_steps + final_steps >= steps:
        raise ValueError(
            f"initial_steps {initial_steps} + final_steps {final_steps} must be below {steps} steps"
        )
    inner = optax.with_extra_args_support(tx)
    last = steps - final_steps

    def init(params: Any) -> AdaLoRAState:
        leaves = leaves_by_path(params)
        pairs = pair_factors(leaves, specs)
        triplets = _split(leaves, pairs, jax.random.key(seed))
        modules = sum(math.prod(x.shape[:-1]) for x in triplets.values.values())
        if target_rank > (mean := sum(x.size for x in triplets.values.values()) / modules):
            raise ValueError(f"target_rank must be at most {mean:g}, the mean rank, got {target_rank:g}")
        can_learn = [jnp.any(b.rows(triplets.q[b.path]), -1) for _, b in pairs]
        total = sum(jnp.sum(x) for x in can_learn)
        target = jnp.round(target_rank * sum(jnp.sum(jnp.any(x, -1)) for x in can_learn))
        return AdaLoRAState(
            step=jnp.zeros((), jnp.int32),
            triplets=triplets,
            sensitivity=jax.tree.map(jnp.zeros_like, triplets),
            uncertainty=jax.tree.map(jnp.zeros_like, triplets),
            initial_budget=jnp.asarray(total, jnp.int32),
            target_budget=jnp.minimum(target, total).astype(jnp.int32),
            inner_state=inner.init(replace_paths(params, triplets.p | triplets.q)),
            singular_state=singular_tx.init(triplets.values),
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("adalora needs the factors: pass params to update")
        leaves, old = leaves_by_path(params), state.triplets
        pairs = pair_factors(leaves, specs)
        grads = _gradients(old, leaves_by_path(updates), pairs, orthogonality)
        step: Any = optax.safe_increment(state.step)

        # Importances are final when the choice is: then it is the same at every step.
        learns = step < last
        now = jax.tree.map(lambda w, g: jnp.abs(w * g), old, grads)

        def average(decay: float, old: Triplets, new: Triplets) -> Triplets:
            return jax.tree.map(lambda x, y: jnp.where(learns, decay * x + (1 - decay) * y, x), old, new)

        sensitivity = average(beta1, state.sensitivity, now)
        distance = jax.tree.map(lambda x, mean: jnp.abs(x - mean), now, sensitivity)
        uncertainty = average(beta2, state.uncertainty, distance)

        moved, inner_state = inner.update(
            replace_paths(updates, grads.p | grads.q),
            state.inner_state,
            replace_paths(params, old.p | old.q),
            **extra,
        )
        shifts: Any
        shifts, singular_state = singular_tx.update(grads.values, state.singular_state, old.values)
        flat: Any = leaves_by_path(moved)
        steps_p, steps_q = ({path: flat[path] for path in part} for part in (old.p, old.q))
        new = jax.tree.map(jnp.add, old, Triplets(steps_p, dict(shifts), steps_q))
        scores = jax.tree.map(jnp.multiply, sensitivity, uncertainty)
        importance = {
            b.path: scores.values[b.path]
            + a.rows(scores.p[a.path]).mean(-1)
            + b.rows(scores.q[b.path]).mean(-1)
            for a, b in pairs
        }
        left = jnp.clip((last - step) / (last - initial_steps), 0, 1)
        budget = budget_at(left, state.initial_budget, state.target_budget)
        chooses = ~learns | ((step > initial_steps) & (step % every == 0))
        kept = most_important(importance, budget)
        new = new._replace(
            values={path: jnp.where(kept[path] | ~chooses, x, 0) for path, x in new.values.items()}
        )
        factors = new.p | {
            b.path: b.restore(new.values[b.path][..., None] * b.rows(new.q[b.path])) for _, b in pairs
        }
        # In float32, since optax adds an update in its dtype before it rounds the sum to the factor's.
        moved = replace_paths(moved, {path: x - widen(leaves[path]) for path, x in factors.items()})
        return moved, state._replace(
            step=step,
            triplets=new,
            sensitivity=sensitivity,
            uncertainty=uncertainty,
            inner_state=inner_state,
            singular_state=singular_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def budget_at(left: Any, initial: Any, target: Any) -> jax.Array:
    """The number of triplets to keep, int32, when a share `left` of the steps that lower it is left.

    >>> [int(budget_at(left, 16, 8)) for left in (1.0, 0.5, 0.0)]
    [16, 9, 8]
    """
    # As in PEFT; the paper's formula subtracts `final_steps` once more, and so does not start at the full rank. The
    # addend keeps float32 from rounding a whole number down.
    return target + jnp.floor((initial - target) * left**3 + 1e-4).astype(jnp.int32)


def most_important(importance: Mapping[str, jax.Array], budget: Any) -> dict[str, jax.Array]:
    """Which triplets, bool in the shapes of `importance`, are the `budget` most important; of equal ones the first.

    >>> kept = most_important({"q": jnp.array([3.0, 1.0]), "v": jnp.array([2.0, 0.5])}, 2)
    >>> kept["q"].tolist(), kept["v"].tolist()
    ([True, False], [True, False])
    """
    flat = jnp.concatenate([x.reshape(-1) for x in importance.values()])
    # By rank in the sort, since a threshold would keep too many of equal values; the budget is traced.
    order = jnp.argsort(flat, descending=True)
    kept = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(flat.size) < budget)
    parts = jnp.split(kept, np.cumsum([x.size for x in importance.values()])[:-1])
    return {path: part.reshape(x.shape) for (path, x), part in zip(importance.items(), parts, strict=True)}


Pairs = Sequence[tuple[Factor, Factor]]


def _split(leaves: Mapping[str, Any], pairs: Pairs, key: jax.Array) -> Triplets:
    """P, Λ and Q with P = A and Λ Q = B; where a row of B is 0, Λ is 0 and the row of Q random."""
    triplets = Triplets({}, {}, {})
    for number, pair in enumerate(pairs):
        a, b = (factor.rows(widen(leaves[factor.path])) for factor in pair)
        values = jnp.linalg.norm(b, axis=-1)
        is_zero = values == 0
        # Each rank's rows by themselves, so that they do not depend on the number of ranks.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(key, number), jnp.arange(b.shape[-2])
        )
        shape = (*b.shape[:-2], b.shape[-1])
        drawn = _Q_STD * jax.vmap(lambda k, s=shape, d=b.dtype: jax.random.normal(k, s, d), out_axes=-2)(keys)
        drawn = jnp.where(jnp.any(a, -1, keepdims=True), drawn, 0)
        q = jnp.where(is_zero[..., None], drawn, b / jnp.where(is_zero, 1, values)[..., None])
        # A copy, since a step that donates parameters and state must not donate a buffer twice.
        path_a, path_b = (factor.path for factor in pair)
        triplets.p[path_a] = jnp.array(widen(leaves[path_a]))
        triplets.values[path_b] = values
        triplets.q[path_b] = pair[1].restore(q)
    return triplets


def _gradients(triplets: Triplets, grads: Mapping[str, Any], pairs: Pairs, orthogonality: float) -> Triplets:
    """The gradients of P, Λ and Q from those of A and B, with the regularizer's."""
    # By hand: autodiff does not know that the Gram matrix is symmetric, and would compute its product twice.
    result = Triplets({}, {}, {})
    for a, b in pairs:
        p, q = a.rows(triplets.p[a.path]), b.rows(triplets.q[b.path])
        g_a, g_b = (factor.rows(widen(grads[factor.path])) for factor in (a, b))
        g_p = g_a + orthogonality * _orthogonality_gradient(p)
        g_q = triplets.values[b.path][..., None] * g_b + orthogonality * _orthogonality_gradient(q)
        result.p[a.path] = a.restore(g_p)
        result.values[b.path] = jnp.sum(g_b * q, -1)
        result.q[b.path] = b.restore(g_q)
    return result


def _orthogonality_gradient(rows: jax.Array) -> jax.Array:
    """The gradient of ‖X Xᵀ - I‖² by the rows X, (batch..., r, n)."""
    gram = rows @ rows.mT
    # Broadcast explicitly, since jax_numpy_rank_promotion may be set to raise.
    return 4 * ((gram - jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)) @ rows)
