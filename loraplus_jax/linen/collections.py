"""Where adapters join a wrapped model's parameters on the way in, and leave them on the way out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta
from flax.core.scope import LazyRng

from ..config import LoRAPlusConfig
from ..inits import factor_inits
from ..lora import PREVIOUS_FACTORS, SCALE, TAP, rebox, weight_delta
from ..rules import TracedModule, is_target, layer_index, matching_rule, parameter_rule
from ..spec import LEAVES, AdapterSpec, factor_letters, layer_axis
from ..tree import FACTORS
from .layers import FactorBox, boxes_factors, is_box

COLLECTIONS = ["params", "lora", SCALE]
Path = tuple[str, ...]
_NORMS = (nn.WeightNorm, nn.SpectralNorm)
_NAMES = (*FACTORS, SCALE, TAP, *PREVIOUS_FACTORS.values())


class Boundary:
    """One call's way in and out.

    Factors of layers join the parameters at their own paths; `"lora"` itself stays, for layers that keep theirs
    there. Parameters with an adapter of their own go in as W + s A B, and come out as they were.

    Attributes:
      seen: module path to what was met there, filled while the model runs.
      leaves: paths of the parameters.
      stacks: path of an adapted module to the number of its layers, where they are stacked and only some are meant.
      own: paths of layers that bring their own adapter.
      is_bare: whether no adapter came in at all.
    """

    def __init__(self, config: LoRAPlusConfig, wrapper: nn.Module) -> None:
        assert wrapper.scope is not None
        self.config = config
        self.rng = wrapper.scope.rngs.get("params")
        self.boxed = boxes_factors()
        self.seen: dict[str, TracedModule] = {}
        self.leaves: set[str] = set()
        self.stacks: dict[str, int] = {}
        self.own: set[str] = set()
        self.is_bare = True
        self._norms: list[str] = []  # those that are running
        self._given: set[Path] = set()  # factors and scales that came in
        self._weights_there: set[Path] = set()  # parameters that came in
        self._weights: dict[Path, Any] = {}  # as they came in
        self._factors: dict[Path, Any] = {}

    def merge(self, collections: Mapping[str, Any]) -> dict[str, Any]:
        """On the way in."""
        params, lora, scales = (_flatten(collections.get(name, {})) for name in COLLECTIONS)
        self._given, self.is_bare = {*lora, *scales}, not lora
        self._weights_there = set(params)
        for path in [p for p in params if self._rule(p) is not None]:
            self._weights[path] = params[path]
            params[path] = self._merged(path, params[path], lora, scales.pop((*path, SCALE), None))
        inner = {"params": traverse_util.unflatten_dict(params | lora | scales)}
        # A norm of weights walks over all collections: what has done its work here is not to be seen there.
        left = {
            name: _without(collections[name], self._factors)
            for name in COLLECTIONS[1:]
            if name in collections
        }
        return inner | left

    def split(self, collections: Mapping[str, Any]) -> dict[str, Any]:
        """On the way out: the inverse of `merge`, new factors included."""
        groups: dict[str, dict[Path, Any]] = {name: {} for name in COLLECTIONS}
        for path, leaf in _flatten(collections.get("params", {})).items():
            # By where it came from, not by its name alone: a model may have a parameter called lora_a.
            ours = path in self._given or isinstance(leaf, FactorBox)
            owner = "params" if not ours else SCALE if path[-1] == SCALE else "lora"
            groups[owner][path] = leaf
        groups["lora"] = dict(self._chosen(groups["lora"]))
        for path, leaf in groups["params"].items():
            if self._rule(path) is not None:
                groups["params"][path] = leaf = self._weights.get(path, leaf)
                groups["lora"] |= self._factors_of(path, leaf)
        self.leaves = {"/".join(path) for path in groups["params"]}
        for name in COLLECTIONS[1:]:
            groups[name] = _flatten(collections.get(name, {})) | groups[name]
        if not self.boxed:
            groups["lora"] = {
                p: leaf.value if is_box(p, leaf) else leaf for p, leaf in groups["lora"].items()
            }
        return {name: traverse_util.unflatten_dict(flat) for name, flat in groups.items() if flat}

    def run_norm(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a module's method, and remembers meanwhile if it is a norm of the weights of a layer."""
        if not isinstance(module, _NORMS):
            return call(*args, **kwargs)
        self._norms.append(type(module).__name__)
        try:
            return call(*args, **kwargs)
        finally:
            self._norms.pop()

    def check_norm(self, path: str) -> None:
        """Raises ValueError for a layer to be adapted whose weight comes from a norm."""
        if self._norms:
            raise ValueError(
                f"{path!r} has its weight from nn.{self._norms[-1]}, which changes whatever the layer has, an "
                f"adapter too (target_modules: {matching_rule(self.config, path)!r}): name the weight that it "
                "starts from in target_parameters, or leave the layer out by exclude_modules"
            )

    def check_used(self, *, whole: bool) -> None:
        """Raises ValueError for what came in as an adapter and is none of this model and config.

        A layer need not have been met to be the model's, since a call may leave it out; but its weight is there.
        `whole` says that the call was one that `init_lora` looked at too, so that every layer of ours is in `own`.
        """
        for path in sorted(self._given):
            name, module = "/".join(path), "/".join(path[:-1])
            if path[-1] not in _NAMES:
                raise ValueError(
                    f"the variables hold {name!r} among the adapters, where only {', '.join(_NAMES)} stand"
                )
            if not self._weights_there.intersection({path[:-1], *((*path[:-1], leaf) for leaf in LEAVES)}):
                raise ValueError(
                    f"the variables hold an adapter for {module!r}, where the model has no weight: they are of "
                    "another config or another model"
                )
            if not self._is_asked(path, module) and (whole or module in self.seen):
                raise ValueError(
                    f"the variables hold an adapter for {module!r}, which no rule of the config names: they are of "
                    "another config or another model"
                )

    def _is_asked(self, path: Path, module: str) -> bool:
        """Whether a rule or a layer of ours asks for a factor or scale."""
        if (
            path in self._factors
            or path[-1] == SCALE
            or (self.config.target_modules and is_target(self.config, module))
        ):
            return True
        return any(f"{module}/".startswith(f"{own}/") or not own for own in self.own)

    def _chosen(self, lora: Mapping[Path, Any]) -> Iterator[tuple[Path, Any]]:
        """New factors, without those of layers that are not among `layers_to_transform`.

        In a stack their factors are zero: no gradient moves a pair of zero factors.
        """
        chosen = self.config.layers_to_transform
        for path, box in lora.items():
            module = "/".join(path[:-1])
            if chosen is None or not isinstance(box, FactorBox):
                yield path, box
            elif box.stacked:
                letters = factor_letters(box.axes, box.stacked)[path[-1] == "lora_b"]
                axis = layer_axis(letters, box.stacked)
                self.stacks[module] = size = box.value.shape[axis]
                here = tuple(n for n in chosen if n < size)
                mask = jnp.zeros(size, bool).at[jnp.array(here, int)].set(True)
                mask = jnp.expand_dims(mask, [n for n in range(len(letters)) if n != axis])
                yield path, box.replace(value=jnp.where(mask, box.value, 0), layers=here)
            elif layer_index(module) in chosen:
                yield path, box
            elif module in self.seen:
                self.seen[module].adapted = False  # it is in another layer, or in none

    def _rule(self, path: Path) -> str | None:
        """The rule of `target_parameters` for a leaf."""
        return parameter_rule(self.config, "/".join(path)) if self.config.target_parameters else None

    def _spec(self, path: Path, leaf: Any) -> AdapterSpec:
        """Of a parameter with an adapter of its own."""
        name, rule, value = "/".join(path), self._rule(path), meta.unbox(leaf)
        if not hasattr(value, "shape"):
            raise ValueError(
                f"target_parameters: {rule!r} matches {name!r}, which is a {type(value).__name__} of arrays and "
                "not one array: let the model keep each under a name of its own"
            )
        shape = tuple(value.shape)
        rules: Any = self.config.target_parameters
        axes, rank = rules[rule], self.config.rank_of(name)
        if len(axes) != len(shape):
            raise ValueError(
                f"target_parameters: {rule!r} matches {name!r} of shape {shape}, which the axes {axes!r} do not "
                "fit: give a letter for each axis"
            )
        spec = AdapterSpec(
            leaf=f"params/{name}",
            kind="parameter",
            axes=axes,
            shape=shape,
            rank=rank,
            scale=self.config.scale_of(name),
        )
        if rank > min(spec.sides):
            raise ValueError(
                f"rank {rank} is above min(in, out) = {min(spec.sides)} of {name!r}, {shape} "
                f"(target_parameters: {rule!r})"
            )
        return spec

    def _merged(self, path: Path, leaf: Any, lora: dict[Path, Any], scale: Any) -> Any:
        """W + s A B, added in float32; the factors are taken out of `lora`."""
        spec, name = self._spec(path, leaf), "/".join(path)
        factors = []
        for factor, shape in zip(FACTORS, spec.factor_shapes, strict=True):
            if (*path, factor) not in lora:
                raise ValueError(
                    f"the variables hold no adapter for {name!r} (target_parameters: {self._rule(path)!r}): pass "
                    "'lora' from init_lora beside 'params'"
                )
            self._factors[(*path, factor)] = lora.pop((*path, factor))
            factors.append(meta.unbox(self._factors[(*path, factor)]))
            if factors[-1].shape != shape:
                raise ValueError(
                    f"{factor} of {name!r} has shape {factors[-1].shape}, the config asks for {shape} "
                    f"(target_parameters: {self._rule(path)!r})"
                )
        value = meta.unbox(leaf)
        s = None if scale is None else jnp.reshape(scale, ())
        return rebox(
            leaf,
            (value + weight_delta(factors[0], factors[1], spec, s)).astype(value.dtype),
        )

    def _factors_of(self, path: Path, leaf: Any) -> dict[Path, Any]:
        """A parameter's factors as they came in, or new ones."""
        paths = [(*path, factor) for factor in FACTORS]
        if all(p in self._factors for p in paths):
            return {p: self._factors[p] for p in paths}
        spec = self._spec(path, leaf)
        known = {"kind": spec.kind, "leaf": "", "axes": spec.axes, "rank": spec.rank, "scale": spec.scale}
        inits: Any = factor_inits(self.config.init, spec.rank, spec.axes)
        assert self.rng is not None
        keys = [LazyRng.create(self.rng, *p).as_jax_rng() for p in paths]
        made = zip(paths, inits, keys, spec.factor_shapes, strict=True)
        return {
            p: FactorBox(init(key, shape, meta.unbox(leaf).dtype), **known) for p, init, key, shape in made
        }


def _without(tree: Any, paths: Iterable[Path]) -> Any:
    gone = set(paths)
    return traverse_util.unflatten_dict({p: leaf for p, leaf in _flatten(tree).items() if p not in gone})


def _flatten(tree: Any) -> dict[Path, Any]:
    return dict(traverse_util.flatten_dict(dict(tree), is_leaf=is_box))
