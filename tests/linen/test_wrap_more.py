"""What models of other packages brought to light: `nn.jit` inside a model, and names that Flax gave in a stack."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, LoRAPlusDense, apply_lora_plus, init_lora, merge

KEY = jax.random.key(0, impl="rbg")
X = jax.random.normal(jax.random.key(1), (2, 4))


class Jitted(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="down")(nn.relu(nn.Dense(4, name="up")(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="up")(x)


class JittedBlocks(nn.Module):
    """Two layers that `nn.jit` takes for one: it does not look at names."""

    @nn.compact
    def __call__(self, x):
        for n in range(2):
            x = nn.jit(Block)(name=f"layer_{n}")(x)
        return x


def adapted(inner, **fields):
    return apply_lora_plus(
        inner, LoRAPlusConfig(**{"target_modules": ["up"], "rank": 2, "alpha": 4.0} | fields)
    )


def drawn(tree, seed=3):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), tree)


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
    lora = drawn(lora)
    expected = Jitted().apply(merge(base, lora, specs), X)
    np.testing.assert_allclose(model.apply(base | {"lora": lora}, X), expected, rtol=1e-5, atol=1e-4)


def test_layers_that_jit_takes_for_one_have_their_own_adapters():
    lora, _ = init_lora(adapted(JittedBlocks(), layers_to_transform=[1]), KEY, X)
    assert list(lora) == ["layer_1"]
    patterns = {"rank_pattern": {"layer_0/up": 3}, "alpha_pattern": {"layer_1/up": 50.0}}
    for fields in ({}, patterns, {"alpha_pattern": patterns["alpha_pattern"]}):
        model, base = adapted(JittedBlocks(), **fields), JittedBlocks().init(KEY, X)
        lora, specs = init_lora(model, KEY, X)
        lora = drawn(lora)
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
                LoRAPlusDense(4, rank=2, name="up") if own else adapted(Block(name="up"), target_modules=".*")
            )
            return inner(x)

    variables = Outer().init(KEY, X)
    lora, specs = init_lora(Outer(), KEY, X)
    assert [spec.rank for spec in specs.values()] == [2]
    assert jax.tree.map(jnp.shape, lora) == jax.tree.map(jnp.shape, variables["lora"])


class Numbered(nn.Module):
    """A layer as Flax names it, `Dense_0`; in a stack this is no layer's number."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(4)(x), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Numbered, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 2)])
def test_a_number_from_flax_is_no_layer_of_a_stack(layers):
    model = adapted(Stack(), target_modules=["Dense_0"], layers_to_transform=layers)
    lora, specs = init_lora(model, KEY, X)
    assert specs["layers/Dense_0"].layers == layers
    a = np.asarray(lora["layers"]["Dense_0"]["lora_a"])
    assert [n for n in range(3) if a[n].any()] == list(layers)


def test_a_layer_left_out_stays_so_when_everything_is_mutable():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="layer_1")(Block(name="layer_0")(x))

    model = adapted(Two(), layers_to_transform=[1])
    variables = model.init(KEY, X)
    assert list(variables["lora"]) == ["layer_1"]
    _, after = model.apply(variables, X, mutable=True)
    jax.tree.map(np.testing.assert_array_equal, after, variables)


class Raw(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.lecun_normal(), (4, 4))


@pytest.mark.parametrize("inner", [nn.jit(Raw)(), Raw()], ids=["jit", "plain"])
def test_a_weight_with_an_adapter_comes_out_as_it_went_in(inner):
    model = adapted(inner, target_modules=(), target_parameters=["w"])
    variables = model.init(KEY, X)
    variables["lora"] = drawn(variables["lora"])
    y, after = model.apply(variables, X, mutable=True)
    jax.tree.map(np.testing.assert_array_equal, after, variables)
    np.testing.assert_array_equal(y, model.apply(variables, X))


class Part(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Numbered(name="body_0")(x)[0]


class Whole(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Part(name="part_1")(x)


def test_numbers_of_many_segments_matter_only_where_layers_are_chosen():
    _, specs = init_lora(adapted(Whole(), target_modules=["Dense_0"]), KEY, X)
    assert list(specs) == ["part_1/body_0/Dense_0"]
