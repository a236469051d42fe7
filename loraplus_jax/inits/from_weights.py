"""Adapters that start from the base's weights or gradients: PiSSA, OLoRA, LoRA-GA and LoRA-One.

Where the first s A B is not zero, it is taken off the base, so that the model starts as the base. Only the adapted
leaves are new; with the old ones dropped, there is no second copy. `as_difference` makes of what is trained an
adapter for the untouched base.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from .._utils.validation import check_choice, check_int, check_number
from ..adapter.config import LoRAPlusConfig
from ..adapter.lora import weight_delta
from ..adapter.spec import AdapterSpec, Specs, reject_magnitude
from ..adapter.tree import flat_factors, flatten, rebox, replace_leaves, unflatten
from ..quantization.packed_array import is_packed

GAMMA = 16.0
"""The default of LoRA-GA's gamma."""
MatrixPair = tuple[np.ndarray, np.ndarray]
"""A and B as matrices, (batch..., inputs, r) and (batch..., r, outputs)."""
Start = tuple[dict[str, Any], dict[str, Any]]
"""The variables with the rest of the adapted weights, and the tree of factors, float32, for `"lora"`."""


def pissa(base: Mapping[str, Any], specs: Specs, *, iterations: int | None = None, seed: int = 0) -> Start:
    """Starts from each weight's largest singular values (PiSSA, arXiv 2404.02948, section 3).

    A = U √(S / s) and B = √(S / s) Vᵀ, of W's first r singular vectors and values.

    Args:
      base: variables without adapters, `{"params": ...}`; they stay as they are.
      specs: the table from `init_lora`.
      iterations: power iterations of a randomized decomposition (arXiv 0909.4061, algorithm 4.4), which costs
        products with 2 r columns; None for an exact one.
      seed: of its random start.

    Raises:
      ValueError: a weight is missing, packed, or has layers without adapters; an adapter is of variant dora; or
        `iterations` is below 0.
    """
    if iterations is not None:
        check_int("iterations", iterations, at_least=0)

    return _start(base, specs, lambda weight, spec: pissa_pair(weight, spec, iterations, seed))


def pissa_pair(weight: np.ndarray, spec: AdapterSpec, iterations: int | None, seed: int = 0) -> MatrixPair:
    """A and B of `pissa` for a weight as from `to_matrix`."""
    u, s, v = largest(weight, spec.rank, iterations, seed)
    root = np.sqrt(s / spec.scale)
    return u * root[..., None, :], root[..., None] * v


def olora(base: Mapping[str, Any], specs: Specs) -> Start:
    """Starts from the first r columns of each weight's QR decomposition (OLoRA, arXiv 2406.01775, section 3).

    Of Wᵀ = Q R, with orthonormal columns of Q in the output space: B = Qᵀ and A = Rᵀ.

    Args:
      base, specs: as for `pissa`.

    Raises:
      ValueError: as `pissa`.
    """

    return _start(base, specs, olora_pair)


