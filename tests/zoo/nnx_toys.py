"""Small NNX models: layers of Flax and of others, alone, stacked and under jit, and bare parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .properties import Toy, modules, parameters

X = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
WIDE = X.astype(np.float64)


class One(nnx.Module):
    """A model of one layer, called `layer`."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class Bare(nnx.Module):
    """Two parameters of one module; its method calls another one of its own."""

    def __init__(self, rngs):
        self.wq, self.wo = (nnx.Param(jax.random.normal(rngs.params(), (8, 8))) for _ in range(2))

    def inner(self, x):
        return x @ self.wq[...]

    def __call__(self, x):
        return jnp.tanh(self.inner(x)) @ self.wo[...].T


class Used(nnx.Module):
    """A parameter and what a function makes of the input and of it."""

    def __init__(self, rngs, use):
        self.w, self.use = nnx.Param(jax.random.normal(rngs.params(), (8, 8)) / 3), use

    def __call__(self, x):
        return self.use(x, self.w[...])


class Letters(nnx.Module):
    """A layer of someone else's, whose equation stands in a field."""

    def __init__(self, rngs):
        self.einsum_str = "BTD,DNH->BTNH"
        self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 2, 3)))

    @property
    def shape(self):
        return self.w.shape

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Jitted(nnx.Linear):
    @nnx.jit
    def __call__(self, x):
        return super().__call__(x)


class JaxJitted(nnx.Linear):
    @jax.jit
    def __call__(self, x):
        return super().__call__(x)


class PartlyJitted(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 8)))

    @functools.partial(nnx.jit, static_argnums=2)
    def __call__(self, x, twice=True):
        return x @ self.w[...] * (2 if twice else 1)


@jax.custom_vjp
def no_gradient(x, w):
    return x @ w


no_gradient.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: jax.tree.map(jnp.zeros_like, kept))


def inside(x, w):
    """A weight in a checkpoint, a loop and a branch."""
    x = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w)
    x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, 2)[0]
    return jax.lax.cond(jnp.sum(x) > 0, lambda x, w: x @ w, lambda x, w: x @ w + 1, x, w)


def integers(x, w):
    return jax.lax.dot_general(x, w, (((2,), (0,)), ((), ())), preferred_element_type=w.dtype)


@dataclasses.dataclass
class Settings:
    """Not hashable."""

    factor: float = 2.0


class Configured(nnx.Module):
    def __init__(self, rngs):
        self.settings = Settings()
        self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 8)))

    def __call__(self, x, options):
        return x @ self.w[...] * self.settings.factor * options["scale"]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Blocks(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class InDict(nnx.Module):
    def __init__(self, rngs):
        self.parts = nnx.data({"up": nnx.Linear(8, 8, rngs=rngs)})

    def __call__(self, x):
        return self.parts["up"](x)


class Twice(nnx.Module):
    """One module in two places."""

    def __init__(self, rngs):
        self.first = self.second = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(self.first(x))


class Stack(nnx.Module):
    """Three modules made by nnx.vmap and run by nnx.scan with nnx.remat inside."""

    def __init__(self, rngs, axis=0, body=Block):
        self.axis = axis
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(body, in_axes=(0,), out_axes=axis))(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, self.axis), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


class DenseGeneral(nnx.Module):
    """A product over some axes with a weight that is cast to the dtype of the input, as maxtext has it."""

    def __init__(self, inputs, outputs, axis, rngs):
        self.in_features_shape, self.out_features_shape, self.axis = inputs, outputs, axis
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (*inputs, *outputs)) / 4)

    def __call__(self, x):
        axes = tuple(n % x.ndim for n in self.axis)
        kernel = jnp.asarray(self.kernel[...], x.dtype)
        return jax.lax.dot_general(x, kernel, ((axes, tuple(range(len(axes)))), ((), ())))


