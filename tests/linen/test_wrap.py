"""apply_lora_plus over models of many shapes: the base untouched, the adapters equal to merged weights."""

import dataclasses
import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, LoRAPlusDense, apply_lora_plus, init_lora, merge
from loraplus_jax.adapter.spec import specs_from_json, specs_to_json

from ..messages import mentions
from ..refusals import refusals
from .models import (
    CONFIG,
    KEY,
    Block,
    Halved,
    Raw,
    Reversed,
    Scanned,
    Setup,
    Tied,
    X,
    adapters_of,
    assert_equal,
    assert_merged,
    config,
    drawn,
    prepared,
    variables_of,
)


def run(model, variables):
    """The outputs of a model, compiled as one program."""
    return jax.jit(model.apply)(variables, X)


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(6, name="up")(x))
        return nn.Dense(4, name="down")(h)


class Shared(nn.Module):
    def setup(self):
        self.up = nn.Dense(4)

    def __call__(self, x):
        return self.up(jnp.tanh(self.up(x)))


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)(name="block")(x)[0]


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
        )
        return dense(5, name="up")(x)


class ScannedTwice(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        inner = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return inner(name="inner")(x, None)


class Nest(nn.Module):
    @nn.compact
    def __call__(self, x):
        outer = nn.scan(ScannedTwice, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return outer(name="outer")(x, None)[0]


class OwnDense(nn.Dense):
    """A subclass of a user's own that calls super."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Owned(nn.Module):
    @nn.compact
    def __call__(self, x):
        return OwnDense(5, use_bias=False, name="up")(x)


# model, path of the adapted module, shape of its kernel, stacked axes
MODELS = {
    "compact": (Compact(), "up", (4, 6), ()),
    "setup": (Setup(), "up", (4, 6), ()),
    "shared": (Shared(), "up", (4, 4), ()),
    "sequential": (nn.Sequential([Setup(), jnp.tanh]), "layers_0/up", (4, 6), ()),
    "scan 0": (Scanned(0), "layers/up", (3, 4, 6), (0,)),
    "scan 1": (Scanned(1), "layers/up", (4, 3, 6), (1,)),
    "scan -1": (Scanned(-1), "layers/up", (4, 6, 3), (-1,)),
    "scan remat": (Scanned(0, remat=True), "layers/up", (3, 4, 6), (0,)),
    "scan scan": (Nest(), "outer/inner/up", (2, 3, 4, 6), (0, 1)),
    "remat": (Remat(), "block/up", (4, 6), ()),
    "vmap": (Vmapped(), "up", (3, 4, 5), (0,)),
    "subclass": (Owned(), "up", (4, 5), ()),
}


SLOW = ("scan 1", "scan -1", "scan remat")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MODELS]
)
def test_any_model(name):
    inner, path, shape, stacked = MODELS[name]
    model = apply_lora_plus(inner, CONFIG)
    plain, variables = jax.jit(lambda key: (inner.init(key, X), model.init(key, X)))(KEY)
    assert variables.keys() == {"params", "lora"}
    assert_equal(variables["params"], plain["params"])
    start = run(inner, plain)
    np.testing.assert_array_equal(run(model, variables), start)

    lora, specs = init_lora(model, KEY, X, base=plain)
    assert_equal(lora, variables["lora"])
    assert list(specs) == [path]
    spec = specs[path]
    assert (spec.leaf, spec.shape, spec.stacked) == (f"params/{path}/kernel", shape, stacked)
    assert (spec.kind, spec.axes, spec.rank, spec.scale) == ("dense", "io", 2, 1.5)
    assert specs_from_json(json.loads(json.dumps(specs_to_json(specs)))) == specs

    lora = drawn(lora)
    adapted, merged = run(model, {**plain, "lora": lora}), run(inner, merge(plain, lora, specs))
    assert abs(adapted - start).max() > 0.1
    np.testing.assert_allclose(adapted, merged, rtol=1e-5, atol=1e-5)


class Attribute(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(self.inner(x))


class InSetup(nn.Module):
    wrap: object

    def setup(self):
        self.inner, self.head = self.wrap(Setup()), nn.Dense(3)

    def __call__(self, x):
        return self.head(self.inner(x))


class InCompact(nn.Module):
    wrap: object

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(self.wrap(Setup(name="inner"))(x))


NESTINGS = {"attribute": lambda wrap: Attribute(wrap(Setup())), "setup": InSetup, "compact": InCompact}


@pytest.mark.parametrize("name", NESTINGS)
def test_inside_another_model(name):
    plain, model = NESTINGS[name](lambda m: m), NESTINGS[name](partial(apply_lora_plus, config=CONFIG))
    base, variables = jax.jit(lambda key: (plain.init(key, X), model.init(key, X)))(KEY)
    assert_equal(variables["params"], base["params"])
    lora, specs = adapters_of(model)
    assert jax.tree.map(jnp.shape, lora) == jax.tree.map(jnp.shape, variables["lora"])
    assert [spec.leaf for spec in specs.values()] == ["params/inner/up/kernel"]
    adapted = model.apply({**base, "lora": lora}, X)
    assert abs(adapted - plain.apply(base, X)).max() > 0.1
    np.testing.assert_allclose(adapted, plain.apply(merge(base, lora, specs), X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method", ["encode", Setup.encode, Setup().encode], ids=["name", "function", "bound"]
)
def test_methods(method):
    model = apply_lora_plus(Setup(), CONFIG)
    base, (lora, specs) = variables_of(Setup()), adapters_of(model)
    expected = Setup().apply(merge(base, lora, specs), X, method="encode")
    np.testing.assert_allclose(
        model.apply({**base, "lora": lora}, X, method=method), expected, rtol=1e-5, atol=1e-5
    )
    y, variables = jax.eval_shape(partial(model.init_with_output, method=method), KEY, X)
    assert y.shape == (2, 6)
    assert variables["params"].keys() == {"up"}
    assert jax.eval_shape(partial(model.init, method=method), KEY, X) == variables


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(AttributeError, match=mentions("Setup", "'encod'", "'encode'")):
        apply_lora_plus(Setup(), CONFIG).apply({}, X, method="encod")


def test_only_modules_are_wrapped():
    with pytest.raises(TypeError, match=mentions("flax.linen.Module", "function")):
        apply_lora_plus(lambda x: x, CONFIG)


def start(base):
    return init_lora(apply_lora_plus(Setup(), CONFIG), KEY, X, base=base)


NARROW, BARE = {"up": {"kernel": jnp.zeros((4, 5))}}, {"up": {"kernel": jnp.zeros((4, 6))}}

test_models_and_bases_that_do_not_fit = refusals(
    (lambda: init_lora(Setup(), KEY, X), "apply_lora_plus"),
    (lambda: start({"params": NARROW}), "params/up/kernel", "(4, 6)", "(4, 5)"),
    (lambda: start({"params": {}}), "params/up/kernel", "(4, 6)", "missing"),
    (lambda: start(BARE), "params", "'up'"),
    (lambda: prepared(Unbound(), config("up", alpha_pattern={"up": 50.0})), "alpha_pattern", "Dense"),
    error=ValueError,
)


def test_init_lora_makes_no_base_weights():
    dense = nn.Sequential([nn.Dense(512), nn.Dense(512)])
    model = apply_lora_plus(dense, LoRAPlusConfig(target_modules=".*", rank=1))
    x = jax.ShapeDtypeStruct((1, 512), jnp.float32)
    traced = jax.jit(lambda key: init_lora(model, key, x)[0]).trace(KEY)
    # What it computes operation by operation or in a program of its own, and that program once compiled.
    made = [var.aval.size for eqn in traced.jaxpr.eqns for var in eqn.outvars]
    assert max(made) <= 512
    compiled = traced.lower().compile()
    assert "512,512]" not in compiled.as_text()
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 512 * 512 * 4 / 10
    assert "512,512]" in jax.jit(model.init).lower(KEY, jnp.zeros(x.shape)).compile().as_text()


def test_init_lora_takes_shapes_for_arrays():
    model = apply_lora_plus(Setup(), CONFIG)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for got, expected in zip(init_lora(model, KEY, shape), init_lora(model, KEY, X), strict=True):
        assert_equal(got, expected)


class Jitted(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="down")(nn.relu(nn.Dense(4, name="up")(x)))


class Up(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="up")(x)


class JittedBlocks(nn.Module):
    """Two layers that `nn.jit` takes for one: it does not look at names."""

    @nn.compact
    def __call__(self, x):
        for n in range(2):
            x = nn.jit(Up)(name=f"layer_{n}")(x)
        return x


def adapted(inner, **fields):
    return apply_lora_plus(inner, config("up", **fields))


@pytest.mark.slow
def test_each_config_has_traces_of_its_own_under_jit_inside_the_model():
    base = Jitted().init(KEY, X)
    for fields, shapes in (
        ({}, {"up": ((4, 2), (2, 4))}),
        ({}, {"up": ((4, 2), (2, 4))}),
        ({"rank": 3}, {"up": ((4, 3), (3, 4))}),
        ({"target_modules": ["down"]}, {"down": ((4, 2), (2, 4))}),
        ({"target_modules": "all-linear"}, dict.fromkeys(("down", "up"), ((4, 2), (2, 4)))),
    ):
        lora, specs = init_lora(adapted(Jitted(), **fields), KEY, X, base=base)
        assert {path: (x["lora_a"].shape, x["lora_b"].shape) for path, x in lora.items()} == shapes
        assert specs.keys() == shapes.keys()
    assert Jitted().init(KEY, X).keys() == {"params"}
    assert jax.tree.map(jnp.shape, Jitted().init(KEY, X)) == jax.tree.map(jnp.shape, base)


def test_jit_inside_the_model_is_traced_once_when_run_again():
    traces = []

    class Counted(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            traces.append(x)
            return nn.Dense(4, name="up")(x)

    model = adapted(Counted())
    variables = model.init(KEY, X)
    model.apply(variables, X)
    before = len(traces)
    model.apply(variables, X + 1)
    assert len(traces) == before


@pytest.mark.parametrize("own", [True, False], ids=["own layer", "wrapped inside"])
def test_the_specs_are_there_after_a_plain_init_under_jit(own):
    class Outer(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            inner = (
                LoRAPlusDense(4, rank=2, name="up") if own else adapted(Up(name="up"), target_modules=".*")
            )
            return inner(x)

    variables = Outer().init(KEY, X)
    lora, specs = init_lora(Outer(), KEY, X)
    assert [spec.rank for spec in specs.values()] == [2]
    assert jax.tree.map(jnp.shape, lora) == jax.tree.map(jnp.shape, variables["lora"])


@dataclasses.dataclass(frozen=True)
class Sizes:
    hidden: int = 6


class Described(Setup):
    """With fields of its own, a `config` among them, and a submodule as a field."""

    config: Sizes = Sizes()
    part: nn.Module | None = None

    def width(self):
        return self.config.hidden


def test_fields_and_methods_of_the_model_are_those_of_the_wrapper():
    model = apply_lora_plus(Described(), CONFIG)
    assert model.config == Sizes()
    assert model.config.hidden == 6
    with pytest.raises(AttributeError, match="encod"):
        _ = model.encod
    variables = drawn(jax.eval_shape(model.init, KEY, X))
    bound = model.bind(variables)
    encoded = model.apply(variables, X, method="encode")
    np.testing.assert_array_equal(bound.encode(X), encoded)
    np.testing.assert_array_equal(model.apply(variables, X, method=model.encode), encoded)
    # A submodule runs with its adapter inside the model, and not at all from outside.
    up = model.apply(variables, X, method=lambda inner, x: inner.up(x))
    np.testing.assert_array_equal(jax.nn.relu(up), encoded)
    with pytest.raises(AttributeError, match=mentions("up", "Described", "method")):
        _ = bound.up
    plain = Described().apply({"params": variables["params"]}, X, method="encode")
    assert abs(encoded - plain).max() > 0.1
    assert bound.width() == 6


class Head(nn.Module):
    """Uses a part of a wrapped model before the whole of it."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, x, whole=True):
        h = self.backbone.encode(x)
        y = self.backbone(x) if whole else self.backbone.decode(h)
        return nn.Dense(3, name="head")(jnp.concatenate([h, y], axis=-1))


@pytest.mark.parametrize("whole", [True, False])
def test_one_method_may_be_called_before_the_others(whole):
    model, plain = Head(apply_lora_plus(Setup(), config("up", "down"))), Head(Setup())
    base = drawn(jax.eval_shape(plain.init, KEY, X))
    lora, specs = init_lora(model, KEY, X, whole, base=base)
    assert specs.keys() == {"backbone/up", "backbone/down"}
    lora = drawn(lora)
    found = model.apply({**base, "lora": lora}, X, whole)
    np.testing.assert_allclose(found, plain.apply(merge(base, lora, specs), X, whole), rtol=1e-5, atol=1e-5)


def test_init_lora_traces_a_model_twice():
    calls = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls.append(1)
            return nn.Dense(4, name="up")(x)

    init_lora(apply_lora_plus(Counted(), CONFIG), KEY, X)
    assert len(calls) == 2


def test_merge_names_a_base_without_its_collection_and_takes_adapters_with_or_without_theirs():
    base, (lora, specs) = variables_of(Setup()), adapters_of(apply_lora_plus(Setup(), CONFIG))
    with pytest.raises(ValueError, match=mentions("params", "'up'")):
        merge(base["params"], lora, specs)
    assert_equal(merge(base, {"lora": lora}, specs), merge(base, lora, specs))


class Many(nn.Module):
    """Layers in containers, and names that are no methods: a function as a field, a static method."""

    act: object = nn.relu
    dtype: object = jnp.float32

    def setup(self):
        self.layers, self.named = [nn.Dense(4), nn.Dense(4)], {"up": nn.Dense(4)}

    def __call__(self, x):
        return self.named["up"](self.layers[1](self.layers[0](x)))

    @staticmethod
    def size(n):
        return 2 * n

    @nn.nowrap
    def carry(self, n):
        return jnp.zeros(n)


def test_layers_in_containers_run_inside_the_model_only_and_all_else_is_as_it_is():
    inner = Many(act=nn.gelu, dtype=jnp.bfloat16)
    model = apply_lora_plus(inner, config("layers_0", "layers_1", "named_up"))
    assert (model.act, model.dtype, model.size(3), model.carry(2).shape) == (nn.gelu, jnp.bfloat16, 6, (2,))
    variables = drawn(jax.eval_shape(model.init, KEY, X))
    for name in ("layers", "named"):
        with pytest.raises(AttributeError, match=mentions(name, "Many", "method")):
            getattr(model.bind(variables), name)


def test_tied_weights_lazy_names_and_batch_statistics():
    ids = jnp.array([[1, 2, 3]])
    model = apply_lora_plus(Tied(), config("words", "layers_0", "layers_1"))
    lora, specs = init_lora(model, KEY, ids)
    assert sorted(specs) == ["layers_0", "layers_1", "words"]
    variables = Tied().init(KEY, ids)
    lora = jax.tree.map(lambda x: 0.3 * x, drawn(lora))
    found, state = model.apply({**variables, "lora": lora}, ids, mutable=["batch_stats"])
    merged = merge({"params": variables["params"]}, lora, specs)
    expected, other = Tied().apply({**variables, **merged}, ids, mutable=["batch_stats"])
    # Three rows: the norm divides by little.
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, other)


class OwnApply(nn.Module):
    """A submodule used through its own `.apply`: with variables of this module, and with constants."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(4, parent=None)
        params = self.param("inner", lambda key: inner.init(key, x)["params"])
        x = inner.apply({"params": params}, x)
        constant = nn.Dense(4, parent=None).apply({"params": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}}, x)
        return nn.Dense(4, name="last")(constant)


class Passed(nn.Module):
    """A submodule given from outside, and called twice."""

    layer: nn.Module

    def __call__(self, x):
        return self.layer(self.layer(x))


class Passing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Passed(nn.Dense(4, name="given"), name="user")(x)


class SharedScope(nn.Module):
    """A wrapper of the user's own whose inner module's parameters stand at its own level."""

    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return 2 * self.inner(x)


class Unbound(nn.Module):
    """A submodule taken apart and run by its own `.apply` with its own variables, adapters among them."""

    @nn.compact
    def __call__(self, x):
        up = nn.Dense(4, name="up")
        x = up(x)
        module, variables = up.unbind()
        return module.apply(variables, x)


class OwnInit(nn.Module):
    """Initializes a module inside, only to count its weights."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(4, parent=None)
        size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(inner.init, jax.random.key(0), x)))
        return nn.Dense(size, name="made")(x)


