"""The ranks that training leaves, and adapters without the components that it set to 0, as AdaLoRA does."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..adapter.config import LoRAPlusConfig
from ..adapter.spec import MAGNITUDE, AdapterSpec, Specs
from ..adapter.tree import factors_by_module, unflatten


def final_ranks(lora: Mapping[str, Any], specs: Specs) -> dict[str, Any]:
    """Counts every module's components whose row of B is not 0.

    `lora` is the tree of factors, `specs` the table from `init_lora`.

    Returns:
      By module path an int, or for stacked layers and batch axes a list of int, nested by axis.
    """
    factors = factors_by_module("lora", lora, specs)
    return {module: _in_use(spec, factors[module]).sum(-1).tolist() for module, spec in specs.items()}


def prune(
    lora: Mapping[str, Any], specs: Specs, config: LoRAPlusConfig
) -> tuple[dict[str, Any], dict[str, AdapterSpec], LoRAPlusConfig]:
    """Drops components whose row of B is 0: plain LoRA of lower rank with the same product and scale s.

    Stacked layers share one rank, the highest of them; `save_peft(..., prune=True)` gives each its own. A module
    without other components keeps one.

    Args:
      lora, specs, config: the tree of factors, their table and config.

    Returns:
      Factors, table and config. The config's `rank_pattern` and `alpha_pattern` name every module.
    """
    factors, pruned, ranks = factors_by_module("lora", lora, specs), {}, {}
    for module, spec in specs.items():
        in_use = _in_use(spec, factors[module])
        rank = ranks[module] = max(1, int(in_use.sum(-1).max()))
        # Stable, so that the components that are left keep their order.
        kept = np.argsort(~in_use, axis=-1, kind="stable")[..., :rank, None]
        for factor, value in zip(spec.factors_of(module), factors[module], strict=True):
            pruned[factor.path] = value
            if not factor.path.endswith(MAGNITUDE):  # which has no component to drop
                rows = np.take_along_axis(factor.rows(jax.device_get(value)), kept, axis=-2)
                pruned[factor.path] = jax.numpy.asarray(factor.restore(rows))
    # A pattern also matches the end of a longer path, so longer paths come first.
    patterns = {module: re.escape(module) or ".*" for module in sorted(specs, key=len, reverse=True)}
    alphas = {p: alpha_for(specs[module].scale, ranks[module], config) for module, p in patterns.items()}
    config = dataclasses.replace(
        config,
        rank_pattern={pattern: ranks[module] for module, pattern in patterns.items()},
        alpha_pattern=alphas,
    )
    table = {
        module: dataclasses.replace(spec, rank=ranks[module], scale=config.scale_of(module))
        for module, spec in specs.items()
    }
    return unflatten(pruned), table, config


def alpha_for(scale: float, rank: int, config: LoRAPlusConfig) -> float:
    """The alpha that gives a scale at a rank: `scale * rank`, or with rsLoRA `scale * rank^(1/2)`.

    >>> alpha_for(2.0, 3, LoRAPlusConfig(target_modules=["query"]))
    6.0
    """
    return scale * (math.sqrt(rank) if config.use_rslora else rank)


def _in_use(spec: AdapterSpec, factors: Sequence[Any]) -> np.ndarray:
    """Whether each component's row of B is not 0, (batch..., r)."""
    return (spec.factors_of("")[1].rows(jax.device_get(factors[1])) != 0).any(-1)
