"""A weight with an adapter that the model also uses past its layer: rejected, and told from every other use."""

import ast
import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, LoRAPlusDense, LoRAPlusEmbed, apply_lora_plus, init_lora, merge
from loraplus_jax.interpreter.dataflow import mark_weight, trace_dataflow
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama

from ..linen.models import KEY, Halved
from ..messages import mentions

X = jax.random.normal(jax.random.key(1), (3, 6))
IDS = jnp.array([[1, 2, 3]])


def config(target="all-linear", **fields):
    return LoRAPlusConfig(**{"target_modules": target, "rank": 2, "alpha": 3.0} | fields)


def drawn(shapes, seed=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)


# models that read a weight past its layer: the model, its input, target_modules, the weight's path


class Tied(nn.Module):
    def setup(self):
        self.emb = nn.Embed(7, 6)
        self.d = nn.Dense(6)

    def __call__(self, ids):
        return self.d(self.emb(ids)) @ self.emb.embedding.T


class ByVariables(nn.Module):
    def setup(self):
        self.d = nn.Dense(6)

    def __call__(self, x):
        return self.d(x) @ self.d.variables["params"]["kernel"].T


class ByGetVariable(nn.Module):
    @nn.compact
    def __call__(self, x):
        d = nn.Dense(6)
        return d(x) @ d.get_variable("params", "kernel").T


class OwnLogits(nn.Embed):
    def logits(self, x):
        return x @ self.embedding.T


class Tongue(nn.Module):
    def setup(self):
        self.e = OwnLogits(7, 6)

    def __call__(self, ids):
        return self.e.logits(self.e(ids))


class Penalised(nn.Module):
    """The penalty goes out beside the output, or is sown."""

    sown: bool

    @nn.compact
    def __call__(self, x):
        d = nn.Dense(6, name="d")
        y, penalty = d(x), jnp.sum(d.variables["params"]["kernel"] ** 2)
        if not self.sown:
            return {"y": y, "penalty": penalty}
        self.sow("losses", "penalty", penalty)
        return y


class Reading(nn.Module):
    """A layer of a loop that reads its weight."""

    @nn.compact
    def __call__(self, x, _=None):
        d = nn.Dense(6, name="d")
        return jnp.tanh(d(x)) @ d.variables["params"]["kernel"].T, None


class Scanned(nn.Module):
    body: type[nn.Module]
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            nn.remat(self.body), variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3
        )
        return body(name="layers")(x, None)[0]


class PastAdapted(nn.Module):
    """What was read reaches the output through another adapted layer only."""

    @nn.compact
    def __call__(self, x):
        first = nn.Dense(6, name="first")
        return nn.Dense(3, name="last")(first(x) @ first.variables["params"]["kernel"])


class Chosen(nn.Module):
    """The weight only decides."""

    @nn.compact
    def __call__(self, x):
        d = nn.Dense(6, name="d")
        y = d(x)
        return jax.lax.cond(jnp.sum(d.variables["params"]["kernel"]) > 0, lambda y: y, lambda y: -y, y)


READ = {
    "embedding": (Tied(), IDS, ["emb"], "emb/embedding"),
    "variables": (ByVariables(), X, "all-linear", "d/kernel"),
    "get_variable": (ByGetVariable(), X, "all-linear", "Dense_0/kernel"),
    "a method of a subclass's own": (Tongue(), IDS, ["e"], "e/embedding"),
    "a penalty": (Penalised(sown=False), X, ["d"], "d/kernel"),
    "a sown penalty": (Penalised(sown=True), X, ["d"], "d/kernel"),
    "scanned": (Scanned(Reading), X, ["d"], "layers/d/kernel"),
    "scanned over axis 1": (Scanned(Reading, 1), X, ["d"], "layers/d/kernel"),
    "through an adapted layer": (PastAdapted(), X, "all-linear", "first/kernel"),
    "a choice": (Chosen(), X, ["d"], "d/kernel"),
}


def refusal(net, x, target):
    with pytest.raises(ValueError, match="outside") as error:
        init_lora(apply_lora_plus(net, config(target)), KEY, x)
    return str(error.value)


@pytest.mark.parametrize("name", READ)
def test_a_weight_used_past_its_layer_is_rejected(name):
    net, x, target, leaf = READ[name]
    assert f"params/{leaf} " in refusal(net, x, target)


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_the_rule_in_the_message_works(name):
    net, x, target, _ = READ[name]
    rule = ast.literal_eval(re.findall(r"target_parameters.*?(\{.*\})", refusal(net, x, target))[0])
    model = apply_lora_plus(net, config((), target_parameters=rule))
    lora, specs = init_lora(model, KEY, x)
    base, lora = net.init(KEY, x), drawn(lora)
    found, merged = model.apply({**base, "lora": lora}, x), net.apply(merge(base, lora, specs), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, merged)


def test_a_weight_that_the_model_changes_before_its_layer_is_rejected():
    with pytest.raises(ValueError, match=mentions("params/first/kernel", "before")):
        init_lora(apply_lora_plus(Halved(), config()), KEY, X)


class OwnTied(nn.Module):
    attend: bool

    @nn.compact
    def __call__(self, ids):
        emb = LoRAPlusEmbed(7, 6, rank=2, name="emb")
        x = LoRAPlusDense(6, rank=2, name="d")(emb(ids))
        return emb.attend(x) if self.attend else x @ emb.embedding.T


