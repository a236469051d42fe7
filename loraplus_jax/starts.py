"""Adapters that start from the base's weights or gradients: PiSSA, OLoRA, LoRA-GA, LoRA-One, orthogonal factors.

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

from ._validation import check_choice, check_int, check_number
from .config import LoRAPlusConfig
from .lora import weight_delta
from .quantization import is_packed
from .spec import AdapterSpec, Specs, reject_magnitude
from .tree import flat_factors, flatten, rebox, replace_leaves, unflatten

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

    def start(weight: np.ndarray, spec: AdapterSpec) -> tuple[np.ndarray, np.ndarray]:
        u, s, v = _largest(weight, spec.rank, iterations, seed)
        root = np.sqrt(s / spec.scale)
        return u * root[..., None, :], root[..., None] * v

    return _start(base, specs, start)


def olora(base: Mapping[str, Any], specs: Specs) -> Start:
    """Starts from the first r columns of each weight's QR decomposition (OLoRA, arXiv 2406.01775, section 3).

    Of Wᵀ = Q R, with orthonormal columns of Q in the output space: B = Qᵀ and A = Rᵀ.

    Args:
      base, specs: as for `pissa`.

    Raises:
      ValueError: as `pissa`.
    """

    def start(weight: np.ndarray, spec: AdapterSpec) -> tuple[np.ndarray, np.ndarray]:
        q, r = np.linalg.qr(weight.swapaxes(-1, -2))
        return r[..., : spec.rank, :].swapaxes(-1, -2), q[..., : spec.rank].swapaxes(-1, -2)

    return _start(base, specs, start)


def lora_ga(
    base: Mapping[str, Any],
    gradients: Mapping[str, Any],
    specs: Specs,
    *,
    variant: Literal["lora_ga", "lora_one"] = "lora_ga",
    gamma: float = 16.0,
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

    Raises:
      ValueError: as `pissa`; or a gradient is missing, of another shape or not finite, or a weight has fewer than
        2 r singular values.
    """
    check_choice("variant", variant, ("lora_ga", "lora_one"))
    check_number("gamma", gamma, above=0)
    slopes = flatten(gradients)
    for spec in specs.values():
        shape = getattr(slopes.get(spec.leaf), "shape", None)
        if shape != spec.shape or not np.isfinite(np.asarray(slopes[spec.leaf])).all():
            what = (
                "none"
                if shape is None
                else f"{shape}"
                if shape != spec.shape
                else "values that are not finite"
            )
            raise ValueError(f"gradients: {spec.leaf} must be finite and have shape {spec.shape}, got {what}")

    def start(weight: np.ndarray, spec: AdapterSpec) -> tuple[np.ndarray, np.ndarray]:
        slope, rank = to_matrix(slopes[spec.leaf], spec), spec.rank
        u, s, v = np.linalg.svd(slope, full_matrices=False)
        if variant == "lora_one":
            root = np.sqrt(s[..., :rank] / s[..., :1] / gamma)
            return -u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
        if s.shape[-1] < 2 * rank:
            raise ValueError(
                f"{spec.leaf}: lora_ga needs {2 * rank} singular values, got {s.shape[-1]}; lower the rank"
            )
        size = weight.shape[-1] ** 0.25 / math.sqrt(gamma)
        return size * u[..., :rank], size * v[..., rank : 2 * rank, :]

    return _start(base, specs, start, keep=variant == "lora_one")


def orthogonal(key: jax.Array, specs: Specs) -> dict[str, Any]:
    """Starts from random A and B with A B = 0, through orthogonal halves of the rank; the base stays whole.

    Args:
      key: a key.
      specs: the table from `init_lora`.

    Returns:
      The tree of factors, float32.

    Raises:
      ValueError: a rank is not even, or an adapter is of variant dora.
    """
    reject_magnitude("a start from orthogonal factors", specs)
    lora = {}
    for number, (module, spec) in enumerate(specs.items()):
        if spec.rank % 2:
            raise ValueError(f"{spec.leaf}: orthogonal factors need an even rank, got {spec.rank}")
        *batch, inputs, outputs = to_matrix(np.empty(spec.shape, np.int8), spec).shape
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        turn, _ = np.linalg.qr(jax.random.normal(keys[0], (*batch, spec.rank, spec.rank)))
        half = spec.rank // 2
        a = jax.random.normal(keys[1], (*batch, inputs, half)) / 10  # the size that PEFT gives them
        b = jax.random.normal(keys[2], (*batch, half, outputs)) / 10
        pair = np.asarray(a) @ turn[..., :half, :], turn[..., half:, :].swapaxes(-1, -2) @ np.asarray(b)
        lora |= dict(zip(spec.factor_paths(module), to_factors(*pair, spec), strict=True))
    return unflatten(lora)


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
        doubled[module] = dataclasses.replace(spec, rank=2 * spec.rank)
    grown = math.sqrt(2) if config.use_rslora else 2
    patterns = {
        "rank_pattern": {name: 2 * rank for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {name: grown * alpha for name, alpha in config.alpha_pattern.items()},
    }
    config = dataclasses.replace(config, rank=2 * config.rank, alpha=grown * config.alpha, **patterns)
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
    start: Callable[[np.ndarray, AdapterSpec], tuple[np.ndarray, np.ndarray]],
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


def _largest(
    matrix: np.ndarray, rank: int, iterations: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first singular vectors and values, exact or from a random range."""
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
