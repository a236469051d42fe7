"""What is true of every adapted model, proved in float64 by one compiled program a model."""

import contextlib
import copy
import json
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loraplus_jax import (
    LoRAPlusConfig,
    apply_lora_plus,
    init_lora,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from loraplus_jax import nnx as loraplus_nnx
from loraplus_jax.adapter.dora import set_magnitudes
from loraplus_jax.adapter.lora import scale_variables
from loraplus_jax.adapter.spec import Specs, specs_from_json, specs_to_json
from loraplus_jax.adapter.tree import count, flatten, join_path, unflatten
from loraplus_jax.interpreter.weight import LowRankWeight

from ..messages import mentions

KEY = jax.random.key(0, impl="rbg")
X = np.random.default_rng(1).normal(size=(2, 4))


class Toy(NamedTuple):
    """A small model.

    Attributes:
      make: a Linen model, or a function that makes an NNX model of `nnx.Rngs`.
      paths: the paths that the rules match, each with "@" and its stacked axes, if it has some.
      rules: fields of the config.
      args: what the model is called with.
      whole: whether some W + s A B is computed.
      close: how far outputs may be from those of the merged model.
      gradients: whether the model has some, and those of the merged model.
      scales: whether the model takes `lora_scale`, and finds what it has no place for.
      wrap: makes the adapted Linen model of a config, if it is not `apply_lora_plus` of the whole.
      options: of a call of a Linen model, or of `apply_lora_plus` of NNX.
    """

    make: Any
    paths: str
    rules: Mapping[str, Any]
    args: tuple[Any, ...] = (X,)
    whole: bool = False
    close: float = 1e-9
    gradients: bool = True
    scales: bool = True
    wrap: Callable[[LoRAPlusConfig], Any] | None = None
    options: Mapping[str, Any] = {}

    def config(self, **fields: Any) -> LoRAPlusConfig:
        return LoRAPlusConfig(**{"rank": 2, "alpha": 3.0} | dict(self.rules) | fields)


def modules(*names, **fields):
    return {"target_modules": names} | fields


def parameters(**fields):
    return {"target_parameters": {path.replace("__", "/"): axes for path, axes in fields.items()}}


class Subject(NamedTuple):
    """An adapted model by what Linen and NNX have in common: functions of variables, and trees.

    Attributes:
      adapted, plain: of the variables; several adapted ones must all be the same.
      base, start: drawn variables, and factors of which the model is as without.
      refuse: takes a tree of factors, and raises if it does not fit.
    """

    adapted: tuple[Callable[..., Any], ...]
    plain: Callable[..., Any]
    base: dict[str, Any]
    start: dict[str, Any]
    specs: Specs
    config: LoRAPlusConfig
    args: tuple[Any, ...]
    refuse: Callable[[Any], Any]


def drawn(tree, seed=3, dtype=jnp.float64):
    """Normal draws instead of floats, and zeros instead of whole numbers."""
    rng = np.random.default_rng(seed)

    def draw(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(0.5 * rng.normal(size=x.shape), dtype or x.dtype)

    return jax.tree.map(draw, tree)


def at_start(lora, base, specs):
    """Factors of which B is zero and magnitudes are the norms."""
    zero = lambda path, x: np.zeros(x.shape, x.dtype) if path[-1].key.endswith("_b") else x  # noqa: E731
    lora = jax.tree_util.tree_map_with_path(zero, lora)
    return set_magnitudes(lora, base, specs) if any(s.magnitude for s in specs.values()) else lora


def traced(model, *args, **options):
    """Shapes of a Linen model's adapters, and their specs, without computing any."""
    specs = {}

    def init(key):
        lora, found = init_lora(model, key, *args, **options)
        specs.update(found)
        return lora

    return jax.eval_shape(init, KEY), specs


def of_linen(toy, **fields):
    config = toy.config(**fields)
    net, options = toy.make, dict(toy.options)
    model = toy.wrap(config) if toy.wrap else apply_lora_plus(net, config)
    keys = {"params": KEY} | options.get("rngs", {})
    shapes = jax.eval_shape(net.init, keys, *toy.args)
    base = {"params": drawn(shapes["params"])}
    base |= {  # statistics such as variances, which are positive, and caches
        name: jax.tree.map(lambda x: np.full(x.shape, jnp.issubdtype(x.dtype, jnp.floating), x.dtype), tree)
        for name, tree in shapes.items()
        if name not in ("params", "intermediates", "losses")
    }
    lora, specs = traced(model, *toy.args, base=base)
    run = lambda model: lambda variables, *args, **more: model.apply(variables, *args, **options | more)  # noqa: E731
    adapted = run(model)
    return Subject(
        (adapted,),
        run(net),
        base,
        at_start(drawn(lora, 5), base, specs),
        specs,
        config,
        toy.args,
        lambda lora: jax.eval_shape(lambda lora: adapted(base | {"lora": lora}, *toy.args), lora),
    )


def set_params(model, params):
    flat = flatten(params)
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))):
        node = model
        for key in path:
            node = getattr(node, key) if isinstance(key, str) and hasattr(node, key) else node[key]
        node.set_value(flat[join_path(path)])


