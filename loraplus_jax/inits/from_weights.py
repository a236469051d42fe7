"""Adapters that start from the base's weights or gradients: PiSSA, OLoRA, LoRA-GA and LoRA-One.

`make_factors` makes A and B; `subtract_start` subtracts their s A B from the base, so that the model starts as the
base; `as_difference` makes of what is trained an adapter for the untouched base.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from .._utils.multihost import gather_to_host
from .._utils.validation import check_choice, check_int, check_number
from ..adapter.config import BASE_INITS, LoRAPlusConfig
from ..adapter.lora import weight_delta
from ..adapter.spec import AdapterSpec, Specs, reject_magnitude
from ..adapter.tree import factors_by_module, flatten, rebox, replace_leaves, unflatten
from ..quantization.packed_array import is_packed

GAMMA = 16.0
"""The default of LoRA-GA's gamma."""
Start = tuple[dict[str, Any], dict[str, Any]]
"""The variables with the rest of the adapted weights, and the tree of factors, float32, for `"lora"`."""


def pissa(base: Mapping[str, Any], specs: Specs, *, iterations: int | None = None, seed: int = 0) -> Start:
    """Starts from each weight's largest singular values (PiSSA, arXiv 2404.02948, section 3).

    A = U √(S / s) and B = √(S / s) Vᵀ, of W's first r singular vectors and values.

    Args:
      base: variables without adapters, `{"params": ...}`; they stay as they are.
      specs: the table from `init_lora`.
      iterations: power iterations of a randomized decomposition (arXiv 0909.4061, algorithm 4.4); None: exact.
      seed: of its random start.

    Returns:
      Variables like `base` with W - s A B for the adapted weights, in their dtype, and the tree of factors,
      float32, for `"lora"`.

    Raises:
      ValueError: a weight is missing, packed, or has layers without adapters; an adapter is of variant dora; or
        `iterations` is below 0.
    """
    if iterations is not None:
        check_int("iterations", iterations, at_least=0)
    return _start("pissa", base, specs, base, iterations=iterations, seed=seed)


def olora(base: Mapping[str, Any], specs: Specs) -> Start:
    """Starts from the first r columns of each weight's QR decomposition (OLoRA, arXiv 2406.01775, section 3).

    Of Wᵀ = Q R, with orthonormal columns of Q in the output space: B = Qᵀ and A = Rᵀ.

    Args:
      base, specs: as for `pissa`.

    Returns:
      As `pissa`.

    Raises:
      ValueError: as `pissa`.
    """
    return _start("olora", base, specs, base)


def lora_ga(
    base: Mapping[str, Any],
    gradients: Mapping[str, Any],
    specs: Specs,
    *,
    variant: Literal["lora_ga", "lora_one"] = "lora_ga",
    gamma: float = GAMMA,
    iterations: int | None = None,
) -> Start:
    """Starts from the singular vectors of one batch's gradient (LoRA-GA, arXiv 2407.05000, section 3).

    With G = U S Vᵀ and c = out^(1/4) / √gamma: A = c U[:, :r] and B = c Vᵀ[r:2r]. `lora_one` (after arXiv
    2502.01235) starts with a step against the gradient: A = -U √(S / gamma) and B = √(S / gamma) Vᵀ, of the first r
    values, S divided by its largest; the base stays whole.

    Args:
      base, specs: as for `pissa`.
      gradients: the loss's gradient by the adapted weights, a tree like `base`; other leaves may be missing.
      variant: which of the two.
      gamma: how small the factors start.
      iterations: as for `pissa`.

    Returns:
      As `pissa`; for `lora_one` with the weights of `base` unchanged.

    Raises:
      ValueError: as `pissa`; or a gradient is missing, of another shape or not finite, or a weight has fewer than
        2 r singular values.
    """
    check_choice("variant", variant, ("lora_ga", "lora_one"))
    check_number("gamma", gamma, above=0)
    return _start(variant, base, specs, gradients, iterations=iterations, gamma=gamma)


