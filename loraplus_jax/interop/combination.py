"""Combines adapters of one base into one, with the factors of PEFT's `LoraModel.add_weighted_adapter`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from .._utils.validation import check_choice, check_int, check_number, raise_problems
from ..adapter.config import LoRAPlusConfig
from ..adapter.einsum_letters import layer_axis
from ..adapter.spec import AdapterSpec, form_differences
from ..adapter.target_rules import config_of
from ..adapter.tree import factors_by_module, flatten, unflatten
from .adapter_directory import Adapter, check_finite

How = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
SignMethod = Literal["total", "frequency"]
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "density": ("ties", "dare_linear", "dare_ties", "magnitude_prune"),
    "majority_sign_method": ("ties", "dare_ties"),
    "svd_rank": ("svd",),
    "seed": ("dare_linear", "dare_ties"),
}
"""The ways that take an option."""


def combine_adapters(
    adapters: Mapping[str, Adapter],
    weights: Sequence[float],
    how: How,
    *,
    density: float | None = None,
    majority_sign_method: SignMethod | None = None,
    svd_rank: int | None = None,
    seed: int | None = None,
) -> Adapter:
    """Combines adapters of one base into one of scale 1, as PEFT's `add_weighted_adapter` does.

    With each adapter's weight w, scale s and factors A and B:

    - `cat`: [w s A] and [B], side by side. The product is exactly Σ w s A B, the rank the sum of all.
    - `svd`: the largest singular values of that sum.
    - `linear`: Σ ±√|w s| A, with the sign of w s, and Σ √|w s| B. The product also has terms of one adapter's A and
      another's B.
    - `magnitude_prune`, `dare_linear`: the same, of the share `density` of the entries of each factor: the largest,
      or random ones divided by the density (DARE, arXiv 2311.03099).
    - `ties`, `dare_ties`: after this pruning, the mean over the adapters with the majority's sign, entry by entry
      (TIES, arXiv 2306.01708).

    An adapter counts as zero in layers that it does not adapt. Unlike in PEFT, a single adapter is combined as
    several are, the result has the stacked layers of all adapters, not of the first, and rsLoRA does not change its
    scale.

    Args:
      adapters: from `load_adapter` or `load_peft`, by a name for errors.
      weights: w of each adapter, in their order; may be negative.
      how: one of the ways above; all but `cat` and `svd` need equal ranks.
      density: share of entries to keep of each matrix, A and B apart, above 0 and at most 1.
      majority_sign_method: whether an entry's majority is the sign of the sum (`"total"`, the default) or the sign
        that more adapters have (`"frequency"`).
      svd_rank: rank of the result of `svd`, at most the sum's; by default the largest rank of an adapter.
      seed: of DARE's random entries; 0 by default.

    Returns:
      An `Adapter` whose factors have the dtype of the adapters' (computed in float32). Its other fields of the
      config, and fully trained parameters, which must be equal, are those of the first adapter.

    Raises:
      ValueError, TypeError: an option is missing, out of range, or has no effect on `how`; or adapters do not
        match, are DoRA's, or start from the base (`Adapter.start`). The message lists all paths.
    """
    if not adapters:
        raise ValueError("adapters to combine must be at least one, got none")
    if len(weights) != len(adapters):
        raise ValueError(f"weights must be one for each of {len(adapters)} adapters, got {len(weights)}")
    if empty := [name for name, adapter in adapters.items() if not adapter.specs]:
        raise ValueError(f"{empty[0]} has no factors to combine")
    for name, weight in zip(adapters, weights, strict=True):
        check_number(f"weight of {name}", weight)
    options = {
        "density": density,
        "majority_sign_method": majority_sign_method,
        "svd_rank": svd_rank,
        "seed": seed,
    }
    _check_options(how, options)
    table: dict[str, dict[str, AdapterSpec]] = {}  # by path and name
    for name, adapter in adapters.items():
        for path, spec in adapter.specs.items():
            table.setdefault(path, {})[name] = spec
    raise_problems("cannot combine the adapters", _problems(adapters, table, how))
    if svd_rank is not None:  # a larger one would add zeros
        most = max(
            min(sum(s.rank for s in own.values()), *s.sides) for own in table.values() for s in own.values()
        )
        check_int("svd_rank", svd_rank, at_least=1, at_most=most)
    factors = {n: factors_by_module(n, adapter.lora, adapter.specs) for n, adapter in adapters.items()}
    for name, adapter in adapters.items():
        check_finite(name, adapter.lora)
    number_of = {name: n for n, name in enumerate(adapters)}
    ranks = [max(spec.rank for spec in adapter.specs.values()) for adapter in adapters.values()]
    widest = {"cat": sum(ranks), "svd": svd_rank or max(ranks)}.get(how, 0)
    layers = _layers(adapters)

    def kept(rows: np.ndarray, name: str, path: str) -> np.ndarray:
        if density is None:
            return rows
        if how in OPTIONS["seed"]:
            return rows * random_mask(rows.shape, density, seed or 0, number_of[name], path) / density
        return rows * largest_mask(rows, density)

    combined, specs = {}, {}
    for module, own in table.items():
        first = next(iter(own.values()))
        pair = first.factors_of(module)
        sides = [
            [kept(f.rows(np.asarray(factors[n][module][side], np.float32)), n, f.path) for n in own]
            for side, f in enumerate(pair)
        ]
        scales = np.array([weights[number_of[name]] * spec.scale for name, spec in own.items()])
        if how == "cat":
            scaled = [x * s for x, s in zip(sides[0], scales.astype(np.float32), strict=True)]
            a, b = (np.concatenate(side, axis=-2) for side in (scaled, sides[1]))
        elif how == "svd":
            a, b = _largest(sides, scales, min(widest, *first.sides))
        else:
            root = np.sqrt(np.abs(scales))
            method = (majority_sign_method or "total") if how in OPTIONS["majority_sign_method"] else None
            a = _weighted_sum(sides[0], np.where(scales < 0, -root, root), method)
            b = _weighted_sum(sides[1], root, method)
        # One rank for all layers where the sides allow it, which servers ask for; more components are zero.
        rank = max(a.shape[-2], min(widest, *first.sides))
        in_stack = None
        if layers is not None and first.layers is not None:  # stacks may differ in size
            size = first.shape[layer_axis(first.base_letters, first.stacked)]
            in_stack = tuple(number for number in layers if number < size)
        specs[module] = dataclasses.replace(first, rank=rank, scale=1.0, layers=in_stack)
        for side, (factor, x) in enumerate(zip(pair, (a, b), strict=True)):
            padding = [(0, 0)] * (x.ndim - 2) + [(0, rank - x.shape[-2]), (0, 0)]
            dtype = jnp.result_type(*(factors[name][module][side] for name in own))
            combined[factor.path] = jnp.asarray(factor.restore(np.pad(x, padding)), dtype)
    first = next(iter(adapters.values()))
    config = _config([a.config for a in adapters.values() if a.config is not None], specs, layers)
    return Adapter(unflatten(combined), specs, config, first.extras)


def largest_mask(rows: np.ndarray, density: float) -> np.ndarray:
    """Which entries are the share `density` that is largest in each matrix (batch..., r, size), bool.

    >>> largest_mask(np.array([[1.0, -3.0], [2.0, 0.0]]), 0.5).tolist()
    [[False, True], [True, False]]
    """
    flat = np.abs(rows).reshape(*rows.shape[:-2], -1)
    count = int(density * flat.shape[-1])
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, np.argsort(-flat, axis=-1, kind="stable")[..., :count], True, axis=-1)
    return mask.reshape(rows.shape)


def random_mask(shape: tuple[int, ...], density: float, seed: int, adapter: int, path: str) -> np.ndarray:
    """Which entries DARE keeps of the factor at a path of an adapter, by its number among the adapters, bool."""
    random = np.random.default_rng([seed, adapter, *path.encode()])
    return random.random(shape) < density


def _weighted_sum(rows: list[np.ndarray], weights: np.ndarray, method: SignMethod | None) -> np.ndarray:
    """The weighted sum of matrices; with a method the mean of those with the majority's sign, entry by entry."""
    stack = np.stack(rows)
    weighted = stack * weights.astype(np.float32).reshape(-1, *[1] * (stack.ndim - 1))
    if method is None:
        return weighted.sum(0)
    sign = np.sign(stack)
    majority = np.where((stack if method == "total" else sign).sum(0) >= 0, 1, -1)
    agrees = sign == majority
    return (weighted * agrees).sum(0) / np.maximum(agrees.sum(0), 1).astype(np.float32)