def of_nnx(toy, **fields):
    config = toy.config(**fields)
    plain = toy.make(nnx.Rngs(0))
    model = nnx.clone(plain)
    base = drawn(loraplus_nnx.base_variables(plain))
    set_params(model, base["params"])
    specs = loraplus_nnx.apply_lora_plus(model, config, rngs=nnx.Rngs(1), **toy.options)
    assert nnx.graphdef(loraplus_nnx.merge(model)) == nnx.graphdef(plain)
    graph, state = nnx.split(plain)

    def run(variables, *args):
        module = nnx.merge(graph, state, copy=True)
        set_params(module, variables["params"])
        module.eval()
        return module(*args)

    start = at_start(drawn(loraplus_nnx.lora_tree(model), 5), base, specs)
    refuse = lambda lora: loraplus_nnx.set_lora(model, lora)  # noqa: E731
    return Subject((loraplus_nnx.functional(model),), run, base, start, specs, config, toy.args, refuse)


def arrays(y):
    return [
        x for x in jax.tree.leaves(y) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
    ]


def close(found, expected, tolerance):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        size = 1 + np.abs(b).max()
        np.testing.assert_allclose(np.float64(a) / size, np.float64(b) / size, rtol=0, atol=tolerance)


def assert_as_merged(subject, tolerance=1e-9, *, gradients=True, scales=True):
    """Equal to the plain model at first, and to the merged one with any factors: values, gradients, under vmap."""
    _, plain, base, start, specs, _, args, _ = subject
    lora = drawn(start, 7)
    positive = lambda path, x: np.abs(x) + 1 if "magn" in path[-1].key else x  # noqa: E731
    lora = jax.tree_util.tree_map_with_path(positive, lora)
    exact = tolerance == 1e-9
    # merge's gradient also goes through the norms, which DoRA holds fixed.
    gradients = gradients and not any(spec.magnitude for spec in specs.values())

    def valued(net):
        """Outputs, and the gradient of a number that depends on all of them, by a checkpoint of the model."""

        def loss(lora):
            y = arrays(net(lora))
            return sum(jnp.sum(jnp.sin(x)) for x in y), y

        if not gradients:
            return lambda lora: loss(lora)[1]
        return jax.grad(jax.checkpoint(loss), has_aux=True)

    @jax.jit
    def program(base, start, lora):
        results = []
        # The same adapter by A twice as large at half the scale, and none, in one call of all.
        times = lambda path, x: 2 * x if scales and path[-1].key.endswith("_a") else x  # noqa: E731
        double = jax.tree_util.tree_map_with_path(times, lora)
        members = jax.tree.map(lambda *x: jnp.stack(x), double, start)
        for adapted in subject.adapted:
            ours = lambda lora, **more: adapted(base | {"lora": lora} | more, *args)  # noqa: B023, E731

            def member(lora, share, ours=ours):
                scale = scale_variables(specs, {path: share * spec.scale for path, spec in specs.items()})
                return arrays(ours(lora, lora_scale=scale) if scales else ours(lora))

            every = jax.vmap(member)(members, jnp.array([0.5, 2.0]))
            results.append((valued(ours)(lora), arrays(ours(start)), every))
        merged = lambda lora: plain(base | merge(base, lora, specs), *args)  # noqa: E731
        return results, valued(merged)(lora), arrays(plain(base, *args))

    results, expected, off = jax.device_get(program(base, start, lora))
    on = expected[1] if gradients else expected
    assert max(np.abs(a - b).max() for a, b in zip(on, off, strict=True)) > 1e-3
    for found, first, every in results:
        close(found, expected, tolerance)
        close(first, off, 1e-12 if exact else tolerance)
        close(every, [np.stack(pair) for pair in zip(on, off, strict=True)], tolerance)


