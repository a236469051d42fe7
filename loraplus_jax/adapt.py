"""Adapters for any existing Linen model: `apply_lora_plus` wraps it, `init_lora` makes the factors and the specs.

The model's author does nothing. Outside, the factors are a collection of their own, `"lora"`; inside the model
they travel with `"params"`, so that `nn.scan`, `nn.remat`, `nn.vmap` and weight sharing treat them as they treat
the kernels. An interceptor adds the low-rank term to each targeted layer's output.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from .config import LoRAPlusConfig, matches, nearest
from .linen import Box, LoRAPlusDense, boxed_factors, dense_delta
from .lora import SCALE
from .spec import AdapterSpec
from .tree import FACTORS, flatten

_DENSE_CALL = inspect.unwrap(nn.Dense.__call__)
_COLLECTIONS = ["params", "lora", SCALE]


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
        seen: dict[str, _Seen] = {}
        has_dropout = self.has_rng("dropout") and self.config.dropout > 0.0
        interceptor = _interceptor(self.config, self.path, has_dropout, seen)

        def call(outer: "LoRAPlusModel", *args: Any, **kwargs: Any) -> Any:
            inner_method = _resolve(outer.model, method)
            with nn.intercept_methods(interceptor):
                return inner_method(outer.model, *args, **kwargs)

        mapped = nn.map_variables(
            call,
            _COLLECTIONS,
            trans_in_fn=_merge_collections,
            trans_out_fn=_split_collections,
            init=self.is_initializing(),
            mutable=self.is_mutable_collection("params"),
        )
        result = mapped(self, *args, **kwargs)
        if self.is_initializing():
            _check_coverage(self.config, seen)
        return result

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
      model: from `apply_lora_plus`, or any Linen model with `LoRAPlusDense` in it.
      rngs: a key or a dict of keys, as for `model.init`.
      *args, **kwargs: as for `model.init`; arrays may be given as `jax.ShapeDtypeStruct`.
      base: variables without adapters, `{"params": ...}`, checked against what the model expects where adapted.

    Returns:
      The tree of factors for the collection `"lora"`, and module path to `AdapterSpec`.

    Raises:
      ValueError: the model has no adapters, a rule matches nothing, a rank is above min(in, out), or `base` does
        not fit.

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
        with boxed_factors():
            return model.init(rngs, *args, **kwargs)

    shapes = jax.eval_shape(init, rngs)
    if not shapes.get("lora"):
        raise ValueError(
            "the model has no adapters: wrap it with apply_lora_plus or use LoRAPlusDense layers"
        )
    specs = _specs(shapes)
    if base is not None:
        _check_base(base, specs)
    return jax.jit(lambda rngs: meta.unbox(init(rngs)["lora"]))(rngs), specs


class _Seen:
    """What the interceptor met at a path: the module's type, and whether it was adapted or has weights."""

    def __init__(self, module: nn.Module) -> None:
        self.type = type(module).__name__
        self.adapted = False
        self.weights: list[str] = []


def _interceptor(
    config: LoRAPlusConfig, prefix: tuple[str, ...], has_dropout: bool, seen: dict[str, _Seen]
) -> Callable[..., Any]:
    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        y = next_fun(*args, **kwargs)
        if context.method_name != "__call__" or module.scope is None:
            return y
        path = "/".join(module.path[len(prefix) :])
        if isinstance(module, LoRAPlusDense):
            return y  # it has an adapter of its own, whatever the rules say
        entry = seen.setdefault(path, _Seen(module))
        # Compared by the function and not by the class: nn.vmap(nn.Dense) is a subclass that calls a plain
        # Dense inside, and a subclass of the user's own may call super().
        if context.orig_method.func is not _DENSE_CALL:
            entry.weights = entry.weights or _own_weights(module)
            return y
        if not matches(config.target_modules, path):
            return y
        entry.adapted = True
        if has_dropout and not module.has_rng("dropout"):
            raise ValueError(
                f"a dropout rng is given but does not reach {path!r}: an nn.scan or nn.vmap above it must name "
                "'dropout' in split_rngs, or set dropout=0"
            )
        x = args[0] if args else kwargs["inputs"]
        return y + dense_delta(module, x, config, collection="params", where=repr(path or "the model"))

    return intercept


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
            raise AttributeError(f"{type(model).__name__} has no method {method!r}{nearest(method, methods)}")
        return getattr(type(model), method)
    return getattr(method, "__func__", method)


def _merge_collections(collections: Any) -> dict[str, Any]:
    """Adapters join the parameters at their own paths; `"lora"` stays too, for layers that keep theirs there."""
    inner = {}
    for name in _COLLECTIONS:
        inner |= traverse_util.flatten_dict(collections.get(name, {}))
    merged = {"params": traverse_util.unflatten_dict(inner)}
    return merged | {name: collections[name] for name in _COLLECTIONS[1:] if name in collections}


def _split_collections(collections: Any) -> dict[str, Any]:
    """The inverse of `_merge_collections`."""
    groups: dict[str, dict] = {
        name: dict(traverse_util.flatten_dict(collections.get(name, {}), is_leaf=_is_box))
        for name in _COLLECTIONS[1:]
    }
    groups["params"] = {}
    for path, leaf in traverse_util.flatten_dict(collections.get("params", {}), is_leaf=_is_box).items():
        owner = "lora" if path[-1] in FACTORS else SCALE if path[-1] == SCALE else "params"
        groups[owner][path] = leaf
    return {name: traverse_util.unflatten_dict(flat) for name, flat in groups.items() if flat}


def _is_box(_: Any, value: Any) -> bool:
    return isinstance(value, Box)


def _check_coverage(config: LoRAPlusConfig, seen: Mapping[str, _Seen]) -> None:
    rules = config.target_modules if isinstance(config.target_modules, tuple) else (config.target_modules,)
    for rule in rules:
        one = rule if isinstance(config.target_modules, str) else (rule,)
        hits = {path: entry for path, entry in seen.items() if matches(one, path)}
        for path, entry in hits.items():
            if entry.weights and not entry.adapted:
                raise ValueError(
                    f"target_modules: {rule!r} matches {path!r} ({entry.type}); only Dense layers can be adapted"
                )
        if not any(entry.adapted for entry in hits.values()):
            raise ValueError(
                f"target_modules: {rule!r} matches no Dense layer{nearest(rule, _names(seen, config))}"
            )


def _names(seen: Mapping[str, _Seen], config: LoRAPlusConfig) -> list[str]:
    """What a rule could have named: last segments, or whole paths for a regular expression."""
    paths = [path for path, entry in seen.items() if path and entry.type.endswith("Dense")]
    return paths if isinstance(config.target_modules, str) else list({p.rpartition("/")[2] for p in paths})


def _specs(variables: Mapping[str, Any]) -> dict[str, AdapterSpec]:
    params = flatten(meta.unbox(dict(variables.get("params", {}))))
    boxes: dict[Any, Any] = dict(traverse_util.flatten_dict(dict(variables["lora"]), is_leaf=_is_box))
    specs = {}
    for path, box in boxes.items():
        if path[-1] != "lora_a" or not isinstance(box, Box):
            continue
        leaf = "/".join((*path[:-1], box.leaf))
        specs["/".join(path[:-1])] = AdapterSpec(
            leaf=f"params/{leaf}",
            kind=box.kind,
            axes=box.axes,
            shape=params[leaf].shape,
            rank=box.rank,
            scale=box.scale,
            stacked=box.stacked,
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