def olora_pair(weight: np.ndarray, spec: AdapterSpec) -> MatrixPair:
    """A and B of `olora` for a weight as from `to_matrix`."""
    q, r = np.linalg.qr(weight.swapaxes(-1, -2))
    return r[..., : spec.rank, :].swapaxes(-1, -2), q[..., : spec.rank].swapaxes(-1, -2)


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

    With G = U S Vᵀ and c = out^(1/4) / √gamma: A = c U[:, :r] and B = c Vᵀ[r:2r]; the first steps of A and B then
    go in the directions of G's first 2 r singular values. `lora_one` (after arXiv 2502.01235) starts with a
    step against the gradient: A = -U √(S / gamma) and B = √(S / gamma) Vᵀ, of the first r values, S divided by its
    largest; the base stays whole.

    Args:
      base, specs: as for `pissa`.
      gradients: the loss's gradient by the adapted weights, a tree like `base`; other leaves may be missing.
      variant: which of the two.
      gamma: how small the factors start.
      iterations: as for `pissa`.

    Raises:
      ValueError: as `pissa`; or a gradient is missing, of another shape or not finite, or a weight has fewer than
        2 r singular values.
    """
    check_choice("variant", variant, ("lora_ga", "lora_one"))
    check_number("gamma", gamma, above=0)
    slopes = flatten(gradients)

    def start(_: np.ndarray, spec: AdapterSpec) -> MatrixPair:
        return gradient_pair(slopes.get(spec.leaf), spec, variant, iterations, gamma)

    return _start(base, specs, start, keep=variant == "lora_one")


def gradient_pair(
    slope: Any, spec: AdapterSpec, variant: str, iterations: int | None, gamma: float = GAMMA
) -> MatrixPair:
    """A and B of `lora_ga` for a weight's gradient, an array of the weight's shape."""
    if getattr(slope, "shape", None) != spec.shape or not np.isfinite(np.asarray(slope)).all():
        shape = getattr(slope, "shape", None)
        what = (
            "none" if shape is None else f"{shape}" if shape != spec.shape else "values that are not finite"
        )
        raise ValueError(f"gradients: {spec.leaf} must be finite and have shape {spec.shape}, got {what}")
    matrix, rank = to_matrix(slope, spec), spec.rank
    if variant == "lora_one":
        u, s, v = largest(matrix, rank, iterations)
        if not s[..., 0].all():
            raise ValueError(f"gradients: {spec.leaf} must not be zero, from which lora_one has no start")
        root = np.sqrt(s / s[..., :1] / gamma)
        return -u * root[..., None, :], root[..., None] * v
    if min(matrix.shape[-2:]) < 2 * rank:
        raise ValueError(
            f"{spec.leaf}: lora_ga needs {2 * rank} singular values, got {min(matrix.shape[-2:])}; lower the rank"
        )
    u, _, v = largest(matrix, 2 * rank, iterations)
    size = matrix.shape[-1] ** 0.25 / math.sqrt(gamma)
    return size * u[..., :rank], size * v[..., rank:, :]


def as_difference(
    lora: Mapping[str, Any], start: Mapping[str, Any], specs: Specs, config: LoRAPlusConfig
) -> tuple[dict[str, Any], dict[str, AdapterSpec], LoRAPlusConfig]:
    """The adapter of twice the rank that does on the untouched base what A and B do on the rest of it.

    s A B - s A₀ B₀ = s [A, A₀] [B; -B₀], for `save_peft`, `save_adapter` and `merge`.

    Args:
      lora: the trained factors.
      start: the factors that `pissa`, `olora` or `lora_ga` returned.
      specs, config: theirs.

    Returns:
      Factors, specs and config of the difference.
    """
    now, then = flat_factors(lora, specs), flat_factors(start, specs)
    new, doubled = {}, {}
    for module, spec in specs.items():
        for path, letters, sign in zip(spec.factor_paths(module), spec.factor_letters, (1, -1), strict=True):
            axis = letters.index("r")
            new[path] = jnp.concatenate([now[path], sign * jnp.asarray(then[path], now[path].dtype)], axis)
    grown = math.sqrt(2) if config.use_rslora else 2
    patterns = {
        "rank_pattern": {name: 2 * rank for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {name: grown * alpha for name, alpha in config.alpha_pattern.items()},
    }
    # init lora, since the start of what is saved no longer depends on the base.
    config = dataclasses.replace(
        config,
        rank=2 * config.rank,
        alpha=grown * config.alpha,
        init="lora",
        init_iterations=None,
        **patterns,
    )
    for module, spec in specs.items():
        scale = config.scale_of(module)
        doubled[module] = dataclasses.replace(spec, rank=2 * spec.rank, scale=scale)
    return unflatten(new), doubled, config


def to_matrix(weight: Any, spec: AdapterSpec) -> np.ndarray:
    """A weight as matrices (batch..., inputs, outputs); float32 if it is floating."""
    array = np.asarray(weight)
    array = array if array.dtype.kind in "iu" else array.astype(np.float32)
    batch, inputs, outputs = _sides(spec)
    sizes = dict(zip(spec.base_letters, spec.shape, strict=True))
    count = lambda side: math.prod(sizes[c] for c in side)  # noqa: E731
    array = np.einsum(f"{spec.base_letters}->{batch}{inputs}{outputs}", array)
    return array.reshape(*(sizes[c] for c in batch), count(inputs), count(outputs))


def to_factors(a: np.ndarray, b: np.ndarray, spec: AdapterSpec) -> tuple[jax.Array, jax.Array]:
    """Factors of matrices, (batch..., inputs, r) and (batch..., r, outputs), in the shapes of a spec."""
    batch, inputs, outputs = _sides(spec)
    sizes = dict(zip(spec.base_letters, spec.shape, strict=True)) | {"r": spec.rank}
    made = []
    for value, own, letters in ((a, f"{batch}{inputs}r", 0), (b, f"{batch}r{outputs}", 1)):
        value = value.reshape([sizes[c] for c in own])
        made.append(jnp.asarray(np.einsum(f"{own}->{spec.factor_letters[letters]}", value), jnp.float32))
    return made[0], made[1]


def _sides(spec: AdapterSpec) -> tuple[str, str, str]:
    """The letters of a weight's batch axes, inputs and outputs."""
    batch = "".join(c for c in spec.base_letters if all(c in side for side in spec.factor_letters))
    inputs, outputs = ("".join(c for c in side if c not in (*batch, "r")) for side in spec.factor_letters)
    return batch, inputs, outputs


