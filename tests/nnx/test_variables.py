"""An adapted NNX model as trees and as a pure function: the rest of the package takes it as a Linen model."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loraplus_jax import (
    LoRAPlusConfig,
    apply_lora_plus,
    describe,
    init_state,
    jit_step,
    lora_plus_adamw,
    make_mesh,
)
from loraplus_jax import nnx as loraplus_nnx
from loraplus_jax.step.theory import make_theory

from ..messages import mentions
from ..zoo.properties import traced

IDS = jnp.arange(12).reshape(2, 6)
CONFIG = LoRAPlusConfig(target_modules=["query", "out", "up", "emb", "head"], rank=2, alpha=3.0, lr_ratio=8.0)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, ids):
        emb = nn.Embed(13, 8, name="emb")
        x = emb(ids)
        x = x + nn.MultiHeadDotProductAttention(2, name="att")(x)
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x)))
        return nn.Einsum((8, 5), "btd,df->btf", name="head")(x) + jnp.mean(emb.attend(x))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.emb = nnx.Embed(13, 8, rngs=rngs)
        self.att = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.head = nnx.Einsum("btd,df->btf", (8, 5), (5,), rngs=rngs)

    def __call__(self, ids):
        x = self.emb(ids)
        x = x + self.att(x)
        x = x + self.down(nn.gelu(self.up(x)))
        return self.head(x) + jnp.mean(self.emb.attend(x))


def randomised(tree, seed=7):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) / 3, x.dtype), tree)


@pytest.fixture(scope="module")
def pair():
    """A Linen and an NNX model with the same weights and factors: (apply, variables, specs) of each."""
    linen = apply_lora_plus(LinenModel(), CONFIG)
    lora, linen_specs = traced(linen, IDS)
    model = nnx.eval_shape(lambda: NNXModel(nnx.Rngs(0)))
    specs = loraplus_nnx.apply_lora_plus(model, CONFIG, rngs=nnx.Rngs(1))
    variables = randomised(loraplus_nnx.base_variables(model)) | {"lora": randomised(lora, 8)}
    shapes = jax.eval_shape(LinenModel().init, jax.random.key(0), IDS)
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, variables["params"])
    return (linen.apply, variables, linen_specs), (loraplus_nnx.functional(model), variables, specs)


def loss_of(apply):
    return lambda v, batch, rng: ((jnp.sum(apply(v, batch) ** 2), jnp.float32(batch.size)), {})


def trained(apply, variables, specs, devices):
    """The factors after two steps, and the losses."""
    tx = lora_plus_adamw(1e-2, lr_ratio=CONFIG.lr_ratio, specs=specs, max_grad_norm=1.0)
    step = jit_step(loss_of(apply), tx, mesh=make_mesh(devices, devices=jax.devices()[:devices]))
    state = init_state({"lora": variables["lora"]}, tx, jax.random.key(0))
    losses = []
    for _ in range(2):
        state, metrics = step(state, {"params": variables["params"]}, IDS)
        losses.append(float(metrics["loss"]))
    return state.trainable, losses


@pytest.mark.slow
def test_steps_on_two_devices_are_those_of_linen_on_one(pair):
    linen, nnx_model = pair
    expected, found = trained(*linen, devices=1), trained(*nnx_model, devices=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), found, expected)


@pytest.mark.slow
def test_specs_and_theory_are_those_of_linen(pair):
    (linen, variables, linen_specs), (functional, _, specs) = pair
    assert specs == linen_specs
    lora, before = variables["lora"], randomised(variables["lora"], 9)
    frozen = {"params": variables["params"]}
    found = [
        jax.jit(make_theory(loss_of(apply), specs))({"lora": lora}, before, frozen, IDS)
        for apply in (linen, functional)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *found)


@pytest.mark.slow
def test_factors_keep_the_dtype_of_the_model():
    """Of another dtype they would compile every step again, and lose the optimizer's updates in bfloat16."""
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    loraplus_nnx.apply_lora_plus(model, LoRAPlusConfig(target_modules=".*", rank=2), rngs=nnx.Rngs(1))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loraplus_nnx.lora_tree(model))
    loraplus_nnx.set_lora(model, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(loraplus_nnx.lora_tree(model))} == {jnp.dtype("float32")}