def _largest(sides: list[list[np.ndarray]], scales: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The `rank` largest singular values of Σ s Aᵀ B, of rows (batch..., r, size); they go to B."""
    ranks = [x.shape[-2] for x in sides[0]]
    a, b = (np.concatenate(side, axis=-2).astype(np.float64) for side in sides)
    # The product has the singular values of the triangles of two QR decompositions, which are far smaller.
    q_a, r_a = np.linalg.qr((a * np.repeat(scales, ranks)[:, None]).swapaxes(-1, -2))
    q_b, r_b = np.linalg.qr(b.swapaxes(-1, -2))
    u, s, v = np.linalg.svd(r_a @ r_b.swapaxes(-1, -2), full_matrices=False)
    u, s, v = u[..., :rank], s[..., :rank], v[..., :rank, :]
    # In a layer without adapters both factors stay zero.
    a = (q_a @ (u * (s > 0)[..., None, :])).swapaxes(-1, -2)
    b = s[..., None] * (v @ q_b.swapaxes(-1, -2))
    return a.astype(np.float32), b.astype(np.float32)


def _check_options(how: How, options: Mapping[str, Any]) -> None:
    check_choice("how", how, get_args(How))
    for name, value in options.items():
        if value is not None and how not in OPTIONS[name]:
            raise ValueError(f"{name} has no effect on {how}, only on {', '.join(OPTIONS[name])}; remove it")
    if how in OPTIONS["density"]:
        if options["density"] is None:
            raise ValueError(f"{how} requires density, the share of entries to keep, above 0 and at most 1")
        check_number("density", options["density"], above=0.0)
        if options["density"] > 1:
            raise ValueError(f"density must be at most 1, got {options['density']}")
    if options["majority_sign_method"] is not None:
        check_choice("majority_sign_method", options["majority_sign_method"], get_args(SignMethod))
    for name, least in (("svd_rank", 1), ("seed", 0)):
        if options[name] is not None:
            check_int(name, options[name], at_least=least)


def _problems(
    adapters: Mapping[str, Adapter], table: Mapping[str, Mapping[str, AdapterSpec]], how: How
) -> list[str]:
    """One line for everything that keeps the adapters from being combined."""
    problems = []
    for name, adapter in adapters.items():
        if adapter.config is None:
            problems.append(f"{name} is a fully trained model without adapters")
        elif adapter.start:
            problems.append(
                f"{name} starts from what quantization lost ({next(iter(flatten(adapter.start)))}): it is only "
                "exact on its own quantized base"
            )
        problems += [
            f"{name}: {path} is of variant dora, whose magnitudes have no sum; only variant lora is supported"
            for path, spec in adapter.specs.items()
            if spec.magnitude
        ]
    leaves: dict[str, str] = {}
    for path, own in table.items():
        (first, spec), *others = own.items()
        if (owner := leaves.setdefault(spec.leaf, path)) != path:
            problems.append(f"{spec.leaf} is adapted as {owner!r} and as {path!r}")
        for name, other in others:
            problems += [
                f"{path}: {field} is {getattr(spec, field)} in {first} and {getattr(other, field)} in {name}"
                for field in form_differences(spec, other)
            ]
            if how not in ("cat", "svd") and other.rank != spec.rank:
                problems.append(
                    f"{path} has rank {spec.rank} in {first} and {other.rank} in {name}: {how} needs equal "
                    "ranks; use cat or svd"
                )
        if how == "cat" and (rank := sum(s.rank for s in own.values())) > min(spec.sides):
            problems.append(
                f"{path}: cat gives it rank {rank}, above the least of its sides {spec.sides}; use svd"
            )
    (first, reference), *others = ((name, flatten(adapter.extras)) for name, adapter in adapters.items())
    for name, extras in others:
        problems += [
            f"{path} is trained in full and differs between {first} and {name}: only factors can be combined"
            for path in sorted(reference.keys() | extras.keys())
            if path not in reference
            or path not in extras
            or not np.array_equal(reference[path], extras[path])
        ]
    return problems


def _layers(adapters: Mapping[str, Adapter]) -> tuple[int, ...] | None:
    """The layers of a stack that any of the adapters has; None if one has all."""
    found = [
        s.layers for a in adapters.values() for s in a.specs.values() if s.kind != "parameter" and s.stacked
    ]
    if not found or None in found:
        return None
    return tuple(sorted({number for layers in found for number in layers or ()}))


def _config(
    configs: Sequence[LoRAPlusConfig], specs: Mapping[str, AdapterSpec], layers: tuple[int, ...] | None
) -> LoRAPlusConfig:
    """A config that gives these specs, with the other fields of the first one."""
    first, made = configs[0], config_of(specs)
    changed: dict[str, Any] = {
        name: getattr(made, name) for name in ("rank", "alpha", "rank_pattern", "alpha_pattern")
    }
    targets = ("target_modules", "exclude_modules", "target_parameters", "layers_to_transform")
    if any(getattr(config, name) != getattr(first, name) for config in configs for name in targets):
        changed |= {name: getattr(made, name) for name in targets} | {"layers_to_transform": layers}
    # The values no longer depend on how the factors began.
    return dataclasses.replace(first, **changed, use_rslora=False, init="lora", init_iterations=None)
