"""apply_lora_plus over models of many shapes: the base untouched, the adapters equal to merged weights."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, LoRAPlusDense, apply_lora_plus, init_lora, merge
from loraplus_jax.adapter.tree import flatten

from ..marks import slow
from ..messages import mentions
from ..refusals import refusals
from ..zoo.linen_toys import MODELS, Jitted, Setup, Unbound, Up
from ..zoo.properties import prove
from .models import CONFIG, KEY, X, adapters_of, assert_equal, config, drawn, variables_of

QUICK = ("setup", "scan 1", "inside, setup", "parameters")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in MODELS])
def test_any_model(name, tmp_path):
    prove(MODELS[name], tmp_path)


STARTS = ("these with patterns", "scan scan", "own apply, our parameters")


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_init_draws_what_the_plain_model_and_init_lora_draw(name):
    toy = MODELS[name]
    model = apply_lora_plus(toy.make, toy.config())

    @jax.jit
    def program(key):
        models = [net.init(key, *toy.args) for net in (toy.make, model)]
        return *models, init_lora(model, key, *toy.args)[0]

    with jax.enable_x64(True):
        plain, variables, lora = program(KEY)
    assert variables.keys() == plain.keys() | {"lora"}
    assert_equal(variables, plain | {"lora": lora})
    first, second = (leaf for path, leaf in sorted(flatten(lora).items())[:2])
    assert first.any()
    assert not second.any()


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


INTEGERS = {"up": {"kernel": jnp.zeros((4, 6), jnp.int8)}}
LETTERS = LoRAPlusConfig(target_parameters={"kernel": "io"})
WHOLE_NUMBERS = nn.Dense(6, param_dtype=jnp.int8, kernel_init=nn.initializers.ones, use_bias=False)
NARROW, BARE = {"up": {"kernel": jnp.zeros((4, 5))}}, {"up": {"kernel": jnp.zeros((4, 6))}}

test_models_and_bases_that_do_not_fit = refusals(
    (lambda: init_lora(Setup(), KEY, X), "apply_lora_plus"),
    (lambda: start({"params": NARROW}), "params/up/kernel", "(4, 6)", "(4, 5)"),
    (lambda: start({"params": {}}), "params/up/kernel", "(4, 6)", "missing"),
    (lambda: start(BARE), "params", "'up'"),
    (lambda: start({"params": INTEGERS}), "params/up/kernel", "int8", "quantize_base"),
    (
        lambda: init_lora(apply_lora_plus(WHOLE_NUMBERS, LoRAPlusConfig(target_modules=".*")), KEY, X),
        "kernel",
        "int8",
        "quantize_base",
    ),
    (
        lambda: init_lora(apply_lora_plus(WHOLE_NUMBERS, LETTERS), KEY, X),
        *("'kernel'", "int8", "quantize_base"),
    ),
    (
        lambda: init_lora(apply_lora_plus(Unbound(), config("up", alpha_pattern={"up": 50.0})), KEY, X),
        "alpha_pattern",
        "Dense",
    ),
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_init_lora_traces_a_model_twice():
    calls = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls.append(1)
            return nn.Dense(4, name="up")(x)

    init_lora(apply_lora_plus(Counted(), CONFIG), KEY, X)
    assert len(calls) == 2


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


class Equation(nn.Module):
    """Runs an Einsum with the equation that a caller names."""

    @nn.compact
    def __call__(self, x, equation="bi,io->bo"):
        return nn.Einsum((4, 4), None, name="layer")(x, equation)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_layer_that_no_rule_matches_may_be_of_any_kind():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Renamed(3, name="other")(nn.Dense(4, name="layer")(x))

    model = apply_lora_plus(Two(), LoRAPlusConfig(target_modules=["layer"], rank=2))
    variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
    assert set(variables["lora"]) == {"layer"}