def test_merged_weights_keep_the_dtype_of_the_base():
    model = nnx.Linear(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    loraplus_nnx.apply_lora_plus(model, LoRAPlusConfig(target_modules=".*", rank=2), rngs=nnx.Rngs(1))
    assert loraplus_nnx.merge(model).kernel[...].dtype == jnp.bfloat16


class Drops(nnx.Module):
    def __init__(self, rngs):
        self.up, self.drop = nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.up(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "rngs"), [(0.0, lambda: nnx.Rngs(0)), (0.5, lambda: nnx.Rngs(params=0, dropout=1))]
)
def test_a_key_draws_all_dropout_of_a_functional_model(rngs, rate):
    model = Drops(rngs())
    config = LoRAPlusConfig(target_modules=["up"], rank=2, dropout=rate)
    loraplus_nnx.apply_lora_plus(model, config, rngs=rngs())
    if rate:  # only the adapter's
        model.drop.rate = 0.0
    variables = loraplus_nnx.base_variables(model)
    variables["lora"] = randomised(loraplus_nnx.lora_tree(model))
    apply, x = loraplus_nnx.functional(model), jnp.ones((4, 8))
    first, again, other = (apply(variables, x, rngs=jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(apply(variables, x), apply(variables, x))
    with pytest.raises(ValueError, match=mentions("rngs", "'noise'")):
        apply(variables, x, rngs={"noise": jax.random.key(0)})


class Reads(nnx.Module):
    def __init__(self, rngs, method=False):
        self.emb, self.method = nnx.Embed(13, 8, rngs=rngs), method

    def __call__(self, ids):
        x = self.emb(ids)
        return self.emb.attend(x) if self.method else x @ self.emb.embedding[...].T


@pytest.mark.slow
def test_a_weight_that_is_read_past_its_layer_is_found():
    config = LoRAPlusConfig(target_modules=["emb"], rank=2)
    model = Reads(nnx.Rngs(0), method=True)
    loraplus_nnx.apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    loraplus_nnx.check_reads(model, IDS)
    model = Reads(nnx.Rngs(0))
    loraplus_nnx.apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=mentions("emb", "emb/embedding", "exclude_modules")):
        loraplus_nnx.check_reads(model, jax.ShapeDtypeStruct(IDS.shape, IDS.dtype))
    plain = Reads(nnx.Rngs(0))
    graph = nnx.graphdef(plain)
    with pytest.raises(ValueError, match=mentions("emb/embedding")):
        loraplus_nnx.apply_lora_plus(plain, config, rngs=nnx.Rngs(1), check=(IDS,))
    assert nnx.graphdef(plain) == graph


@pytest.mark.parametrize("method", [True, False])
def test_reads_of_packed_weights_are_found_too(method):
    model = Reads(nnx.Rngs(0), method)
    specs = loraplus_nnx.apply_lora_plus(
        model, LoRAPlusConfig(target_modules=["emb"], rank=2), rngs=nnx.Rngs(1)
    )
    loraplus_nnx.quantize_base(model, "int8", specs)
    if method:
        assert loraplus_nnx.check_reads(model, IDS) == {}
    else:
        with pytest.raises(ValueError, match=mentions("emb/embedding")):
            loraplus_nnx.check_reads(model, IDS)


class Masked(nnx.Module):
    """A layer whose weight is used by rank, and two whose weight is changed before it is used."""

    def __init__(self, rngs):
        self.fc = nnx.Linear(8, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), mask=jnp.ones((3, 8, 8)).at[0].set(0), rngs=rngs)
        self.stack = nnx.split_rngs(splits=2)(nnx.vmap(Squared, in_axes=(0,), out_axes=0))(rngs)

    def __call__(self, x):
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(self.conv(self.fc(x)), self.stack)


class Squared(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 8)))

    def __call__(self, x):
        return x @ jnp.square(self.w[...])


@pytest.mark.slow
def test_describe_says_which_products_are_not_by_rank():
    model, x = Masked(nnx.Rngs(0)), jnp.ones((2, 5, 8))
    config = LoRAPlusConfig(target_modules=["fc", "conv"], target_parameters={"stack/w": "bio"}, rank=2)
    specs = loraplus_nnx.apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    merged = loraplus_nnx.check_reads(model, x)
    assert set(merged) == {"conv", "stack/w"}
    table = describe(loraplus_nnx.lora_tree(model), lora_plus_adamw(1e-3, lr_ratio=2.0), specs, merged=merged)
    rows = {row.path: row.merged for row in table.rows if row.path.endswith("a")}
    assert rows == {"fc/lora_a": "", "conv/lora_a": "mul", "stack/w/lora_a": "square"}
    ends = [line.rsplit("  ", 1)[1] for line in str(table).splitlines()[:3]]
    assert ends == ["product", "merged for mul", "merged for mul"]
    with pytest.raises(ValueError, match=mentions("merged", "'cnv'")):
        describe(
            loraplus_nnx.lora_tree(model), lora_plus_adamw(1e-3, lr_ratio=2.0), specs, merged={"cnv": "mul"}
        )


def flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_a_step_costs_what_loralinear_costs():
    """At most 1 % above the products of `nnx.LoRALinear`, forward and backward."""
    x = jnp.ones((32, 64))
    ours = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    loraplus_nnx.apply_lora_plus(ours, LoRAPlusConfig(target_modules=".*", rank=4), rngs=nnx.Rngs(1))
    theirs = nnx.LoRALinear(64, 64, lora_rank=4, rngs=nnx.Rngs(0))
    costs = []
    for model in (ours, theirs):
        graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

        def loss(lora, rest, x, graph=graph):
            return jnp.sum(nnx.merge(graph, lora, rest, copy=True)(x))

        costs.append(flops(jax.value_and_grad(loss), lora, rest, x))
    assert costs[0] <= 1.01 * costs[1]


@pytest.mark.slow
def test_an_adapter_of_another_scale_is_rejected():
    model, other = NNXModel(nnx.Rngs(0)), NNXModel(nnx.Rngs(0))
    specs = loraplus_nnx.apply_lora_plus(model, CONFIG, rngs=nnx.Rngs(1))
    changed = dataclasses.replace(CONFIG, alpha=2 * CONFIG.alpha)
    other_specs = loraplus_nnx.apply_lora_plus(other, changed, rngs=nnx.Rngs(1))
    new = randomised(loraplus_nnx.lora_tree(other))
    before = loraplus_nnx.lora_tree(model)
    path, spec = next(iter(specs.items()))
    words = (path, "scale", f"{spec.scale}", f"{2 * spec.scale}")
    with pytest.raises(ValueError, match=mentions(*words)):
        loraplus_nnx.set_lora(model, new, specs=other_specs)
    with pytest.raises(ValueError, match=mentions("specs", path)):
        loraplus_nnx.set_lora(model, new, specs={})
    jax.tree.map(np.testing.assert_array_equal, loraplus_nnx.lora_tree(model), before)
    loraplus_nnx.set_lora(model, new, specs=specs)
    jax.tree.map(np.testing.assert_array_equal, loraplus_nnx.lora_tree(model), new)