class Heads(nnx.Module):
    def __init__(self, rngs):
        self.query = DenseGeneral((8,), (2, 3), (-1,), rngs)
        self.out = DenseGeneral((2, 3), (8,), (-2, -1), rngs)

    def __call__(self, x):
        return x + self.out(jnp.tanh(self.query(x)))


class Scanned(nnx.Module):
    """Two blocks along the second axis of their weights, as the metadata says in maxtext, run by `jax.lax.scan`."""

    def __init__(self, rngs, said=True):
        self.layers = nnx.split_rngs(splits=2)(nnx.vmap(Heads, in_axes=(0,), out_axes=1))(rngs)
        if said:
            for _, variable in nnx.iter_graph(self.layers):
                if isinstance(variable, nnx.Param):
                    variable.set_metadata(param_scan_axis=1)

    def __call__(self, x):
        graph, params = nnx.split(self.layers)
        params = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), params)
        return jax.lax.scan(lambda x, params: (nnx.merge(graph, params)(x), None), x, params)[0]


def one(make, paths="layer", rules=None, **fields):
    return Toy(lambda rngs: One(make(rngs)), paths, rules or modules("layer"), **{"args": (WIDE,)} | fields)


def weight(use, x=WIDE, **fields):
    return one(lambda rngs: Used(rngs, use), "layer/w", parameters(layer__w="io"), args=(x,), **fields)


def toy(make, paths, rules, *args, **fields):
    return Toy(make, paths, rules, args or (WIDE,), **fields)


HEADS, UP_DOWN = modules("query", "out"), modules("up", "down")
LAYER, ALONG_1 = parameters(layer__w="io"), "layers/out@1 layers/query@1"
ATTENTION = one(lambda r: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r), "layer/out layer/query", HEADS)
LINEAR = one(lambda r: nnx.Linear(8, 6, rngs=r))
PARAMETERS = one(Bare, "layer/wo layer/wq", {"target_parameters": {"layer/w[qo]": "io"}})


def bare_stack(axis):
    return lambda rngs: Stack(rngs, axis, Bare)


MODELS = {
    "parameters": PARAMETERS,
    "einsum_str of its own": one(Letters),
    "the same by letters": toy(
        Heads, "out/kernel query/kernel", parameters(query__kernel="ioo", out__kernel="iio")
    ),
    "under nnx.jit": one(lambda r: Jitted(8, 6, rngs=r)),
    "under jax.jit": one(lambda r: JaxJitted(8, 6, rngs=r)),
    "under a partial jit": one(PartlyJitted, "layer/w", LAYER),
    "a custom gradient": weight(no_gradient, whole=True),
    "checkpoint, loop and branch": weight(inside),
    "integers": weight(integers, np.arange(80, dtype=np.int8).reshape(2, 5, 8)),
    "nothing hashable": one(Configured, "layer/w", LAYER, args=(WIDE, {"scale": 0.5})),
    "a list": toy(Blocks, "layers/1/up", {"target_modules": "layers/1/up"}),
    "a dict": toy(InDict, "parts/up", modules("up")),
    "shared": toy(Twice, "first", modules("first")),
    "stack along axis 1": toy(lambda r: Stack(r, 1), "blocks/down@1 blocks/up@1", UP_DOWN),
    "a stack of parameters, by letters": toy(
        bare_stack(0), "blocks/wo blocks/wq", {"target_parameters": {"blocks/w[qo]": "bio"}}, scales=False
    ),
    "a stack of parameters along axis 1": toy(
        bare_stack(1),
        "blocks/wo@1 blocks/wq@1",
        {"target_parameters": {"blocks/w[qo]": "io"}},
        options={"stacked": {"wq": (1,), "wo": (1,)}},
    ),
    # As many layers as heads and as the rank: no shape tells the axes apart.
    "along the second axis by metadata": toy(Scanned, ALONG_1, HEADS),
    "along the second axis as told": toy(
        lambda r: Scanned(r, said=False),
        ALONG_1,
        HEADS,
        options={"stacked": {"query": (1,), "out": (1,)}},
    ),
}