def assert_trees(subject, paths, directory, *, place=""):
    """Paths, shapes, roles and files of the adapter, and a tree that does not fit is refused by its path."""
    _, _, base, lora, specs, config, _, refuse = subject
    found = {path: spec.stacked for path, spec in specs.items()}
    named = [entry.partition("@")[::2] for entry in paths.split()]
    assert found == {path.removeprefix("."): tuple(json.loads(f"[{axes}]")) for path, axes in named}
    shapes = {
        name: shape
        for path, spec in specs.items()
        for name, shape in zip(spec.factor_paths(path), spec.factor_shapes, strict=True)
    }
    assert {name: x.shape for name, x in flatten(lora).items()} == shapes
    assert count(lora) == sum(map(math.prod, shapes.values()))
    assert specs_from_json(json.loads(json.dumps(specs_to_json(specs)))) == specs
    save_adapter(directory / "adapter", lora, specs, config)
    loaded = load_adapter(directory / "adapter")
    assert (loaded.specs, loaded.config) == (specs, config)
    jax.tree.map(np.testing.assert_array_equal, loaded.lora, lora)
    path, spec = min(specs.items())
    flat, first = flatten(lora), spec.factor_paths(path)[0]
    wider = [
        size + (letter == "r") for size, letter in zip(shapes[first], spec.factor_letters[0], strict=True)
    ]
    wrong = [(first, np.ones(wider))]
    if place is not None:
        wrong.append((f"{place}zzz/lora_a", flat[first]))
    for name, value in wrong:
        with pytest.raises(ValueError, match=mentions("zzz" if "zzz" in name else name.rpartition("/")[2])):
            refuse(unflatten(flat | {name: value}))

    def merged_and_back(base):
        merged = merge(base, lora, specs)
        old, new, back = (flatten(tree) for tree in (base, merged, unmerge(merged, base, specs)))
        assert {path for path in old if new[path] is not old[path]} == {spec.leaf for spec in specs.values()}
        assert all(back[path] is old[path] for path in old)
        return back

    jax.eval_shape(merged_and_back, base)


def prove(toy, directory, **fields):
    """All properties of a toy, also that it computes no whole W + s A B where two products with A and B do."""
    subject_of = of_linen if isinstance(toy.make, nn.Module) else of_nnx
    sums, original = [], LowRankWeight.sum
    quiet = warnings.catch_warnings(action="ignore", category=UserWarning)  # of whole weights
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        # JAX's caches may take a float64 NumPy array for the float32 one that it was without x64, but not a copy.
        toy = toy._replace(args=jax.tree.map(lambda x: jnp.asarray(copy.copy(x)), toy.args))
        with quiet if toy.whole else contextlib.nullcontext():
            subject = subject_of(toy, **fields)
        place = toy.paths.split("/")[0] + "/" if toy.wrap and "/" in toy.paths else ""
        assert_trees(subject, toy.paths, directory, place=place if toy.scales else None)
        patch.setattr(LowRankWeight, "sum", lambda *args: (sums.append(1), original(*args))[1])
        assert_as_merged(subject, toy.close, gradients=toy.gradients, scales=toy.scales)
    assert bool(sums) is toy.whole