class Normed(nn.Module):
    """Flax's own WeightNorm has a parameter whose name holds a slash."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="down")(nn.WeightNorm(nn.Dense(4, name="up"))(x))


class Keyword(nn.Module):
    """Passes its input by name."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="up")(inputs=x)


PATTERNS = {"rank_pattern": {"layer_0/up": 3}, "alpha_pattern": {"layer_1/up": 50.0}}
LAYERS = ["layer_0/up", "layer_1/up"]
UNUSUAL = {
    "one layer": (nn.Dense(5), config(target_modules=".*"), [""]),
    "input by name": (Keyword(), config("up"), ["up"]),
    "own apply, constants": (OwnApply(), config("last"), ["last"]),
    "own apply, our parameters": (OwnApply(), config(target_parameters=["inner/kernel"]), ["inner/kernel"]),
    "passed from outside": (Passed(nn.Dense(4)), config("layer"), ["layer"]),
    "passed inside": (Passing(), config("given"), ["given"]),
    "shared scope": (SharedScope(nn.Dense(4, name="fc")), config(target_modules=".*"), [""]),
    "taken apart": (Unbound(), config("up"), ["up"]),
    "initialized inside": (OwnInit(), config(target_modules=".*"), ["made"]),
    "two equations": (Reversed(), config(target_parameters=["both/kernel"]), ["both/kernel"]),
    "names that hold a slash": (Normed(), config("down"), ["down"]),
    "mapped": (Halved(), config("last", target_parameters=["first/kernel"]), ["first/kernel", "last"]),
    "parameters": (
        Raw(),
        config("plain", target_parameters={"w": "oi", "experts": "eio"}),
        ["experts", "plain", "w"],
    ),
    "jit": (Jitted(), config("up", alpha=40.0), ["up"]),
    "jit, rslora": (Jitted(), config("up", use_rslora=True), ["up"]),
    "jit, pattern": (Jitted(), config("up", alpha_pattern={"up": 7.0}), ["up"]),
    "layers that jit takes for one": (JittedBlocks(), config("up"), LAYERS),
    "these with patterns": (JittedBlocks(), config("up", **PATTERNS), LAYERS),
    "one of these": (JittedBlocks(), config("up", layers_to_transform=[1]), ["layer_1/up"]),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models_start_as_without_adapters_and_then_equal_their_merged_weights(name):
    net, rules, paths = UNUSUAL[name]
    model, _, _, specs = assert_merged(net, rules)
    assert sorted(specs) == paths
    assert_equal(model.init(KEY, X)["params"], net.init(KEY, X)["params"])


class Equation(nn.Module):
    """Runs an Einsum with the equation that a caller names."""

    @nn.compact
    def __call__(self, x, equation="bi,io->bo"):
        return nn.Einsum((4, 4), None, name="layer")(x, equation)


def test_an_equation_without_an_adapter_is_rejected_in_every_call():
    model = apply_lora_plus(Equation(), LoRAPlusConfig(target_modules=["layer"], rank=2))
    x = jnp.ones((4, 4))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=mentions("target_modules", "layer", "bi,bi->b")):
        model.apply(variables, x, "bi,bi->b")


class Renamed(nn.Dense):
    """A Dense layer whose weight has another name than the layer table knows."""

    def param(self, name, *args, **kwargs):
        return super().param(f"my_{name}", *args, **kwargs)


def test_a_layer_that_no_rule_matches_may_be_of_any_kind():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Renamed(3, name="other")(nn.Dense(4, name="layer")(x))

    model = apply_lora_plus(Two(), LoRAPlusConfig(target_modules=["layer"], rank=2))
    variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
    assert set(variables["lora"]) == {"layer"}
