"""What the tests of Linen models share: small models, random variables, and comparisons."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, merge

KEY = jax.random.key(0, impl="rbg")


X = jax.random.normal(jax.random.key(1), (2, 4))


class Raw(nn.Module):
    """Weights of a user's own: output first, with a batch axis, and one in a module without a method of Flax's."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (6, 4))
        x = jnp.tanh(x @ w.T)
        x = nn.Dense(4, name="plain")(x)
        experts = self.param("experts", nn.initializers.normal(), (3, 4, 5))
        return jnp.einsum("bi,eio->beo", x, experts).sum(1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(4, name="down")(jnp.tanh(nn.Dense(6, name="up")(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2, name="head")(scanned(name="layers")(x, None)[0])


class Listed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in range(3):
            x, _ = Block(name=f"layers_{n}")(x)
        return nn.Dense(2, name="head")(x)


def config(*targets, **fields):
    return LoRAPlusConfig(**{"target_modules": targets, "rank": 2, "alpha": 3.0} | fields)


def drawn(tree, seed=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def prepared(net, rules):
    """The model, random base and factors, and the table; factors that are zero by rule stay so."""
    model = apply_lora_plus(net, rules)
    lora, specs = init_lora(model, KEY, X)
    base = {"params": drawn(jax.eval_shape(net.init, KEY, X)["params"])}
    return model, base, lora, specs


CONFIG = LoRAPlusConfig(target_modules=["up"], rank=2, alpha=3.0)


def variables_of(model):
    """Random variables of a model, made without compiling its `init`."""
    return drawn(jax.eval_shape(model.init, KEY, X))


def adapters_of(model):
    """Random adapters of a model, and the specs."""
    specs = {}

    def trace(key):
        lora, found = init_lora(model, key, X)
        specs.update(found)
        return lora

    return drawn(jax.eval_shape(trace, KEY)), specs


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


class Setup(nn.Module):
    def setup(self):
        self.up, self.down = nn.Dense(6), nn.Dense(4)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return nn.relu(self.up(x))

    def decode(self, h):
        return self.down(h)


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


class Reversed(nn.Module):
    """One kernel with two equations."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.Einsum((4, 4), use_bias=False, name="both")
        return kernel(x, "bi,io->bo") + kernel(x, "bi,oi->bo")


class Halved(nn.Module):
    """Stores half of the weight that its layer has."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.map_variables(
            nn.Dense,
            "params",
            lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree),
            lambda tree: jax.tree.map(lambda leaf: leaf / 2, tree),
            init=self.is_initializing(),
            mutable=True,
        )
        return nn.Dense(3, name="last")(mapped(5, name="first")(x))


class Tied(nn.Module):
    """Head and embedding share a matrix; parameters are named lazily."""

    def setup(self):
        self.words = nn.Embed(7, 4)
        self.layers = [nn.Dense(4) for _ in range(2)]
        self.norm = nn.BatchNorm(use_running_average=False)

    def __call__(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.words.attend(self.norm(x))


def assert_merged(net, rules, *, close=1e-5):
    """With random factors, a model's outputs are those of the merged weights, and not the base's."""
    model, base, lora, specs = prepared(net, rules)
    lora = drawn(lora)
    found = model.apply({**base, "lora": lora}, X)
    np.testing.assert_allclose(found, net.apply(merge(base, lora, specs), X), rtol=1e-5, atol=close)
    assert abs(found - net.apply(base, X)).max() > 0.01
    return model, base, lora, specs
