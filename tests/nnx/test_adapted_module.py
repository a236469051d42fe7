"""Calls of an adapted module: state, caches, gradients, jit and copies, as in the plain module."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.nnx import apply_lora_plus, disabled, lora_tree, merge, remove_adapters, unmerge

from ..messages import mentions
from ..zoo.nnx_toys import ATTENTION, LINEAR, PARAMETERS, Blocks, X, one
from .models import assert_close, build, randomise


@pytest.mark.slow
def test_copies_and_instances_share_a_trace():
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    model = build(ATTENTION)
    other = build(ATTENTION)
    randomise(model)
    copies = (
        nnx.clone(model),
        copy.deepcopy(model),
        nnx.merge(*nnx.split(model)),
    )
    y = run(model, X)
    run(other, X)
    for twin in copies:
        np.testing.assert_array_equal(run(twin, X), y)
    np.testing.assert_array_equal(run(disabled(model), X), run(other, X))
    assert len(traces) == 1


def test_unmerge_restores_bit_by_bit_and_remove_leaves_nothing():
    model = build(PARAMETERS)
    plain = PARAMETERS.make(nnx.Rngs(0))
    randomise(model)
    merged = merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(plain)
    unmerge(merged, model)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(merged), nnx.state(plain))
    remove_adapters(model)
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    with pytest.raises(ValueError, match="apply_lora_plus"):
        lora_tree(model)


class Counts(nnx.Module):
    """State that a call changes, makes and takes as an argument, beside adapted parameters and an adapted layer."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 8)))
        self.inner = nnx.Linear(8, 8, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Variable(jnp.zeros_like(X))

    def __call__(self, x, cache, label="none", scale=1.0):
        self.calls[...] += 1
        self.sow(nnx.Intermediate, "hidden", x)
        cache[...] = jnp.sum(cache[...]) + 1.0
        self.last[...] = x  # the very array of another input
        return {"y": self.drop(self.inner(x @ self.w[...])) * scale, "label": label, "none": None}


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_a_call_changes_is_written_back_and_static_arguments_stay_static():
    model = Counts(nnx.Rngs(0))
    config = LoRAPlusConfig(target_modules=["inner"], target_parameters={"w": "io"}, rank=2)
    apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    cache = nnx.Variable(jnp.zeros(()))
    found = [model(X, cache, "abc", scale=2.0) for _ in range(2)]
    assert found[0]["label"] == "abc"
    assert (int(model.calls[...]), float(cache[...]), int(model.drop.rngs.count[...])) == (2, 2.0, 2)
    assert not np.array_equal(found[0]["y"], found[1]["y"])
    np.testing.assert_array_equal(model.last[...], X)
    assert len(nnx.pop(model, nnx.Intermediate)["hidden"].get_value()) == 2


@pytest.mark.slow
def test_attention_decodes_with_its_cache():
    make = lambda: nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))  # noqa: E731
    model = make()
    apply_lora_plus(model, LoRAPlusConfig(target_modules=["query", "value", "out"], rank=2), rngs=nnx.Rngs(1))
    randomise(model)
    model.init_cache(X.shape)
    step = nnx.jit(lambda net, x: net(x))
    found = np.concatenate([step(model, X[:, n : n + 1]) for n in range(5)], axis=1)
    assert int(model.cache_index[...]) == 5
    causal = np.tril(np.ones((1, 1, 5, 5)))
    assert_close(found, nnx.jit(lambda net: net(X, mask=causal, decode=False))(merge(model)))


@pytest.mark.slow
def test_dropout_follows_the_mode_and_its_own_stream():
    model = build(LINEAR, dropout=0.5)
    randomise(model)
    assert not np.array_equal(model(X), model(X))
    model.eval()
    np.testing.assert_array_equal(model(X), model(X))
    assert_close(model(X), merge(model)(X))


@pytest.mark.slow
def test_dropout_without_an_input_to_drop_is_rejected():
    model = nnx.Conv(4, 6, (3,), mask=np.ones((3, 4, 6), np.float32), rngs=nnx.Rngs(0))
    apply_lora_plus(
        model, LoRAPlusConfig(target_modules=".*", rank=2, init="gaussian", dropout=0.5), rngs=nnx.Rngs(1)
    )
    x = jnp.ones((2, 8, 4))
    with pytest.raises(ValueError, match=mentions("dropout=0", "(3, 4, 6)", "target_modules")):
        model(x)
    model.eval()
    assert_close(model(x), merge(model)(x))


class Applies(nnx.Linear):
    def __call__(self, x, act):
        return act(super().__call__(x))


def test_an_argument_may_close_over_a_traced_value():
    model = build(one(lambda r: Applies(8, 6, rngs=r)))
    randomise(model)
    run = nnx.jit(lambda net, t: net(X, lambda y: y * t))
    for t in (2.0, 3.0):
        assert_close(run(model, t), merge(model)(X, lambda y, t=t: y * t))


class Lazy(nnx.Linear):
    def __call__(self, x):
        self.made = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        return self.made(super().__call__(x))


def test_a_module_that_a_call_makes_is_named():
    model = build(one(lambda r: Lazy(8, 6, rngs=r)))
    with pytest.raises(ValueError, match=mentions("Lazy", "__init__")):
        model(X)


@pytest.mark.slow
def test_jax_jit_takes_an_adapted_model_and_traces_once_for_two():
    traces, models = [], []
    for seed in (0, 3):
        models.append(Blocks(nnx.Rngs(seed)))
        config = LoRAPlusConfig(target_modules=["up", "down"], rank=2)
        specs = apply_lora_plus(models[-1], config, rngs=nnx.Rngs(1))
        assert specs["layers/1/up"].leaf == "params/layers/1/up/kernel"
        randomise(models[-1], seed)

    @jax.jit
    def forward(model, x):
        traces.append(1)
        return model(x), model

    @jax.jit
    def forward_of_split(graph, state, x):
        traces.append(1)
        return nnx.merge(graph, state)(x)

    for model in models:
        y, returned = forward(model, X)
        assert_close(y, forward_of_split(*nnx.split(model), X))
        jax.tree.map(np.testing.assert_array_equal, lora_tree(returned), lora_tree(model))
        np.testing.assert_array_equal(forward(returned, X)[0], y)
    assert len(traces) == 2
    for model in models:
        assert_close(forward(model, X)[0], forward(merge(model), X)[0])