def _start(
    base: Mapping[str, Any],
    specs: Specs,
    start: Callable[[np.ndarray, AdapterSpec], MatrixPair],
    *,
    keep: bool = False,
) -> Start:
    """Makes the factors of each weight, one after the other, and the rest of the weight unless it is kept."""
    reject_magnitude("a start from weights", specs)
    flat, rest, lora = flatten(base), {}, {}
    for module, spec in specs.items():
        weight = meta.unbox(flat.get(spec.leaf))
        if weight is None or is_packed(weight):
            what = (
                "is missing" if weight is None else f"is packed in {weight.kind}; pass the original weights"
            )
            raise ValueError(f"base: {spec.leaf} {what}")
        if spec.layers is not None:
            raise ValueError(f"{spec.leaf}: a start from weights needs adapters on all layers of the stack")
        pair = to_factors(*start(to_matrix(weight, spec), spec), spec)
        lora |= dict(zip(spec.factor_paths(module), pair, strict=True))
        if not keep:
            left = (jnp.asarray(weight, jnp.float32) - weight_delta(*pair, spec)).astype(weight.dtype)
            rest[spec.leaf] = rebox(flat[spec.leaf], left)
    return replace_leaves(base, rest), unflatten(lora)


def largest(
    matrix: np.ndarray, rank: int, iterations: int | None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first singular vectors and values of matrices, exact or from a random range (arXiv 0909.4061)."""
    if iterations is not None:
        columns = min(2 * rank, *matrix.shape[-2:])
        probe = np.random.default_rng(seed).normal(size=(*matrix.shape[:-2], matrix.shape[-1], columns))
        span, _ = np.linalg.qr(matrix @ probe.astype(matrix.dtype))
        for _ in range(iterations):
            back, _ = np.linalg.qr(matrix.swapaxes(-1, -2) @ span)
            span, _ = np.linalg.qr(matrix @ back)
        u, s, v = np.linalg.svd(span.swapaxes(-1, -2) @ matrix, full_matrices=False)
        u = span @ u
    else:
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u[..., :rank], s[..., :rank], v[..., :rank, :]
