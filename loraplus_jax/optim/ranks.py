"""The ranks that training leaves, and adapters without the components that it set to 0, as AdaLoRA does."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ..adapter.config import LoRAPlusConfig
from ..adapter.spec import AdapterSpec, Specs
from ..adapter.tree import flat_factors, unflatten
from .pairs import layouts_of


def final_ranks(lora: Mapping[str, Any], specs: Specs) -> dict[str, Any]:
    """The number of components of every module whose row of B is not 0.

    Args:
      lora: the tree of factors.
      specs: the table from `init_lora`.

    Returns:
      A number for each module; a list, nested by axis, for stacked layers and batch axes.
    """
    flat = flat_factors(lora, specs)
    return {module: _in_use(flat, module, spec).sum(-1).tolist() for module, spec in specs.items()}


def prune(
    lora: Mapping[str, Any], specs: Specs, config: LoRAPlusConfig
) -> tuple[dict[str, Any], dict[str, AdapterSpec], LoRAPlusConfig]:
    """Drops components whose row of B is 0: plain LoRA of lower rank with the same product and scale s.

    Stacked layers share one rank, the highest of them; `save_peft(..., prune=True)` gives each its own. A module
    without other components keeps one.

    Args:
      lora: the tree of factors.
      specs: the table from `init_lora`.
      config: config of the adapter.

    Returns:
      Factors, table and config. The config's `rank_pattern` and `alpha_pattern` name every module.
    """
    flat, factors, ranks = flat_factors(lora, specs), {}, {}
    for module, spec in specs.items():
        in_use = _in_use(flat, module, spec)
        rank = ranks[module] = max(1, int(in_use.sum(-1).max()))
        kept = np.argsort(~in_use, axis=-1, kind="stable")[..., :rank, None]
        pair, rest = spec.factor_paths(module)[:2], spec.factor_paths(module)[2:]
        factors |= {path: flat[path] for path in rest}
        shapes = dataclasses.replace(spec, rank=rank).factor_shapes[:2]
        for path, layout, shape in zip(pair, layouts_of(spec.factor_letters), shapes, strict=True):
            rows = np.take_along_axis(layout.rows(jax.device_get(flat[path])), kept, axis=-2)
            factors[path] = jax.numpy.asarray(layout.restore(rows, shape))
    alphas = {module: alpha_for(specs[module].scale, rank, config) for module, rank in ranks.items()}
    # A pattern also matches the end of a longer path, so longer paths come first.
    patterns = {module: re.escape(module) or ".*" for module in sorted(specs, key=len, reverse=True)}
    config = dataclasses.replace(
        config,
        rank_pattern={pattern: ranks[module] for module, pattern in patterns.items()},
        alpha_pattern={pattern: alphas[module] for module, pattern in patterns.items()},
    )
    table = {
        module: dataclasses.replace(spec, rank=ranks[module], scale=config.scale_of(module))
        for module, spec in specs.items()
    }
    return unflatten(factors), table, config


def alpha_for(scale: float, rank: int, config: LoRAPlusConfig) -> float:
    """The alpha that gives a scale at a rank.

    >>> alpha_for(2.0, 3, LoRAPlusConfig(target_modules=["query"]))
    6.0
    """
    return scale * (math.sqrt(rank) if config.use_rslora else rank)


def _in_use(flat: Mapping[str, Any], module: str, spec: AdapterSpec) -> np.ndarray:
    """Whether each component's row of B is not 0, (batch..., r)."""
    _, layout = layouts_of(spec.factor_letters)
    return (layout.rows(jax.device_get(flat[spec.factor_paths(module)[1]])) != 0).any(-1)
