"""Models in Equinox and Haiku, by their functions: the examples of the page, and where their libraries differ."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from loraplus_jax import LoRAPlusConfig, merge
from loraplus_jax.functions import apply_lora_plus, init_lora, whole_weights

from .harness import assert_close, drawn

X = jnp.linspace(-1, 1, 24).reshape(3, 8)


@pytest.mark.parametrize(("package", "name"), [("equinox", "11_equinox"), ("haiku", "13_haiku")])
def test_the_example_learns_and_merges(package, name):
    pytest.importorskip(package)
    path = Path(__file__).parents[2] / f"examples/{name}.py"
    before, after, same = runpy.run_path(str(path))["main"]()
    assert after < 0.1 * before
    assert same < 1e-5


def assert_as_merged(f, params, parameters, *args):
    """The adapted function is that of the merged weights, by thin products alone."""
    config = LoRAPlusConfig(target_parameters=parameters, rank=2)
    lora, specs = init_lora(jax.random.key(0), params, config)
    lora = drawn(lora)
    merged = merge({"params": params}, lora, specs)["params"]
    assert type(merged) is type(params)
    assert_close(apply_lora_plus(f, config)(params, lora, *args), f(merged, *args), 1e-5)
    assert not whole_weights(f, config, params, *args)


def test_equinox_s_attention_and_convolution():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(1))
    attention = eqx.nn.MultiheadAttention(2, 8, key=keys[0])
    names = "(query|key|value|output)_proj/weight"
    assert_as_merged(lambda model, x: model(x, x, x), attention, {names: "oi"}, X)
    conv = eqx.nn.Conv1d(3, 4, 3, key=keys[1])
    assert_as_merged(lambda model, x: model(x), conv, {"weight": "oii"}, X)


def test_equinox_s_embedding_looks_up_rows_alone():
    eqx = pytest.importorskip("equinox")
    table = eqx.nn.Embedding(4096, 64, key=jax.random.key(1))
    ids = jnp.arange(6).reshape(2, 3)
    both = lambda model, ids: jax.vmap(jax.vmap(model))(ids)  # noqa: E731
    assert_as_merged(both, table, {"weight": "io"}, ids)
    config = LoRAPlusConfig(target_parameters={"weight": "io"}, rank=2)
    lora, _ = init_lora(jax.random.key(0), table, config)
    g = apply_lora_plus(both, config)
    step = jax.jit(jax.grad(lambda lora, table: jnp.sum(jnp.sin(g(table, lora, ids)))))
    cost = step.lower(lora, table).compile()
    assert cost.cost_analysis()["flops"] < 4096 * 4
    assert cost.memory_analysis().temp_size_in_bytes < 4096 * 16


def test_haiku_s_attention():
    hk = pytest.importorskip("haiku")
    init = hk.initializers.VarianceScaling()
    attend = lambda x: hk.MultiHeadAttention(2, 4, w_init=init, name="mha")(x, x, x)  # noqa: E731
    net = hk.without_apply_rng(hk.transform(attend))
    params = net.init(jax.random.key(1), X)
    assert_as_merged(net.apply, params, {"mha/(query|key|value|linear)/w": "io"}, X)
