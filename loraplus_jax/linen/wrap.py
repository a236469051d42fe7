"""Adapters for any existing Linen model: `apply_lora_plus` wraps it, `init_lora` makes the factors and the specs.

The model needs no changes. Outside the model, the factors are in the collection `"lora"`. Inside, they are part of
`"params"`, so that `nn.scan`, `nn.remat`, `nn.vmap` and weight sharing treat them like the kernels. An interceptor
adds the low-rank term to each targeted layer's output. Parameters in `target_parameters` are W + s A B for the
whole model, which then runs as a program that keeps them as W, A and B where it can.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import DenyList, freeze, meta
from flax.linen.transforms import decorator_lift_transform, get_module_scopes
from jax.extend.core import jaxpr_as_fun

from .._utils.validation import suggest
from ..adapter.config import ALL_LINEAR, LoRAPlusConfig
from ..adapter.dora import set_magnitudes
from ..adapter.spec import MAGNITUDE, AdapterSpec
from ..adapter.target_rules import is_adapted, is_target, matching_rule
from ..adapter.tree import flatten, leaves_by_path, weight_of
from ..interpreter.dataflow import trace_dataflow, warn_of_whole
from ..quantization.packed_array import is_from_qwix, is_packed
from .discovery import Discovery
from .layer_adapter import (
    OURS,
    TRACING,
    FactorBox,
    LoRAPlusLayer,
    Tracing,
    adapter_of,
    add_low_rank_term,
    is_box,
)
from .layer_table import METHODS
from .variable_map import COLLECTIONS, VariableMap, keep_low_rank


class _UniqueHash:
    """An object with a new hash every time; as a flag it makes `nn.jit` trace again on every call."""

    _hashes = itertools.count()

    def __hash__(self) -> int:
        return next(self._hashes)


class LoRAPlusModel(nn.Module):
    """A Linen model with adapters on some of its layers; made by `apply_lora_plus`.

    It has the inner model's `init`, `apply` (where `method=` is a name or function of the inner model) and base
    parameters, and also its fields and methods, such as `model.config`, or `model.encode(x)` inside `apply`. It
    is a module and can be used inside another one.

    Attributes:
      wrapped: the inner model.
      lora_config: the config of its adapters.
    """

    wrapped: nn.Module
    lora_config: LoRAPlusConfig

    def setup(self) -> None:
        """Keeps the paths of the inner model's parameters."""
        # Otherwise Flax would put all parameters below a module of their own, "wrapped".
        nn.share_scope(self, self.wrapped)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the inner model's `__call__` with its adapters."""
        return self.run(None, *args, **kwargs)

    def run(self, method: Callable[..., Any] | str | None, *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the inner model, a name or a function of the model, with its adapters."""
        call = _Call(self)

        def run_inner(outer: "LoRAPlusModel", *args: Any, **kwargs: Any) -> Any:
            inner_method = _resolve(outer.wrapped, method)
            with contextlib.ExitStack() as context:
                context.enter_context(nn.intercept_methods(call.adapt))
                # The inner interceptor: a layer makes its kernel, gets factors, then uses them.
                if call.is_new:
                    context.enter_context(nn.intercept_methods(call.discovery.intercept))
                context.enter_context(TRACING(dataclasses.replace(TRACING.value, boxed=True)))
                return inner_method(outer.wrapped, *args, **kwargs)

        # Inner scopes inherit these flags, including those of modules passed in from outside. No public function of
        # Flax finds them all, or lifts a transform of one's own; these two, in 0.12.8, are what nn.jit is made of.
        for scope in get_module_scopes(self, args, kwargs)[0]:
            scope.flags = freeze({**scope.flags, OURS: self._trace_key()})
        leaves = jax.tree.leaves(self.variables.get("params", {}), is_leaf=is_packed)
        keeps = self.lora_config.target_parameters or any(map(is_packed, leaves))
        # Not with init=True, which would run the model twice and apply mappings inside it twice.
        mapped = nn.map_variables(
            decorator_lift_transform(keep_low_rank, run_inner) if keeps else run_inner,
            COLLECTIONS,
            trans_in_fn=call.variables.enter,
            trans_out_fn=call.variables.leave,
            mutable=self.is_mutable_collection("params"),
        )
        result = mapped(self, *args, **kwargs)
        # With low_rank_only, the model was initialized and checked before.
        if not call.is_new and not TRACING.value.low_rank_only:
            call.variables.check_used(call.own, call.called, complete=method is None)
        elif method is None and not TRACING.value.low_rank_only:
            call.discovery.check()
        return result

    @nn.nowrap
    def _trace_key(self) -> Any:
        # nn.jit inside the model reuses a trace if a module's fields, flags and variables are the same, even if its
        # name is not. New factors and alpha_pattern depend on names; all other settings are in the config.
        by_name = self.is_mutable_collection("params") or self.lora_config.alpha_pattern
        return _UniqueHash() if by_name else self.lora_config

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        """The inner model's methods, which run with the adapters, and its fields.

        Raises:
          AttributeError: no such name, or it holds submodules, which would run without their adapters.
        """
        inner = self.__dict__.get("wrapped")
        if inner is None or name.startswith("_"):
            return super().__getattr__(name)
        defined = inspect.getattr_static(type(inner), name, None)
        is_field = name in {field.name for field in dataclasses.fields(inner)}
        if inspect.isfunction(defined) and not is_field and not hasattr(defined, "nowrap"):
            return _Method(self.run, name)
        if self.scope is not None and name not in inner.__dict__:  # the inner model's setup may create it
            self._try_setup()
            inner = self.__dict__["wrapped"]
        value = getattr(inner, name)
        leaves = jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, nn.Module))
        if any(isinstance(leaf, nn.Module) for leaf in leaves):
            raise AttributeError(
                f"{type(inner).__name__}.{name} holds modules, which would run without their adapters; call them "
                f"in a function of the model, `lambda inner, x: ... inner.{name} ...`, passed to apply as `method` "
                "or, inside another module, to `run`"
            )
        return value

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """Like `nn.Module.init_with_output`; `method` is a method of the inner model."""
        return super().init_with_output(rngs, *args, method=self._forward(method), **kwargs)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """Like `nn.Module.apply`; `method` is a method of the inner model."""
        return super().apply(variables, *args, method=self._forward(method), **kwargs)

    @nn.nowrap
    def _forward(self, method: Any) -> Callable[..., Any] | None:
        if method is None:
            return None
        _resolve(self.wrapped, method)

        def run_only(outer: "LoRAPlusModel", *args: Any, **kwargs: Any) -> Any:
            result = outer.run(method, *args, **kwargs)
            if outer.is_initializing() and not TRACING.value.low_rank_only:
                outer.__dict__["_discovery"].check()  # no other method will be called
            return result

        return run_only


class _Method(functools.partial):
    """A method of a wrapped model that runs with the adapters; `apply(..., method=model.encode)` reads its name."""


class _Call:
    """One run of a wrapped model."""

    def __init__(self, wrapper: LoRAPlusModel) -> None:
        self.config, self.prefix = wrapper.lora_config, wrapper.path
        self.has_dropout = wrapper.has_rng("dropout") and self.config.dropout > 0.0
        self.is_new = wrapper.is_initializing()
        # Shared by all calls of an initialization, since a call of one method may skip layers.
        self.discovery: Discovery = wrapper.__dict__.get("_discovery") or Discovery(self.config, self.prefix)
        # Flax forbids to set attributes of a module outside setup.
        object.__setattr__(wrapper, "_discovery", self.discovery)
        discoveries = TRACING.value.discoveries
        if self.is_new and discoveries is not None and self.discovery not in discoveries:
            discoveries.append(self.discovery)
        self.variables = VariableMap(self.config, wrapper, self.discovery)
        self.own: set[Any] = set()
        self.called: set[Any] = set()

    def adapt(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Runs a layer and adds the low-rank term of its adapter, if it has one."""
        module, scope, config = context.module, context.module.scope, self.config
        y = next_fun(*args, **kwargs)
        if scope is None:
            return y
        path = "/".join(module.path[len(self.prefix) :]) if scope.has_flag(OURS) else None
        if isinstance(module, LoRAPlusLayer) or isinstance(module.parent, LoRAPlusLayer):
            self.own |= {path} - {None}  # the rules do not apply to built-in adapters
            return y
        describe = METHODS.get(context.orig_method.func)
        if describe is None:
            return y
        self.called |= {path} - {None}
        if path is not None and not is_target(config, path):
            return y
        try:
            call = describe(module, *args, **kwargs)
        except ValueError as error:
            if path is None or config.target_modules == ALL_LINEAR:
                return y
            rule = matching_rule(config, path)
            raise ValueError(f"target_modules: {rule!r} matches {path!r}: {error}") from None
        if path is not None and not is_adapted(config, path, call.kind):
            return y
        weight = meta.unbox(scope.get_variable("params", call.leaf))
        adapter = adapter_of(config, path, call.kind, call.leaf, call.axes, weight.shape, weight.dtype)
        assert adapter is not None
        has_factors = scope.has_variable("params", next(iter(adapter.shapes)))
        # Without a path a layer has an adapter if the model took its variables from an adapted layer.
        may_lack = self.is_new or path is None or (config.layers_to_transform and not self.variables.is_bare)
        if not has_factors and may_lack:
            return y
        if path is None and (config.rank_pattern or config.alpha_pattern):
            raise ValueError(
                f"rank_pattern and alpha_pattern do not support a {type(module).__name__} that the model runs with "
                "its own apply, since its path is unknown"
            )
        if path is not None and self.has_dropout and not module.has_rng("dropout"):
            raise ValueError(
                f"the dropout rng does not reach {path!r}; add 'dropout' to split_rngs of the nn.scan or "
                "nn.vmap around it, or set dropout=0"
            )
        return add_low_rank_term(y, module, call, adapter, "params", weight)


def apply_lora_plus(model: nn.Module, config: LoRAPlusConfig) -> LoRAPlusModel:
    """Adds adapters to the layers of an existing Linen model that the config selects.

    The rules are checked when the model is first traced by `init` or `init_lora`, which raise ValueError for a rule
    that matches nothing.

    Returns:
      A module with the `init`, `apply` and base parameters of `model`; the factors are in the collection `"lora"`.

    Raises:
      TypeError: `model` is not a Linen module.
      ValueError: `model` already has adapters, or comes from `qwix.quantize_model`; see `from_qwix`.

    Example:
      >>> model = apply_lora_plus(nn.Sequential([nn.Dense(4), nn.Dense(2)]),
      ...                         LoRAPlusConfig(target_modules=["layers_0"], rank=2))
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> jax.tree.map(jnp.shape, variables["lora"])
      {'layers_0': {'lora_a': (3, 2), 'lora_b': (2, 4)}}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a flax.linen.Module, got {type(model).__name__}")
    if isinstance(model, LoRAPlusModel):
        raise ValueError("model already has adapters; name all layers in one LoRAPlusConfig")
    if hasattr(model, "_unquantized_type"):
        raise ValueError(
            "model comes from qwix, which would quantize the factors too; pass the model that qwix got, and the "
            "variables that from_qwix makes of qwix's"
        )
    return LoRAPlusModel(wrapped=model, lora_config=config)


def init_lora(
    model: nn.Module,
    rngs: Any,
    *args: Any,
    base: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[dict[str, Any], dict[str, AdapterSpec]]:
    """Initializes the adapters of a model and returns them with their specs, without computing base weights.

    Args:
      model: model from `apply_lora_plus`, or any Linen model with layers such as `LoRAPlusDense`.
      rngs: a key or a dict of keys, as for `model.init`.
      args, kwargs: arguments as for `model.init`; arrays may be `jax.ShapeDtypeStruct`.
      base: variables without adapters, `{"params": ...}`, to check the shapes of adapted weights; optional, but
        variant dora needs their norms. Where they are shapes its magnitudes are 0, for `set_magnitudes`.

    Returns:
      The tree of factors for the collection `"lora"`, and the table of specs, from path to `AdapterSpec`.

    Raises:
      ValueError: the model has no adapters, a rule matches nothing, a rank is above min(in, out), `base` does not
        match or is missing for variant dora, or the model uses the weight of an adapted layer outside the layer, or
        the layer in `nn.custom_vjp`, where the adapter has no effect.

    Example:
      >>> model = apply_lora_plus(nn.Dense(4), LoRAPlusConfig(target_modules=".*", rank=2))
      >>> lora, specs = init_lora(model, jax.random.key(0), jnp.ones((1, 3)))
      >>> specs[""].leaf, specs[""].shape
      ('params/kernel', (3, 4))
    """
    _, specs, draw = abstract_lora(model, rngs, *args, base=base, **kwargs)
    if base is None and any(spec.magnitude for spec in specs.values()):
        raise ValueError(
            "variant dora starts from the norms of the weights: pass init_lora(..., base=variables), with the "
            "variables of the model without adapters"
        )
    is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(base))
    lora = draw(rngs)
    return lora if is_abstract else set_magnitudes(lora, base or {}, specs), specs


def abstract_lora(
    model: nn.Module,
    rngs: Any,
    *args: Any,
    base: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[dict[str, Any], dict[str, AdapterSpec], Callable[[Any], dict[str, Any]]]:
    """The shapes of a model's factors, their specs, and a compiled function that draws factors from keys.

    Magnitudes of variant dora are drawn as zeros, for `set_magnitudes`. See `init_lora`.
    """
    # Shapes become zeros. The factors do not depend on them, so XLA removes them and the whole forward pass.
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    args, kwargs = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if is_shape(x) else x, (args, kwargs), is_leaf=is_shape
    )

    discoveries: list[Discovery] = []

    def init(rngs: Any) -> Any:
        with TRACING(Tracing(boxed=True, discoveries=discoveries)):
            return model.init(rngs, *args, **kwargs)

    # A single trace of `init` gives shapes, specs and values; only the factors are computed.
    program, shapes = jax.make_jaxpr(init, return_shape=True)(rngs)
    for discovery in discoveries:
        discovery.check()  # also if only some methods of a model were called
    if not shapes.get("lora"):
        raise ValueError(
            "the model has no adapters; wrap it with apply_lora_plus or use layers such as LoRAPlusDense"
        )
    specs = _specs(shapes)
    if base is not None:
        _check_base(base, specs)
    _check_reads(model, specs, shapes, rngs, args, kwargs)
    is_magnitude = lambda path: any(getattr(key, "key", "") == MAGNITUDE for key in path)  # noqa: E731

    @jax.jit
    def factors(*rngs: jax.Array) -> Any:
        variables = jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(program)(*rngs))
        # The magnitudes would be those of random weights, which XLA removes if nothing else needs them.
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.zeros_like(x) if is_magnitude(path) else x, variables["lora"]
        )

    return meta.unbox(shapes["lora"]), specs, lambda rngs: meta.unbox(factors(*jax.tree.leaves(rngs)))


def _resolve(model: nn.Module, method: Any) -> Callable[..., Any]:
    """Returns a method of the inner model as a function of the model."""
    if method is None:
        return type(model).__call__
    if isinstance(method, _Method):
        (method,) = method.args
    if isinstance(method, str):
        if not callable(getattr(type(model), method, None)):
            methods = [n for n in dir(type(model)) if not n.startswith("_")]
            raise AttributeError(f"{type(model).__name__} has no method {method!r}{suggest(method, methods)}")
        return getattr(type(model), method)
    # A bound method would run on its own module, which has no scope here.
    return getattr(method, "__func__", method)


def _specs(variables: Mapping[str, Any]) -> dict[str, AdapterSpec]:
    params = flatten(meta.unbox(dict(variables.get("params", {}))))
    boxes: dict[Any, Any] = dict(traverse_util.flatten_dict(dict(variables["lora"]), is_leaf=is_box))
    specs: dict[str, AdapterSpec] = {}
    owners: dict[str, str] = {}
    for path, box in boxes.items():
        if not isinstance(box, FactorBox) or path[-1] != box.spec.factors[0]:
            continue
        module = "/".join(path[:-1])
        leaf = "/".join(part for part in (module, box.spec.leaf) if part)
        if (owner := owners.setdefault(leaf, module)) != module:
            raise ValueError(f"params/{leaf} has two adapters, of {owner!r} and of {module!r}")
        specs[module] = dataclasses.replace(
            box.spec, leaf=f"params/{leaf}", shape=params[leaf].shape, stacked=box.stacked, layers=box.layers
        )
    return specs


def _check_base(base: Mapping[str, Any], specs: Mapping[str, AdapterSpec]) -> None:
    flat = flatten(base)
    if "params" not in base:
        raise ValueError(f'base must be variables {{"params": ...}}, got the keys {list(base)[:5]}')
    for spec in specs.values():
        if is_from_qwix(flat.get(spec.leaf)):
            raise ValueError(f"base: {spec.leaf} was quantized by qwix; pass what from_qwix makes of base")
        weight_of("base", flat, spec)


def _check_reads(
    model: nn.Module,
    specs: Mapping[str, AdapterSpec],
    shapes: Mapping[str, Any],
    rngs: Any,
    args: Any,
    kwargs: Any,
) -> None:
    """Raises ValueError if an adapted weight reaches the outputs outside its layer, or is changed before it.

    After merging, the adapter would take effect there too; during training it does not.
    """
    variables = meta.unbox({name: shapes[name] for name in COLLECTIONS if name in shapes})
    flow = trace_dataflow(
        jax.make_jaxpr(lambda variables, rngs: _low_rank_outputs(model, variables, rngs, args, **kwargs))(
            variables, rngs
        )
    )
    numbers = {leaf: n for n, leaf in enumerate(leaves_by_path(variables))}
    for path, spec in specs.items():
        # Flax's lifting hands all variables back, unused, as outputs of the program.
        users = flow.whole.get(numbers[spec.leaf], set()) - {"output"}
        if spec.kind == "parameter" and users:
            warn_of_whole(path, spec.shape, ", ".join(sorted(users)))
        problems = {
            # Flax calls its functions again when jax differentiates, after the model's interceptors ended.
            f"uses its weight {spec.leaf} in a function with a gradient of its own (nn.custom_vjp)": flow.custom,
            f"changes its weight {spec.leaf} before the layer uses it (by nn.map_variables)": flow.changed,
            f"also uses its weight {spec.leaf} outside the layer (by .embedding, .variables, get_variable)": (
                flow.read
            ),
        }
        problem = next((text for text, inputs in problems.items() if numbers[spec.leaf] in inputs), None)
        if spec.kind == "parameter" or problem is None:
            continue
        rule = {spec.leaf.removeprefix("params/"): spec.rule_letters}
        raise ValueError(
            f"{path or 'the model'!r} has an adapter, but the model {problem}, where the adapter has no "
            f"effect; name the weight in target_parameters instead: {rule}"
        )


def _low_rank_outputs(
    model: nn.Module,
    variables: Any,
    rngs: Any,
    args: Any,
    method: Any = None,
    mutable: Any = DenyList("intermediates"),  # noqa: B008
    capture_intermediates: Any = False,
    **kwargs: Any,
) -> list[jax.Array]:
    """Outputs and non-parameter state of a forward pass in which adapted layers return only their low-rank term.

    It runs as an initialization, since a model may not accept the same inputs twice, for example with a full cache.
    """
    bound = model.bind(
        variables, rngs=dict(rngs) if isinstance(rngs, Mapping) else {"params": rngs}, mutable=mutable
    )
    assert bound.scope is not None
    # Only `init` sets this flag (flax.core.scope, 0.12.8), and it would also initialize the parameters again.
    bound.scope.flags = freeze({**bound.scope.flags, "initializing": True})
    forward = model._forward(method) if isinstance(model, LoRAPlusModel) else method
    with TRACING(Tracing(low_rank_only=True)):
        y = _resolve(model, forward)(bound, *args, **kwargs)
    kept = {name: value for name, value in bound.variables.items() if name not in COLLECTIONS}
    return [leaf for leaf in jax.tree.leaves((y, kept)) if isinstance(leaf, jax.Array)]
