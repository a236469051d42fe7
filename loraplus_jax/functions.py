"""LoRA+ for models that are plain functions of a tree of arrays: `f(params, ...)`, whatever library made the tree.

The function runs as a program that keeps each adapted weight as W, A and B; see `interpreter.low_rank`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from jax.tree_util import tree_leaves_with_path

from ._utils.validation import repeated
from .adapter.config import LoRAPlusConfig
from .adapter.dora import set_magnitudes
from .adapter.einsum_letters import LETTERS
from .adapter.lora import SCALE
from .adapter.quantize_base import quantize_base
from .adapter.spec import AdapterSpec, check_rank
from .adapter.target_rules import check_coverage, parameter_rule, parameter_spec
from .adapter.tree import factors_by_module, flatten, leaf_path, unflatten, with_collection
from .inits.random import factor_dtype, factor_inits
from .interpreter.dataflow import trace_dataflow, warn_of_whole
from .interpreter.low_rank import call
from .interpreter.products import product
from .interpreter.weight import LowRankWeight
from .quantization.packed_array import is_packed

__all__ = ["apply_lora_plus", "init_lora", "product", "quantize_base", "whole_weights"]

Rules = LoRAPlusConfig | Mapping[str, str]
_OF_MODULES = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "dropout",
    "modules_to_save",
    "bias",
)
"""Fields of a config that name Flax's modules, or need one."""


