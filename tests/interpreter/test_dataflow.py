"""A weight with an adapter that the model also uses past its layer: rejected, and told from every other use."""

import ast
import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
from loraplus_jax.interpreter.dataflow import mark_weight, trace_dataflow
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama

from ..messages import mentions
from ..zoo.linen_toys import READ, Halved, OwnTied, squared
from ..zoo.properties import KEY, Toy, X, prove, traced

X, IDS = jnp.asarray(X), jnp.array([[1, 2, 3]])


def config(target="all-linear", **fields):
    return LoRAPlusConfig(**{"target_modules": target, "rank": 2, "alpha": 3.0} | fields)


def refusal(net, x, leaf):
    with pytest.raises(ValueError, match="has no effect") as error:
        init_lora(apply_lora_plus(net, config([leaf.rpartition("/")[0]])), KEY, x)
    return str(error.value)


@pytest.mark.filterwarnings("ignore:.*needs the whole weight")
@pytest.mark.parametrize("name", READ)
def test_a_weight_used_past_its_layer_is_rejected_and_the_rule_in_the_message_works(name, tmp_path):
    net, x, leaf = READ[name]
    message = refusal(net, x, leaf)
    assert f"params/{leaf} " in message
    rule = ast.literal_eval(re.findall(r"target_parameters.*?(\{.*\})", message)[0])
    _, specs = traced(apply_lora_plus(net, config((), target_parameters=rule)), x)
    assert [spec.leaf for spec in specs.values()] == [f"params/{leaf}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axes", "whole"),
    [("a method of a subclass's own", "io", False), ("scanned", "eio", False), ("a choice", "io", True)],
)
def test_such_a_weight_is_adapted_by_parameter(name, axes, whole, tmp_path):
    net, x, leaf = READ[name]
    prove(Toy(net, leaf, {"target_parameters": {leaf: axes}}, (x,), whole=whole), tmp_path)


def test_a_weight_that_the_model_changes_before_its_layer_is_rejected():
    with pytest.raises(ValueError, match=mentions("params/first/kernel", "before")):
        init_lora(apply_lora_plus(Halved(), config()), KEY, X)


@pytest.mark.slow
def test_our_own_layers_are_checked_too():
    assert sorted(init_lora(OwnTied(attend=True), KEY, IDS)[1]) == ["d", "emb"]
    with pytest.raises(ValueError, match=mentions("'emb'", "params/emb/embedding")):
        init_lora(OwnTied(attend=False), KEY, IDS)


@dataclasses.dataclass
class Answer:
    y: jax.Array


class Plain(nn.Module):
    """Gives back what jax knows nothing of."""

    @nn.compact
    def __call__(self, x, training):
        return Answer(nn.Dense(6, name="d")(x)), "text", None, training


def test_results_may_be_no_arrays():
    assert list(init_lora(apply_lora_plus(Plain(), config()), KEY, X, True)[1]) == ["d"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"remat": "dots"}, {"unroll": True, "attention": "splash"}])
def test_a_llama_whose_attention_has_its_own_gradient(options):
    sizes = {"vocab_size": 32, "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 12, "intermediate_size": 16, "max_position_embeddings": 512, "num_hidden_layers": 2}
    net = Llama(LlamaConfig(**sizes, tie_word_embeddings=True), **{"attention": "blocked"} | options)
    ids = jax.ShapeDtypeStruct((1, 300), jnp.int32)
    _, specs = init_lora(apply_lora_plus(net, config(rank=2)), KEY, ids)
    assert len(specs) == 7


def test_no_weight_of_the_base_is_made(monkeypatch):
    made = []
    net = nn.Dense(4, kernel_init=lambda key, shape, dtype: made.append(key) or jnp.ones(shape, dtype))
    init_lora(apply_lora_plus(net, config()), KEY, X)
    assert made
    assert all(isinstance(key, jax.core.Tracer) for key in made)


# the walk itself


@pytest.mark.parametrize(
    ("program", "read", "changed"),
    [
        (lambda u, v, w: (u + 1, v * 0), {0, 1}, set()),
        (lambda u, v, w: u + jnp.zeros_like(v) + w.shape[0], {0}, set()),
        (lambda u, v, w: (mark_weight(u), v), {1}, set()),
        (lambda u, v, w: mark_weight(u.T[:, 0]) + mark_weight(2 * v) + mark_weight(u + w), set(), {0, 1, 2}),
        (lambda u, v, w: jax.lax.cond(u[0, 0] > 0, lambda v, w: v, lambda v, w: v + 1, v, w), {0, 1}, set()),
        (lambda u, v, w: jax.lax.scan(lambda c, x: (x, c[0]), u, jnp.stack([v, v]))[1], {0, 1}, set()),
        (
            lambda u, v, w: jax.lax.fori_loop(0, 2, lambda n, c: (c[1], c[2], c[2]), (u, v, w))[0],
            {0, 1, 2},
            set(),
        ),
        (lambda u, v, w: jax.lax.while_loop(lambda c: c[0, 0] < w[0, 0], lambda c: c + 1, u), {0, 2}, set()),
        (lambda u, v, w: jax.jit(lambda u, v: (v, u))(u, v)[1], {0}, set()),
        (lambda u, v, w: jax.checkpoint(lambda u, v: jnp.sin(u) + mark_weight(-v))(u, v), {0}, {1}),
        (lambda u, v, w: jax.vmap(lambda u: u[0] + mark_weight(u).astype(u.dtype))(u), {0}, set()),
        (
            lambda u, v, w: jax.grad(lambda u: (u.sum() + mark_weight(v)) ** 2)(u) + 0 * squared(u, w),
            {0, 2},
            set(),
        ),
    ],
)
def test_which_inputs_reach_an_output(program, read, changed):
    flow = trace_dataflow(jax.make_jaxpr(program)(*[jnp.ones((2, 2))] * 3))
    assert (flow.read, flow.changed) == (read, changed)