def make_factors(
    init: str,
    specs: Specs,
    read: Callable[[str], Any],
    *,
    iterations: int | None = None,
    gamma: float = GAMMA,
    seed: int = 0,
) -> dict[str, Any]:
    """Makes the factors of all specs by one of `BASE_INITS`.

    `read` returns by a weight's path what the init makes its factors of, `BASE_INITS[init].source`: an array of the
    weight's shape, which may be sharded over processes, or None if it is missing. Raises ValueError as `lora_ga`.

    Returns:
      The tree of factors for `"lora"`, float32 NumPy arrays.
    """
    reject_magnitude(f"init {init}", specs)
    lora = {}
    for module, spec in specs.items():
        if spec.layers is not None:
            raise ValueError(f"{spec.leaf}: init {init} needs adapters on all layers of the stack")
        array = gather_to_host(read(spec.leaf))
        shape = getattr(array, "shape", None)
        if shape != spec.shape or not np.isfinite(array).all():
            what = "none" if shape is None else shape if shape != spec.shape else "values that are not finite"
            raise ValueError(
                f"{BASE_INITS[init].source}: {spec.leaf} must be finite and have shape {spec.shape}, got {what}"
            )
        of_a, of_b = spec.factors_of(module)
        a, b = _pair(init, to_matrix(array, spec), spec, iterations, gamma, seed)
        lora[of_a.path] = np.asarray(of_a.restore(a.swapaxes(-1, -2)), np.float32)
        lora[of_b.path] = np.asarray(of_b.restore(b), np.float32)
    return unflatten(lora)