def apply_lora_plus(f: Callable[..., Any], config: Rules) -> Callable[..., Any]:
    """Makes a function that computes with W + s A B wherever `f` uses an adapted weight.

    A product, a lookup of rows, a convolution and a product grouped by expert (`jax.lax.ragged_dot`) cost two thin
    operations more; slices, reshapes and joins of weights move A and B too. Any other use costs the whole weight;
    `whole_weights` finds those.

    Args:
      f: `f(params, *args, **kwargs)`, where `params` is any tree; JAX must be able to trace it.
      config: `target_parameters` as a mapping from a regular expression for a weight's whole path to one letter per
        axis (i input, o output, any other letter a batch axis), such as `{"layers/.*/q": "io", ".*/up": "eio"}`;
        or a `LoRAPlusConfig` with `target_parameters`.

    Returns:
      `g(params, lora, *args, **kwargs)`; call it under `jax.jit`. `params` may hold packed weights. `lora` is the
      tree from `init_lora`, or variables `{"lora": tree}`, with `"lora_scale"` from `scale_variables` if scales are
      to differ from the config's.

    Raises:
      ValueError: the config sets a field that needs modules. A call raises it if `lora` does not fit.

    Example:
      >>> f = lambda params, x: x @ params["up"]
      >>> params = {"up": jnp.ones((3, 4))}
      >>> config = LoRAPlusConfig(target_parameters={"up": "io"}, rank=2)
      >>> g = apply_lora_plus(f, config)
      >>> lora, specs = init_lora(jax.random.key(0), params, config)
      >>> g(params, lora, jnp.ones((2, 3))).shape
      (2, 4)
    """
    rules = _config(config)

    @functools.wraps(f)
    def adapted(params: Any, lora: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return _run(f, rules, params, lora, args, kwargs)

    del adapted.__wrapped__  # whose signature lacks `lora`: jit finds the positions of static arguments by it
    return adapted


def init_lora(
    key: jax.Array, params: Any, config: Rules, *, check: tuple[Any, ...] | None = None
) -> tuple[dict[str, Any], dict[str, AdapterSpec]]:
    """Makes the factors of the weights that a config selects.

    Args:
      key: a key; each factor has its own, by its path.
      params: the tree of weights; arrays may be `jax.ShapeDtypeStruct`, but variant dora needs their values.
      config: as for `apply_lora_plus`.
      check: `(f, *args)`, to warn where `f(params, *args)` needs a weight as a whole; arrays may be shapes.

    Returns:
      The tree of factors, and the table of specs, from path to `AdapterSpec`, with which `merge`, `describe`,
      `save_adapter` and `save_peft` take `{"params": params}`.

    Raises:
      ValueError: a rule matches nothing or has another number of letters than the weight has axes, a weight holds
        integers, or a rank is above min(in, out).
    """
    rules = _config(config)
    specs = _specs(params, rules)
    flat, arrays = {}, _arrays(params)
    for path, spec in specs.items():
        check_rank(spec, repr(path))
        inits: Any = factor_inits(rules.init, spec.rank, spec.axes)
        a, b, *magnitude = spec.factors_of(path)
        for factor, make in zip((a, b), inits, strict=True):
            # By the path, so that another rule leaves this weight's start as it is.
            own = LazyRng.create(key, *factor.path.split("/")).as_jax_rng()
            flat[factor.path] = make(own, factor.shape, factor_dtype(arrays[path]))
        flat |= {factor.path: jnp.zeros(factor.shape) for factor in magnitude}
        if spec.magnitude and isinstance(arrays[path], jax.ShapeDtypeStruct):
            raise ValueError(
                f"variant dora starts from the norms of the weights, but {path!r} is a shape: pass the weights"
            )
    lora = set_magnitudes(unflatten(flat), {"params": params}, specs)
    if check is not None:
        f, *args = check
        for path, users in whole_weights(f, rules, params, *args).items():
            warn_of_whole(path, specs[path].shape, users)
    return lora, specs


def whole_weights(
    f: Callable[..., Any], config: Rules, params: Any, *args: Any, **kwargs: Any
) -> dict[str, str]:
    """Finds the adapted weights that a function needs as a whole, W + s A B with its gradient. Nothing is computed.

    Args:
      f, config, params: as for `apply_lora_plus`; arrays may be `jax.ShapeDtypeStruct`.
      args, kwargs: the other arguments of `f`.

    Returns:
      By path the operations that need it, as JAX calls them, for `describe(merged=...)`.
    """
    rules = _config(config)
    is_array = lambda x: hasattr(x, "shape") and hasattr(x, "dtype")  # noqa: E731
    leaves, structure = jax.tree.flatten((params, args, kwargs), is_leaf=is_packed)
    arrays = [x for x in leaves if is_array(x)]
    # A packed weight is several inputs of the program.
    parts = [path for path, x in _arrays(params).items() for _ in jax.tree.leaves(x)]

    def run(arrays: list[Any]) -> list[jax.Array]:
        given = iter(arrays)
        own, args, kwargs = structure.unflatten([next(given) if is_array(x) else x for x in leaves])
        zeros = {
            factor.path: jnp.zeros(factor.shape)
            for path, spec in _specs(own, rules).items()
            for factor in spec.factors_of(path)
        }
        y = _run(f, rules, own, unflatten(zeros), args, kwargs, omit=True)
        return [leaf for leaf in jax.tree.leaves(y) if isinstance(leaf, jax.Array)]

    flow = trace_dataflow(jax.make_jaxpr(run)(arrays))
    users = {path: set[str]() for path in _specs(params, rules)}
    for n, path in enumerate(parts):
        if path in users:
            users[path] |= flow.whole.get(n, set())
    return {path: ", ".join(sorted(names)) for path, names in users.items() if names}


def _run(
    f: Callable[..., Any],
    config: LoRAPlusConfig,
    params: Any,
    lora: Mapping[str, Any],
    args: Any,
    kwargs: Any,
    *,
    omit: bool = False,
) -> Any:
    """Calls `f` with its weights kept apart; `omit` leaves W out and marks it, for `whole_weights`."""
    specs = _specs(params, config)
    variables = with_collection(lora, specs)
    factors = factors_by_module("lora", {"lora": variables.get("lora", {})}, specs)
    scales = flatten(variables.get(SCALE, {}))

    def part(path: Any, value: Any) -> Any:
        spec = specs.get(name := leaf_path(path))
        if spec is None:
            return LowRankWeight(value, letters=LETTERS[: value.ndim]) if is_packed(value) else value
        a, b, *magnitude = factors[name]
        scale = scales.get(f"{name}/{SCALE}")
        return LowRankWeight(
            w=value,
            a=a,
            b=b,
            letters=spec.base_letters,
            factor_letters=spec.factor_letters,
            scale=spec.scale if scale is None else scale.reshape(()),
            omit=omit,
            stops=True,
        ).with_magnitude(*magnitude)

    weights = jax.tree_util.tree_map_with_path(part, params, is_leaf=is_packed)
    return call(lambda params: f(params, *args, **kwargs), weights)


def _config(config: Rules) -> LoRAPlusConfig:
    if not isinstance(config, LoRAPlusConfig):
        return LoRAPlusConfig(target_parameters=config)
    for field in dataclasses.fields(config):
        if field.name in _OF_MODULES and (value := getattr(config, field.name)) not in (
            field.default,
            "none",
        ):
            raise ValueError(
                f"{field.name} is about modules, which a function does not have, got {value!r}; name weights in "
                "target_parameters"
            )
    return config


def _arrays(params: Any) -> dict[str, Any]:
    """The arrays of a tree by path, packed ones too, in the order of its leaves."""
    leaves = [(leaf_path(p), x) for p, x in tree_leaves_with_path(params, is_packed)]
    found = [(path, x) for path, x in leaves if hasattr(x, "shape") and hasattr(x, "dtype")]
    if len(arrays := dict(found)) < len(found):
        raise ValueError(f"params: two weights have the path {repeated(path for path, _ in found)[0]!r}")
    return arrays


def _specs(params: Any, config: LoRAPlusConfig) -> dict[str, AdapterSpec]:
    return _specs_of(config, tuple((path, tuple(x.shape), x.dtype) for path, x in _arrays(params).items()))


# A config's regular expressions and a tree's paths are the same in every call.
@functools.lru_cache(maxsize=256)
def _specs_of(
    config: LoRAPlusConfig, arrays: tuple[tuple[str, tuple[int, ...], Any], ...]
) -> dict[str, AdapterSpec]:
    check_coverage(config, {}, [path for path, _, _ in arrays], {})
    return {
        path: parameter_spec(config, path, rule, shape, dtype, f"params/{path}".rstrip("/"))
        for path, shape, dtype in arrays
        if (rule := parameter_rule(config, path)) is not None
    }
