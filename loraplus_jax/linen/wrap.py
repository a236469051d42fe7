"""Adapters for any existing Linen model: `apply_lora_plus` wraps it, `init_lora` makes the factors and the specs.

The model's author does nothing. Outside, the factors are a collection of their own, `"lora"`; inside the model
they travel with `"params"`, so that `nn.scan`, `nn.remat`, `nn.vmap` and weight sharing treat them as they treat
the kernels. An interceptor adds the low-rank term to each targeted layer's output.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import DenyList, freeze, meta
from flax.linen.transforms import get_module_scopes

from .._validation import suggest
from ..config import ALL_LINEAR, LoRAPlusConfig
from ..rules import TracedModule, check_coverage, is_adapted, is_target, matching_rule
from ..spec import AdapterSpec
from ..tree import flatten, leaves_by_path
from .collections import COLLECTIONS, Boundary
from .dataflow import trace_dataflow
from .layer_table import Layer, can_adapt, layer_of
from .layers import (
    Adapter,
    FactorBox,
    LoRAPlusLayer,
    add_adapter_term,
    box_new_factors,
    is_box,
    is_low_rank_only,
    low_rank_terms_only,
)

_OURS = "lora_plus"
"""A flag on the scopes of the wrapped model; a module run by its own `.apply` inside has other scopes."""


class _Anew:
    """Equal to nothing, itself included: as a flag it makes `nn.jit` trace again each time."""

    _hashes = itertools.count()

    def __hash__(self) -> int:
        return next(self._hashes)


class LoRAPlusModel(nn.Module):
    """A Linen model with adapters on some of its layers; made by `apply_lora_plus`.

    `init`, `apply` (with `method=` as a name or a function of the inner model) and the tree of base parameters
    are those of the inner model. It is a module and may stand inside another one.
    """

    model: nn.Module
    config: LoRAPlusConfig

    def setup(self) -> None:
        """The inner model's parameters keep their own paths."""
        nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The inner model's `__call__`."""
        return self.run(None, *args, **kwargs)

    def run(self, method: Callable[..., Any] | str | None, *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the inner model, given by name or as a function of it, with the adapters on."""
        boundary = Boundary(self.config, self)
        has_dropout = self.has_rng("dropout") and self.config.dropout > 0.0
        interceptor = _interceptor(self.config, self.path, has_dropout, boundary)

        def call(outer: "LoRAPlusModel", *args: Any, **kwargs: Any) -> Any:
            inner_method = _resolve(outer.model, method)
            with nn.intercept_methods(interceptor), box_new_factors():
                return inner_method(outer.model, *args, **kwargs)

        # The scopes inside take over the flags of these, those of modules given from outside included.
        for scope in get_module_scopes(self, args, kwargs)[0]:
            scope.flags = freeze({**scope.flags, _OURS: self.trace_key()})
        # Without `init`, which would run the model twice: a mapping inside would act twice on what it made.
        mapped = nn.map_variables(
            call,
            COLLECTIONS,
            trans_in_fn=boundary.merge,
            trans_out_fn=boundary.split,
            mutable=self.is_mutable_collection("params"),
        )
        result = mapped(self, *args, **kwargs)
        if is_low_rank_only():
            return result  # the model was initialized before, and the rules were looked at then
        if self.is_initializing():
            check_coverage(self.config, boundary.seen, boundary.leaves, boundary.stacks)
        else:
            boundary.check_used(whole=method is None)
        return result

    @nn.nowrap
    def trace_key(self) -> Any:
        """What a trace of a part of the inner model depends on beside its variables.

        `nn.jit` inside the model takes an older trace where a module's fields, flags and variables are the same,
        whatever its name. New factors and `alpha_pattern` go by names; all else shows in the factors' shapes.
        """
        by_name = self.is_mutable_collection("params") or self.config.alpha_pattern
        return _Anew() if by_name else self.config

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.init_with_output`; `method` is one of the inner model's."""
        return super().init_with_output(rngs, *args, method=self._forward(method), **kwargs)

    @nn.nowrap
    def init(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.init`; `method` is one of the inner model's."""
        return super().init(rngs, *args, method=method, **kwargs)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.apply`; `method` is one of the inner model's."""
        return super().apply(variables, *args, method=self._forward(method), **kwargs)

    @nn.nowrap
    def _forward(self, method: Any) -> Callable[..., Any] | None:
        if method is None:
            return None
        _resolve(self.model, method)
        return lambda outer, *args, **kwargs: outer.run(method, *args, **kwargs)


def apply_lora_plus(model: nn.Module, config: LoRAPlusConfig) -> LoRAPlusModel:
    """Puts adapters on the layers of an existing Linen model that `config.target_modules` names.

    The result has the same `init` and `apply` and the same base parameters; the factors are in the collection
    `"lora"`. Whether the rules match shows when the model is first traced (`init` or `init_lora`): a name that
    matches nothing is a ValueError there.

    Raises:
      TypeError: `model` is no Linen module.
      ValueError: it has adapters already.

    Example:
      >>> model = apply_lora_plus(nn.Sequential([nn.Dense(4), nn.Dense(2)]),
      ...                         LoRAPlusConfig(target_modules=["layers_0"], rank=2))
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'layers_0': {'lora_a': (3, 2), 'lora_b': (2, 4)}}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_lora_plus takes a flax.linen.Module, got {type(model).__name__}")
    if isinstance(model, LoRAPlusModel):
        raise ValueError("the model has adapters already: name all its layers in one LoRAPlusConfig")
    return LoRAPlusModel(model=model, config=config)


def init_lora(
    model: nn.Module,
    rngs: Any,
    *args: Any,
    base: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[dict[str, Any], dict[str, AdapterSpec]]:
    """Makes the adapters of a model, and the table of what is adapted, without making base weights.

    Args:
      model: from `apply_lora_plus`, or any Linen model with layers such as `LoRAPlusDense` in it.
      rngs: a key or a dict of keys, as for `model.init`.
      *args, **kwargs: as for `model.init`; arrays may be given as `jax.ShapeDtypeStruct`.
      base: variables without adapters, `{"params": ...}`, checked against what the model expects where adapted.

    Returns:
      The tree of factors for the collection `"lora"`, and module path to `AdapterSpec`.

    Raises:
      ValueError: the model has no adapters, a rule matches nothing, a rank is above min(in, out), `base` does not
        fit, or the model uses the weight of an adapted layer past the layer, where no adapter acts.

    Example:
      >>> model = apply_lora_plus(nn.Dense(4), LoRAPlusConfig(target_modules=".*", rank=2))
      >>> lora, specs = init_lora(model, jax.random.key(0), jnp.ones((1, 3)))
      >>> specs[""].leaf, specs[""].shape
      ('params/kernel', (3, 4))
    """
    # Shapes become zeros, which nothing that is kept depends on: XLA removes them and the whole forward pass.
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    args, kwargs = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if is_shape(x) else x, (args, kwargs), is_leaf=is_shape
    )

    def init(rngs: Any) -> Any:
        with box_new_factors():
            return model.init(rngs, *args, **kwargs)

    shapes = jax.eval_shape(init, rngs)
    if not shapes.get("lora"):
        raise ValueError(
            "the model has no adapters: wrap it with apply_lora_plus or use LoRAPlusDense layers"
        )
    specs = _specs(shapes)
    if base is not None:
        _check_base(base, specs)
    _check_reads(model, specs, shapes, rngs, args, kwargs)
    return jax.jit(lambda rngs: meta.unbox(init(rngs)["lora"]))(rngs), specs


def _interceptor(
    config: LoRAPlusConfig, prefix: tuple[str, ...], has_dropout: bool, boundary: Boundary
) -> Callable[..., Any]:
    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.orig_method.func
        y = boundary.run_norm(module, next_fun, args, kwargs)
        if module.scope is None:
            return y
        if not module.scope.has_flag(_OURS):
            return _elsewhere(config, module, method, y, args, kwargs)
        path = "/".join(module.path[len(prefix) :])
        if isinstance(module, LoRAPlusLayer) or isinstance(module.parent, LoRAPlusLayer):
            boundary.own.add(path)  # it has an adapter of its own, whatever the rules say
            return y
        entry = boundary.seen.setdefault(path, TracedModule(type(module).__name__))
        if not can_adapt(method):
            entry.weights = entry.weights or _own_weights(module)
            return y
        entry.adaptable = True
        if not is_target(config, path):
            return y
        layer = _layer(config, method, module, path, args, kwargs)
        if layer is None:
            return y
        entry.note(layer.kind, layer.axes, path)
        if not is_adapted(config, path, layer.kind) or not _is_chosen(config, module, path, boundary):
            return y
        boundary.check_norm(path)
        if has_dropout and not module.has_rng("dropout"):
            raise ValueError(
                f"a dropout rng is given but does not reach {path!r}: an nn.scan or nn.vmap above it must name "
                "'dropout' in split_rngs, or set dropout=0"
            )
        adapter = Adapter(config.rank_of(path), config.scale_of(path), config.init, config.dropout)
        where = f"{path or 'the model'!r} (target_modules: {matching_rule(config, path)!r})"
        entry.adapted = True
        return add_adapter_term(y, module, layer, adapter, collection="params", where=where)

    return intercept


def _elsewhere(config: LoRAPlusConfig, module: nn.Module, method: Any, y: Any, args: Any, kwargs: Any) -> Any:
    """The output of a module that the model runs by its own `.apply`, under a path that says nothing.

    It has an adapter if it was given variables with factors in them, which the model has from an adapted layer.
    """
    assert module.scope is not None
    if isinstance(module, LoRAPlusLayer) or not can_adapt(method):
        return y
    if not module.scope.has_variable("params", "lora_a"):
        return y
    where = f"a {type(module).__name__} that the model runs by its own apply"
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError(f"rank_pattern and alpha_pattern cannot be told for {where}: it has no path")
    layer = layer_of(method, module, args, kwargs)
    assert layer is not None
    adapter = Adapter(config.rank, config.scale, config.init, config.dropout)
    return add_adapter_term(y, module, layer, adapter, collection="params", where=where)


def _layer(
    config: LoRAPlusConfig, method: Any, module: nn.Module, path: str, args: Any, kwargs: Any
) -> Layer | None:
    """The layer that a call named by `target_modules` is; None if it cannot be adapted and no rule insists."""
    try:
        return layer_of(method, module, args, kwargs)
    except ValueError as error:
        if config.target_modules == ALL_LINEAR:
            return None
        raise ValueError(
            f"target_modules: {matching_rule(config, path)!r} matches {path!r}: {error}"
        ) from None


def _is_chosen(config: LoRAPlusConfig, module: nn.Module, path: str, boundary: Boundary) -> bool:
    """Whether a layer is among `layers_to_transform`.

    The number in its path does not tell: it may be one that Flax gave (`"block/Dense_0"`) inside of stacked layers.
    So when the model is initialized all get factors, of which `Boundary` keeps the right ones.
    """
    assert module.scope is not None
    free = config.layers_to_transform is None or module.is_initializing() or boundary.is_bare
    return free or module.scope.has_variable("params", "lora_a")


def _own_weights(module: nn.Module) -> list[str]:
    """The module's own leaves that an adapter could be asked for: those with two axes or more."""
    assert module.scope is not None
    own = module.scope.variables().get("params", {})
    return [name for name, leaf in own.items() if getattr(meta.unbox(leaf), "ndim", 0) >= 2]


def _resolve(model: nn.Module, method: Any) -> Callable[..., Any]:
    """A method of the inner model as a function of it."""
    if method is None:
        return type(model).__call__
    if isinstance(method, str):
        if not callable(getattr(type(model), method, None)):
            methods = [n for n in dir(type(model)) if not n.startswith("_")]
            raise AttributeError(f"{type(model).__name__} has no method {method!r}{suggest(method, methods)}")
        return getattr(type(model), method)
    return getattr(method, "__func__", method)


def _specs(variables: Mapping[str, Any]) -> dict[str, AdapterSpec]:
    params = flatten(meta.unbox(dict(variables.get("params", {}))))
    boxes: dict[Any, Any] = dict(traverse_util.flatten_dict(dict(variables["lora"]), is_leaf=is_box))
    specs = {}
    for path, box in boxes.items():
        if path[-1] != "lora_a" or not isinstance(box, FactorBox):
            continue
        leaf = "/".join((*path[:-1], box.leaf)).removesuffix("/")
        if (
            twice := next((p for p, spec in specs.items() if spec.leaf == f"params/{leaf}"), None)
        ) is not None:
            raise ValueError(f"params/{leaf} has two adapters, of {twice!r} and of {'/'.join(path[:-1])!r}")
        specs["/".join(path[:-1])] = AdapterSpec(
            leaf=f"params/{leaf}",
            kind=box.kind,
            axes=box.axes,
            shape=params[leaf].shape,
            rank=box.rank,
            scale=box.scale,
            stacked=box.stacked,
            layers=box.layers,
        )
    return specs


def _check_base(base: Mapping[str, Any], specs: Mapping[str, AdapterSpec]) -> None:
    flat = flatten(base)
    for spec in specs.values():
        shape = getattr(meta.unbox(flat.get(spec.leaf)), "shape", None)
        if shape != spec.shape:
            raise ValueError(
                f"the base does not fit the model: {spec.leaf} must have shape {spec.shape}, "
                + ("is missing" if shape is None else f"has {shape}")
            )


def _check_reads(
    model: nn.Module,
    specs: Mapping[str, AdapterSpec],
    shapes: Mapping[str, Any],
    rngs: Any,
    args: Any,
    kwargs: Any,
) -> None:
    """Raises ValueError where an adapted weight reaches the outputs past its layer, or is changed before it.

    Merged into the weight, an adapter would act there too; beside the layer it does not.
    """
    given = meta.unbox({name: shapes[name] for name in COLLECTIONS if name in shapes})
    flow = trace_dataflow(
        jax.make_jaxpr(lambda given, rngs: _outputs(model, given, rngs, args, **kwargs))(given, rngs)
    )
    numbers = {leaf: n for n, leaf in enumerate(leaves_by_path(given))}
    for path, spec in specs.items():
        if spec.kind == "parameter" or numbers[spec.leaf] not in flow.changed | flow.read:
            continue
        does = (
            f"changes its weight {spec.leaf} before the layer has it (as by nn.map_variables)"
            if numbers[spec.leaf] in flow.changed
            else f"also uses its weight {spec.leaf} past the layer (as by .embedding, .variables, get_variable)"
        )
        rule = {spec.leaf.removeprefix("params/"): spec.rule_letters}
        raise ValueError(
            f"{path or 'the model'!r} has an adapter, but the model {does}, where the adapter does not act; name "
            f"the weight in target_parameters instead: {rule}"
        )


def _outputs(
    model: nn.Module,
    given: Any,
    rngs: Any,
    args: Any,
    method: Any = None,
    mutable: Any = DenyList("intermediates"),  # noqa: B008
    capture_intermediates: Any = False,
    **kwargs: Any,
) -> list[jax.Array]:
    """What `model.init` computes and gives or keeps beside parameters, from parameters that are there already, with
    adapters' terms alone.

    In the state of initialization, since a model may not be able to take the same inputs twice: a cache is full.
    """
    bound = model.bind(
        given, rngs=dict(rngs) if isinstance(rngs, Mapping) else {"params": rngs}, mutable=mutable
    )
    assert bound.scope is not None
    bound.scope.flags = freeze({**bound.scope.flags, "initializing": True})
    forward = model._forward(method) if isinstance(model, LoRAPlusModel) else method
    with box_new_factors(), low_rank_terms_only():
        y = _resolve(model, forward)(bound, *args, **kwargs)
    kept = {name: value for name, value in bound.variables.items() if name not in COLLECTIONS}
    return [leaf for leaf in jax.tree.leaves((y, kept)) if isinstance(leaf, jax.Array)]
