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
from loraplus_jax.adapter.lora import scale_variables
from loraplus_jax.adapter.spec import specs_from_json, specs_to_json

from ..messages import mentions

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
X = jax.random.normal(jax.random.key(1), (2, 4))
CONFIG = LoRAPlusConfig(target_modules=["up"], rank=2, alpha=3.0)


def randomised(shapes, seed=7):
    """Normal draws of these shapes, so that no factor is zero; by numpy, which compiles nothing."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), shapes)


def variables_of(model):
    """Random variables of a model, made without compiling its `init`."""
    return randomised(jax.eval_shape(model.init, KEY, X))


def adapters_of(model):
    """Random adapters of a model, and the specs."""
    specs = {}

    def trace(key):
        lora, found = init_lora(model, key, X)
        specs.update(found)
        return lora

    return randomised(jax.eval_shape(trace, KEY)), specs


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def run(model, variables):
    """The outputs of a model, compiled as one program."""
    return jax.jit(model.apply)(variables, X)


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(6, name="up")(x))
        return nn.Dense(4, name="down")(h)


class Setup(nn.Module):
    def setup(self):
        self.up, self.down = nn.Dense(6), nn.Dense(4)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return nn.relu(self.up(x))

    def decode(self, h):
        return self.down(h)


class Shared(nn.Module):
    def setup(self):
        self.up = nn.Dense(4)

    def __call__(self, x):
        return self.up(jnp.tanh(self.up(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(4, name="down")(jnp.tanh(nn.Dense(6, name="up")(x))), None


class Scanned(nn.Module):
    axis: int = 0
    remat: bool = False
    split: bool = False

    @nn.compact
    def __call__(self, x):
        rngs = {"params": True} | ({"dropout": True} if self.split else {})
        block = nn.remat(Block) if self.remat else Block
        layers = nn.scan(block, variable_axes={"params": self.axis}, split_rngs=rngs, length=3)
        return layers(name="layers")(x, None)[0]


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

    lora = randomised(lora)
    adapted, merged = run(model, {**plain, "lora": lora}), run(inner, merge(plain, lora, specs))
    assert abs(adapted - start).max() > 0.1
    np.testing.assert_allclose(adapted, merged, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_one_layer():
    model = apply_lora_plus(nn.Dense(5), LoRAPlusConfig(target_modules=".*", rank=2))
    lora, specs = adapters_of(model)
    assert jax.tree.map(jnp.shape, lora) == {"lora_a": (4, 2), "lora_b": (2, 5)}
    assert (list(specs), specs[""].leaf) == ([""], "params/kernel")


def test_every_layer_of_a_stack_starts_with_its_own_draw():
    a = init_lora(apply_lora_plus(Scanned(), CONFIG), KEY, X)[0]["layers"]["up"]["lora_a"]
    assert (a[0] != a[1]).all()
    assert (a[1] != a[2]).all()


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


NESTINGS = {
    "attribute": lambda wrap: Attribute(wrap(Setup())),
    "setup": InSetup,
    "compact": InCompact,
}


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


def test_init_lora_by_another_method():
    lora, _ = init_lora(apply_lora_plus(Setup(), CONFIG), KEY, X, method="encode")
    assert jax.tree.map(jnp.shape, lora) == {"up": {"lora_a": (4, 2), "lora_b": (2, 6)}}


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(AttributeError, match=mentions("Setup", "'encod'", "'encode'")):
        apply_lora_plus(Setup(), CONFIG).apply({}, X, method="encod")


def test_keyword_inputs_reach_the_adapter():
    class Keyword(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="up")(inputs=x)

    model = apply_lora_plus(Keyword(), CONFIG)
    variables = randomised(jax.eval_shape(lambda: model.init(KEY, x=X)))
    assert (model.apply(variables, x=X) != Keyword().apply({"params": variables["params"]}, X)).all()


@pytest.mark.parametrize(
    ("target", "paths"),
    [
        (["up"], ["block/up"]),
        (["block/up", "down"], ["block/down", "block/up"]),
        ("block/(up|down)", ["block/down", "block/up"]),
        (".*", ["block/down", "block/up"]),
        (".*p", ["block/up"]),
    ],
)
def test_targets(target, paths):
    _, specs = adapters_of(apply_lora_plus(Remat(), LoRAPlusConfig(target_modules=target, rank=2)))
    assert sorted(specs) == paths


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Raw(name="raw")(nn.Dense(4, name="query")(x))
        x = nn.Einsum((4,), "ab,b->ab", use_bias=False, kernel_init=nn.initializers.ones, name="mean")(x)
        return nn.LayerNorm(name="norm")(x)


class Raw(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.ones, (4, 4))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["qurey"], mentions("'qurey'", "'query'")),
        (["query", "nothing"], mentions("'nothing'", "query")),
        ("query/.*", mentions("'query/.*'", "'query'")),
        (["norm"], mentions("'norm'", "query")),
        (["raw"], mentions("'raw'", "Raw", "'w'", "target_parameters")),
        ("(query|raw)", mentions("'(query|raw)'", "'raw'", "Raw")),
        (["mean"], mentions("'mean'", "'ab,b->ab'")),
    ],
)
@pytest.mark.parametrize("start", ["init", "init_lora"])
def test_a_target_that_cannot_be_adapted_is_rejected(target, message, start):
    model = apply_lora_plus(Mixed(), LoRAPlusConfig(target_modules=target, rank=2))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, KEY, X) if start == "init" else init_lora(model, KEY, X)


def test_only_modules_are_wrapped():
    with pytest.raises(TypeError, match=mentions("flax.linen.Module", "function")):
        apply_lora_plus(lambda x: x, CONFIG)


def test_a_model_without_adapters_is_rejected():
    with pytest.raises(ValueError, match="apply_lora_plus"):
        init_lora(Setup(), KEY, X)


@pytest.mark.parametrize("inner", [Setup(), Scanned()], ids=["flat", "scanned"])
def test_missing_factors_are_an_error_and_not_a_plain_model(inner):
    base = variables_of(inner)
    for variables in (base, {**base, "lora": {}}):
        with pytest.raises(ValueError, match=mentions("up", "init_lora")):
            apply_lora_plus(inner, CONFIG).apply(variables, X)


def test_a_rank_above_the_layer_is_rejected():
    with pytest.raises(ValueError, match=mentions("rank", 5, "'up'", "(4, 6)", 4)):
        init_lora(apply_lora_plus(Setup(), LoRAPlusConfig(target_modules=["up"], rank=5)), KEY, X)


def test_factors_of_another_rank_are_rejected():
    variables = variables_of(apply_lora_plus(Setup(), CONFIG))
    model = apply_lora_plus(Setup(), LoRAPlusConfig(target_modules=["up"], rank=3))
    with pytest.raises(ValueError, match=mentions("lora_a", "'up'", "(4, 2)", "(4, 3)")):
        model.apply(variables, X)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            {"params": {"up": {"kernel": jnp.zeros((4, 5))}}},
            mentions("params/up/kernel", "(4, 6)", "(4, 5)"),
        ),
        ({"params": {}}, mentions("params/up/kernel", "(4, 6)", "missing")),
    ],
)
def test_a_base_that_does_not_fit_is_rejected(base, message):
    with pytest.raises(ValueError, match=message):
        init_lora(apply_lora_plus(Setup(), CONFIG), KEY, X, base=base)


# Dropout


@pytest.mark.parametrize("inner", [Setup(), Scanned(split=True)], ids=["flat", "scanned"])
def test_dropout_acts_when_a_key_is_given(inner):
    model = apply_lora_plus(inner, LoRAPlusConfig(target_modules=["up"], rank=2, dropout=0.5))
    variables = variables_of(model)
    run = lambda *seed: model.apply(variables, X, rngs={"dropout": jax.random.key(*seed)} if seed else {})  # noqa: E731
    np.testing.assert_array_equal(run(1), run(1))
    assert (run(1) != run()).any()
    assert (run(1) != run(2)).any()


def test_a_key_that_does_not_reach_a_target_is_an_error():
    model = apply_lora_plus(Scanned(), LoRAPlusConfig(target_modules=["up"], rank=2, dropout=0.5))
    variables = variables_of(model)
    model.apply(variables, X)
    with pytest.raises(ValueError, match=mentions("'layers/up'", "nn.scan", "nn.vmap", "'dropout'")):
        model.apply(variables, X, rngs={"dropout": KEY})
    apply_lora_plus(Scanned(), CONFIG).apply(
        variables, X, rngs={"dropout": KEY}
    )  # dropout=0: nothing to reach


# Other collections, dtypes and layers


def test_mutable_collections_work_as_in_the_inner_model():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(6, name="up")(x))

    model = apply_lora_plus(Normed(), CONFIG)
    variables = variables_of(model)
    assert variables.keys() == {"params", "lora", "batch_stats"}
    variables["lora"]["up"]["lora_b"] *= 0
    plain = {name: variables[name] for name in ("params", "batch_stats")}
    got = model.apply(variables, X, mutable=["batch_stats"])
    expected = Normed().apply(plain, X, mutable=["batch_stats"])
    assert_equal(got, expected)
    assert (got[1]["batch_stats"]["norm"]["mean"] != plain["batch_stats"]["norm"]["mean"]).all()


def test_everything_mutable_gives_the_variables_back():
    model = apply_lora_plus(Scanned(), CONFIG)
    variables = variables_of(model)
    y, after = model.apply(variables, X, mutable=True)
    assert_equal(after, variables)
    np.testing.assert_array_equal(y, model.apply(variables, X))


@pytest.mark.parametrize(("dtype", "param_dtype"), [("bfloat16", "float32"), (None, "bfloat16")])
def test_dtypes_follow_the_layer(dtype, param_dtype):
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, dtype=dtype, param_dtype=param_dtype, name="up")(x)

    model = apply_lora_plus(Half(), CONFIG)
    variables = variables_of(model)
    variables["lora"]["up"]["lora_b"] *= 0
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {param_dtype}
    for x in (X, X.astype(jnp.bfloat16)):
        y, expected = model.apply(variables, x), Half().apply({"params": variables["params"]}, x)
        assert y.dtype == expected.dtype
        np.testing.assert_array_equal(y, expected)


def test_a_loraplus_layer_inside_keeps_its_own_adapter():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="up")(LoRAPlusDense(5, rank=1, alpha=1.0, name="own")(x))

    model = apply_lora_plus(Both(), CONFIG)
    lora, specs = adapters_of(model)
    assert {path: (spec.rank, spec.scale) for path, spec in specs.items()} == {
        "own": (1, 1.0),
        "up": (2, 1.5),
    }
    base = {"params": variables_of(model)["params"]}
    plain = nn.Sequential([nn.Dense(5), nn.Dense(4)])
    merged = merge(base, lora, specs)["params"]
    expected = plain.apply({"params": {"layers_0": merged["own"], "layers_1": merged["up"]}}, X)
    np.testing.assert_allclose(model.apply({**base, "lora": lora}, X), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_both_factors_of_every_layer():
    model = apply_lora_plus(Scanned(remat=True), CONFIG)
    variables = variables_of(model)
    loss = lambda lora: model.apply({**variables, "lora": lora}, X).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(variables["lora"])
    assert all((abs(leaf).max(axis=(1, 2)) > 0).all() for leaf in jax.tree.leaves(grads))


# Scale as a value


@pytest.mark.parametrize("inner", [Setup(), Scanned(1)], ids=["flat", "scanned"])
def test_scales_are_values_and_a_population_compiles_once(inner):
    model = apply_lora_plus(inner, CONFIG)
    base, (lora, specs) = variables_of(inner), adapters_of(model)
    traces = []

    @jax.jit
    @jax.vmap
    def run(scale):
        traces.append(scale)
        return model.apply({**base, "lora": lora, "lora_scale": scale_variables(specs, scale)}, X)

    scales = jnp.array([0.0, 0.5, 1.5])
    outputs = run(scales)
    run(scales + 1)
    assert len(traces) == 1
    np.testing.assert_allclose(outputs[0], inner.apply(base, X), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs[2], model.apply({**base, "lora": lora}, X), rtol=1e-5, atol=1e-5)
    thirds = jax.tree.map(lambda x: x / 3**0.5, lora)
    np.testing.assert_allclose(outputs[1], model.apply({**base, "lora": thirds}, X), rtol=1e-4, atol=1e-4)


def test_a_scale_per_layer():
    model, inner = apply_lora_plus(Scanned(), CONFIG), Scanned()
    base, (lora, specs) = variables_of(inner), adapters_of(model)
    scale = scale_variables(specs, np.array([1.5, 0.0, 0.0]).reshape(3, 1, 1))
    first = jax.tree.map(lambda x: x.at[1:].set(0.0), lora)
    got = model.apply({**base, "lora": lora, "lora_scale": scale}, X)
    np.testing.assert_allclose(got, model.apply({**base, "lora": first}, X), rtol=1e-5, atol=1e-5)


# No base weights


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


# nn.jit inside the model


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
    return apply_lora_plus(
        inner, LoRAPlusConfig(**{"target_modules": ["up"], "rank": 2, "alpha": 4.0} | fields)
    )


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


@pytest.mark.parametrize(
    "fields", [{}, {"alpha": 40.0}, {"use_rslora": True}, {"alpha_pattern": {"up": 7.0}}]
)
def test_each_scale_counts_under_jit_inside_the_model(fields):
    base = Jitted().init(KEY, X)
    model = adapted(Jitted(), **fields)
    lora, specs = init_lora(model, KEY, X)
    lora = randomised(lora, 3)
    expected = Jitted().apply(merge(base, lora, specs), X)
    np.testing.assert_allclose(model.apply(base | {"lora": lora}, X), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_layers_that_jit_takes_for_one_have_their_own_adapters():
    lora, _ = init_lora(adapted(JittedBlocks(), layers_to_transform=[1]), KEY, X)
    assert list(lora) == ["layer_1"]
    patterns = {"rank_pattern": {"layer_0/up": 3}, "alpha_pattern": {"layer_1/up": 50.0}}
    for fields in ({}, patterns, {"alpha_pattern": patterns["alpha_pattern"]}):
        model, base = adapted(JittedBlocks(), **fields), JittedBlocks().init(KEY, X)
        lora, specs = init_lora(model, KEY, X)
        lora = randomised(lora, 3)
        expected = JittedBlocks().apply(merge(base, lora, specs), X)
        np.testing.assert_allclose(model.apply(base | {"lora": lora}, X), expected, rtol=1e-5, atol=1e-3)


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
    variables = randomised(jax.eval_shape(model.init, KEY, X))
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
    config = LoRAPlusConfig(target_modules=["up", "down"], rank=2)
    model, plain = Head(apply_lora_plus(Setup(), config)), Head(Setup())
    base = randomised(jax.eval_shape(plain.init, KEY, X))
    lora, specs = init_lora(model, KEY, X, whole, base=base)
    assert specs.keys() == {"backbone/up", "backbone/down"}
    lora = randomised(lora)
    found = model.apply({**base, "lora": lora}, X, whole)
    np.testing.assert_allclose(found, plain.apply(merge(base, lora, specs), X, whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [None, "encode"])
def test_a_rule_that_no_method_meets_is_rejected(method):
    model = apply_lora_plus(Setup(), LoRAPlusConfig(target_modules=["up", "middle"], rank=2))
    with pytest.raises(ValueError, match=mentions("target_modules", "'middle'")):
        init_lora(model, KEY, X, method=method)


def test_init_lora_traces_a_model_twice():
    calls = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls.append(1)
            return nn.Dense(4, name="up")(x)

    init_lora(apply_lora_plus(Counted(), CONFIG), KEY, X)
    assert len(calls) == 2


def test_trees_without_their_collection_are_named():
    model = apply_lora_plus(Setup(), CONFIG)
    base = jax.eval_shape(Setup().init, KEY, X)
    with pytest.raises(ValueError, match=mentions("params", "'up'")):
        init_lora(model, KEY, X, base=base["params"])
    lora, specs = adapters_of(model)
    base = randomised(base)
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
    model = apply_lora_plus(
        inner, LoRAPlusConfig(target_modules=["layers_0", "layers_1", "named_up"], rank=2)
    )
    assert (model.act, model.dtype, model.size(3), model.carry(2).shape) == (nn.gelu, jnp.bfloat16, 6, (2,))
    variables = randomised(jax.eval_shape(model.init, KEY, X))
    for name in ("layers", "named"):
        with pytest.raises(AttributeError, match=mentions(name, "Many", "method")):
            getattr(model.bind(variables), name)


class OnlyEncodes(nn.Module):
    backbone: nn.Module

    def __call__(self, x):
        return self.backbone.encode(x)


@pytest.mark.parametrize("targets", [["up", "typo"], ["typo"]])
def test_rules_are_checked_where_an_outer_model_calls_one_method_only(targets):
    model = OnlyEncodes(apply_lora_plus(Setup(), LoRAPlusConfig(target_modules=targets, rank=2)))
    with pytest.raises(ValueError, match=mentions("target_modules", "'typo'")):
        init_lora(model, KEY, X)


def test_a_rule_without_an_adapter_in_the_variables_is_named():
    inner, two = Setup(), LoRAPlusConfig(target_modules=["up", "down"], rank=2)
    variables = variables_of(apply_lora_plus(inner, CONFIG))
    with pytest.raises(ValueError, match=mentions("target_modules", "'down'")):
        apply_lora_plus(inner, two).apply(variables, X, method="encode")