def test_our_own_layers_are_checked_too():
    assert sorted(init_lora(OwnTied(attend=True), KEY, IDS)[1]) == ["d", "emb"]
    with pytest.raises(ValueError, match=mentions("'emb'", "params/emb/embedding")):
        init_lora(OwnTied(attend=False), KEY, IDS)


# models that only look like it


class Attending(nn.Module):
    def setup(self):
        self.emb = nn.Embed(7, 6)
        self.d = nn.Dense(6)

    def __call__(self, ids):
        return self.emb.attend(self.d(self.d(self.emb(ids))))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Dense(6, name="d")(x)) + x, None


class Mapped(nn.Module):
    shared: bool

    @nn.compact
    def __call__(self, x):
        axes, split = {"params": None if self.shared else 1}, {"params": not self.shared}
        return nn.vmap(nn.Dense, variable_axes=axes, split_rngs=split, in_axes=0)(4)(x)


class Looping(nn.Module):
    """The layer runs in a while loop, and in both branches of a conditional."""

    @nn.compact
    def __call__(self, x):
        d = nn.Dense(6, name="d")
        if self.is_initializing():
            d(x)
        x = nn.cond(x[0, 0] > 0, lambda m, x: d(x), lambda m, x: -d(x), self, x)
        body = lambda m, c: (c[0] + 1, jnp.tanh(d(c[1])))  # noqa: E731
        more = lambda m, c: c[0] < 3  # noqa: E731
        return nn.while_loop(more, body, self, (0, x), carry_variables=[], broadcast_variables="params")[1]


class Inward(nn.Module):
    """The model's output is a gradient."""

    @nn.compact
    def __call__(self, x):
        y, back = nn.vjp(lambda m, x: m(x), nn.Dense(6, name="d"), x)
        return back(jnp.ones_like(y))[1]


@jax.custom_vjp
def squared(x, scale):
    return x * x * scale


squared.defvjp(lambda x, scale: (squared(x, scale), x), lambda x, g: (2 * x * g, None))


class Custom(nn.Module):
    """A rule of the user's own for the gradient, around the layer and after it; and a random number."""

    @nn.compact
    def __call__(self, x):
        d = nn.Dense(6, name="d")
        forward = lambda m, x: nn.vjp(lambda m, x: m(x), m, x)  # noqa: E731
        y = nn.custom_vjp(lambda m, x: m(x), forward_fn=forward, backward_fn=lambda back, g: back(g))(d, x)
        key = self.make_rng("params")
        return squared(y, 1.0), jax.random.normal(key), key


class Keeping(nn.Module):
    """A layer's output goes to a collection only; shapes and dtypes of the weight are looked at."""

    @nn.compact
    def __call__(self, x):
        d, e = nn.Dense(6, name="d"), nn.Dense(4, name="e")
        self.variable("stats", "last", jnp.zeros, (3, 4)).value = e(x)
        kernel = d.variables["params"]["kernel"] if d.variables else jnp.zeros((6, 6))
        self.sow("intermediates", "kernel", kernel)
        y = d(x)
        return y.astype(kernel.dtype) * kernel.shape[0] + jnp.zeros_like(kernel)[0, 0]


@dataclasses.dataclass
class Answer:
    y: jax.Array


class Plain(nn.Module):
    """Gives back what jax knows nothing of."""

    @nn.compact
    def __call__(self, x, training):
        return Answer(nn.Dense(6, name="d")(x)), "text", None, training


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(nn.Dense)(4, name="d")(nn.BatchNorm(use_running_average=False)(x))


SEQUENCE = jnp.ones((2, 5, 6))
FINE = {
    "attend": (Attending(), (IDS,), ["emb", "d"]),
    "scan of remat": (Scanned(Block), (X,), "all-linear"),
    "scan over the last axis": (Scanned(Block, -1), (X,), "all-linear"),
    "vmap": (Mapped(shared=False), (X,), "all-linear"),
    "vmap, shared": (Mapped(shared=True), (X,), "all-linear"),
    "loops": (Looping(), (X,), "all-linear"),
    "vjp inside": (Inward(), (X,), "all-linear"),
    "custom_vjp": (Custom(), (X,), "all-linear"),
    "collections": (Keeping(), (X,), "all-linear"),
    "no arrays": (Plain(), (X, True), "all-linear"),
    "nn.jit": (Jitted(), (X,), "all-linear"),
    "a cache": (nn.MultiHeadDotProductAttention(2, decode=True), (SEQUENCE,), "all-linear"),
    "recurrent": (nn.RNN(nn.LSTMCell(4)), (SEQUENCE,), "all-linear"),
    "partitioned": (
        nn.Sequential(
            [nn.Dense(5, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "x"))), nn.Dense(3)]
        ),
        (X,),
        "all-linear",
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_every_other_use_is_accepted(name):
    net, args, target = FINE[name]
    _, specs = init_lora(apply_lora_plus(net, config(target)), KEY, *args)
    assert specs


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(fields, marks=pytest.mark.slow)
            for fields in ({"unroll": True}, {"remat": "dots"}, {"attention": "splash"})
        ),
    ],
)
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