def _pair(
    init: str, matrix: np.ndarray, spec: AdapterSpec, iterations: int | None, gamma: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A and B as matrices, (batch..., inputs, r) and (batch..., r, outputs)."""
    rank, least = spec.rank, min(matrix.shape[-2:])
    if init == "olora":
        q, r = np.linalg.qr(matrix.swapaxes(-1, -2))
        return r[..., :rank, :].swapaxes(-1, -2), q[..., :rank].swapaxes(-1, -2)
    if init == "lora_ga" and least < 2 * rank:
        raise ValueError(f"{spec.leaf}: lora_ga needs {2 * rank} singular values, got {least}; lower rank")
    u, s, v = _largest(matrix, 2 * rank if init == "lora_ga" else rank, iterations, seed)
    if init == "lora_ga":
        size = matrix.shape[-1] ** 0.25 / math.sqrt(gamma)
        return size * u[..., :rank], size * v[..., rank:, :]
    if init == "lora_one":
        if not s[..., 0].all():
            raise ValueError(f"gradients: {spec.leaf} must not be zero, from which lora_one has no start")
        u, root = -u, np.sqrt(s / s[..., :1] / gamma)
    else:  # s A B is nearest to the matrix: for pissa to the weight, for loftq to what quantization lost
        root = np.sqrt(s / spec.scale)
    return u * root[..., None, :], root[..., None] * v


def subtract_start(
    init: str, base: Mapping[str, Any], start: Mapping[str, Any], specs: Specs
) -> dict[str, Any]:
    """Variables with W - s A B for the adapted weights, in their dtype and sharding, if the init subtracts it.

    `start` and `specs` are the tree of factors and their table.
    """
    flat, factors, rest = flatten(base), factors_by_module("start", start, specs), {}

    def subtract(weight: jax.Array, a: jax.Array, b: jax.Array, spec: AdapterSpec) -> jax.Array:
        return (weight.astype(jnp.float32) - weight_delta(a, b, spec)).astype(weight.dtype)

    for module, spec in specs.items() if BASE_INITS[init].subtracted else ():
        weight = jnp.asarray(meta.unbox(flat[spec.leaf]))
        # The training step is compiled for exactly this sharding; JAX could infer another.
        compiled = jax.jit(subtract, static_argnames="spec", out_shardings=weight.sharding)
        left = compiled(weight, *factors[module], spec=spec)
        rest[spec.leaf] = rebox(flat[spec.leaf], left)
    return replace_leaves(base, rest)


def as_difference(
    lora: Mapping[str, Any], start: Mapping[str, Any], specs: Specs, config: LoRAPlusConfig
) -> tuple[dict[str, Any], dict[str, AdapterSpec], LoRAPlusConfig]:
    """Makes the adapter of twice the rank that does on the untouched base what A and B do on the rest of it.

    s A B - s A₀ B₀ = s [A, A₀] [B; -B₀], for `save_peft`, `save_adapter` and `merge`.

    Args:
      lora: the trained factors.
      start: the factors that `pissa`, `olora` or `lora_ga` returned.
      specs, config: theirs; the result has its own.

    Returns:
      The tree of factors in the dtypes of `lora`, their table and config, with twice the rank and `init="lora"`.
    """
    now, then = (factors_by_module(*each, specs) for each in (("lora", lora), ("start", start)))
    new = {}
    for module, spec in specs.items():
        factors = zip(spec.factors_of(module), now[module], then[module], (1, -1), strict=True)
        for factor, x, first, sign in factors:
            both = [x, sign * jnp.asarray(first, x.dtype)]
            new[factor.path] = jnp.concatenate(both, factor.letters.index("r"))
    grown = math.sqrt(2) if config.use_rslora else 2  # of alpha, so that the scale s stays
    config = dataclasses.replace(
        config,
        rank=2 * config.rank,
        alpha=grown * config.alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: grown * alpha for name, alpha in config.alpha_pattern.items()},
        init="lora",  # the start of what is saved no longer depends on the base
        init_iterations=None,
    )
    doubled = {
        module: dataclasses.replace(spec, rank=2 * spec.rank, scale=config.scale_of(module))
        for module, spec in specs.items()
    }
    return unflatten(new), doubled, config


def to_matrix(weight: Any, spec: AdapterSpec) -> np.ndarray:
    """A weight as float32 matrices `(batch..., inputs, outputs)`, with stacked axes among the batch axes."""
    a, b = spec.factors_of("")
    inputs, outputs = ("".join(c for c in f.letters if c not in (*f.batch, "r")) for f in (a, b))
    array = np.einsum(f"{spec.base_letters}->{a.batch}{inputs}{outputs}", np.asarray(weight, np.float32))
    return array.reshape(*array.shape[: len(a.batch)], *spec.sides)


def _start(
    init: str, base: Mapping[str, Any], specs: Specs, arrays: Mapping[str, Any], **options: Any
) -> Start:
    flat, sources = flatten(base), flatten(arrays)
    for spec in specs.values():
        weight = meta.unbox(flat.get(spec.leaf))
        if weight is None or is_packed(weight):
            what = "missing" if weight is None else f"packed in {weight.kind}; pass the original weights"
            raise ValueError(f"base: {spec.leaf} is {what}")
    lora = make_factors(init, specs, lambda leaf: meta.unbox(sources.get(leaf)), **options)
    lora = jax.tree.map(jnp.asarray, lora)
    return subtract_start(init, base, lora, specs), lora


def _largest(
    matrix: np.ndarray, rank: int, iterations: int | None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first singular vectors and values of matrices, exact or from a random range (arXiv 0909.4061)."""
    span = None
    if iterations is not None:
        columns = min(2 * rank, *matrix.shape[-2:])
        probe = np.random.default_rng(seed).normal(size=(*matrix.shape[:-2], matrix.shape[-1], columns))
        span, _ = np.linalg.qr(matrix @ probe.astype(matrix.dtype))
        # Without the decomposition in between, rounding would leave only the largest singular value's direction.
        for _ in range(iterations):
            back, _ = np.linalg.qr(matrix.swapaxes(-1, -2) @ span)
            span, _ = np.linalg.qr(matrix @ back)
    projected = matrix if span is None else span.swapaxes(-1, -2) @ matrix
    u, s, v = np.linalg.svd(projected, full_matrices=False)
    u = u if span is None else span @ u
    return u[..., :rank], s[..., :rank], v[..., :rank, :]
