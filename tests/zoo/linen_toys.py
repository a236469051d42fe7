"""Small Linen models: layers in every place and lifting, and weights used in every way."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from loraplus_jax import LoRAPlusDense, LoRAPlusEmbed, apply_lora_plus

from .properties import Toy, X, modules, parameters

IDS = np.arange(6, dtype=np.int32).reshape(2, 3)  # JAX caches what a NumPy array becomes, with x64 or without
STACKED = {"split_rngs": {"params": True}}


class Setup(nn.Module):
    def setup(self):
        self.up, self.down = nn.Dense(6), nn.Dense(4)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return nn.relu(self.up(x))

    def decode(self, h):
        return self.down(h)


class Raw(nn.Module):
    """Weights of a user's own: output first, with a batch axis, and one in a module without a method of Flax's."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (6, 4))
        x = nn.Dense(4, name="plain")(jnp.tanh(x @ w.T))
        experts = self.param("experts", nn.initializers.normal(), (3, 4, 5))
        return jnp.einsum("bi,eio->beo", x, experts).sum(1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(4, name="down")(jnp.tanh(nn.Dense(6, name="up")(x))), None


class Scanned(nn.Module):
    axis: int = 0
    remat: bool = False
    split: bool = False
    body: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        rngs = {"params": True} | ({"dropout": True} if self.split else {})
        block = nn.remat(self.body) if self.remat else self.body
        layers = nn.scan(block, variable_axes={"params": self.axis}, split_rngs=rngs, length=3)
        return layers(name="layers")(x, None)[0]


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        layers = nn.scan(Block, variable_axes={"params": 0}, **STACKED, length=3)
        return nn.Dense(2, name="head")(layers(name="layers")(x, None)[0])


class Listed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in range(3):
            x, _ = Block(name=f"layers_{n}")(x)
        return nn.Dense(2, name="head")(x)


class Vmapped(nn.Module):
    """Members that share a layer."""

    @nn.compact
    def __call__(self, x):
        fields = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}
        return nn.vmap(nn.Dense, **fields, in_axes=None, axis_size=3)(5, name="up")(x)


class ScannedTwice(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        inner = nn.scan(Block, variable_axes={"params": 0}, **STACKED, length=2)
        return inner(name="inner")(x, None)


class Nest(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.scan(ScannedTwice, variable_axes={"params": 1}, **STACKED, length=3)(name="outer")(x, None)[
            0
        ]


class OwnDense(nn.Dense):
    """A subclass of a user's own that calls super."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Keyword(nn.Module):
    """Passes its input by name."""

    @nn.compact
    def __call__(self, x):
        return OwnDense(4, use_bias=False, name="up")(inputs=x)


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


class Head(nn.Module):
    """Uses a part of a wrapped model before the whole of it."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, x, whole=True):
        h = self.backbone.encode(x)
        y = self.backbone(x) if whole else self.backbone.decode(h)
        return nn.Dense(3, name="head")(jnp.concatenate([h, y], axis=-1))


class Both(nn.Module):
    """A layer with an adapter of its own."""

    own: bool

    @nn.compact
    def __call__(self, x):
        own = LoRAPlusDense(5, rank=2, alpha=3.0, name="own") if self.own else nn.Dense(5, name="own")
        return nn.Dense(4, name="up")(own(x))


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
    """Head and embedding share a matrix; parameters are named lazily; statistics move."""

    def setup(self):
        self.words = nn.Embed(7, 4)
        self.layers = [nn.Dense(4) for _ in range(2)]
        self.norm = nn.BatchNorm(use_running_average=False)

    def __call__(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.words.attend(self.norm(x))


class OwnApply(nn.Module):
    """A submodule used through its own `.apply`: with variables of this module, and with constants."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(4, parent=None)
        params = self.param("inner", lambda key: inner.init(key, x)["params"])
        x = inner.apply({"params": params}, x)
        constant = nn.Dense(4, parent=None).apply({"params": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}}, x)
        return nn.Dense(4, name="last")(constant)


class Passed(nn.Module):
    """A submodule given from outside, and called twice."""

    layer: nn.Module

    def __call__(self, x):
        return self.layer(self.layer(x))


class Passing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Passed(nn.Dense(4, name="given"), name="user")(x)


class SharedScope(nn.Module):
    """A wrapper of the user's own whose inner module's parameters stand at its own level."""

    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return 2 * self.inner(x)


class Unbound(nn.Module):
    """A submodule taken apart and run by its own `.apply` with its own variables, adapters among them."""

    @nn.compact
    def __call__(self, x):
        up = nn.Dense(4, name="up")
        x = up(x)
        module, variables = up.unbind()
        return module.apply(variables, x)


class OwnInit(nn.Module):
    """Initializes a module inside, only to count its weights."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(4, parent=None)
        size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(inner.init, jax.random.key(0), x)))
        return nn.Dense(size, name="made")(x)


class Whitened(nn.Module):
    """A layer in a norm of its weights; WeightNorm has a parameter whose name holds a slash."""

    norm: type[nn.Module] = nn.WeightNorm

    @nn.compact
    def __call__(self, x):
        stats = {} if self.norm is nn.WeightNorm else {"update_stats": False}
        return nn.Dense(3, name="down")(self.norm(nn.Dense(4, name="up"), name="norm")(x, **stats))


class Inside(nn.Module):
    """The normed layer's parameters stand below the norm."""

    norm: type[nn.Module] = nn.WeightNorm

    def setup(self):
        self.normed = self.norm(nn.Dense(4))

    def __call__(self, x):
        return self.normed(x, **({} if self.norm is nn.WeightNorm else {"update_stats": False}))


class Standardized(nn.Dense):
    """A layer that changes its weight when it reads it, as StdConv of google-research/vision_transformer does."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value - jnp.mean(value, 0, keepdims=True) if name == "kernel" else value


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


class Looping(nn.Module):
    """The layer runs in a while loop, and in both branches of a conditional."""

    @nn.compact
    def __call__(self, x):
        d = nn.Dense(4, name="d")
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
        y, back = nn.vjp(lambda m, x: jnp.sin(m(x)), nn.Dense(6, name="d"), x)
        return back(jnp.ones_like(y))[1]


@jax.custom_vjp
def squared(x, scale):
    return x * x * scale


squared.defvjp(
    lambda x, scale: (squared(x, scale), (x, scale)), lambda kept, g: (2 * kept[0] * kept[1] * g, None)
)


class Custom(nn.Module):
    """A rule of the user's own for the gradient, around the layer and after it; and a random number."""

    @nn.compact
    def __call__(self, x):
        d = nn.Dense(6, name="d")
        forward = lambda m, x: nn.vjp(lambda m, x: m(x), m, x)  # noqa: E731
        y = nn.custom_vjp(lambda m, x: m(x), forward_fn=forward, backward_fn=lambda back, g: back(g))(d, x)
        return squared(y, 1.0), jax.random.normal(self.make_rng("noise"))


class Keeping(nn.Module):
    """A layer's output goes to a collection only; shapes and dtypes of the weight are looked at."""

    @nn.compact
    def __call__(self, x):
        d, e = nn.Dense(6, name="d"), nn.Dense(4, name="e")
        self.variable("stats", "last", jnp.zeros, (2, 4)).value = e(x)
        kernel = d.variables["params"]["kernel"] if d.variables else jnp.zeros((4, 6))
        self.sow("intermediates", "kernel", jnp.zeros_like(kernel))
        return d(x).astype(kernel.dtype) * kernel.shape[0] + jnp.zeros_like(kernel)[0, 0]


class Busy(nn.Module):
    """A parameter beside everything else that a module may have."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(x)
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(4, name="layer")(x))
        calls = self.variable("calls", "n", lambda: jnp.float32(0))
        calls.value += 1
        x = jnp.tanh(x @ self.param("w", nn.initializers.normal(), (4, 4), jnp.float32))
        self.sow("intermediates", "w", x)
        return {"y": x + jax.random.normal(self.make_rng("noise"), x.shape), "name": "busy", "n": (2, None)}


RNGS = {"dropout": jax.random.key(5), "noise": jax.random.key(6)}
STATS = {"mutable": ["batch_stats"]}
UP = modules("up")
LAYERS = "layer_0/up layer_1/up"


def nested(make, rules, paths):
    wrap = lambda config: make(lambda inner: apply_lora_plus(inner, config))  # noqa: E731
    return Toy(make(lambda inner: inner), paths, rules, wrap=wrap)


def partitioned():
    init = nn.with_partitioning(nn.initializers.ones, (None, "x"))
    return nn.Sequential([nn.Dense(5, kernel_init=init), nn.Dense(3)])


MODELS = {
    "setup": Toy(Setup(), "up", UP),
    "scan 1": Toy(Scanned(1), "layers/up@1", UP),
    "scan -1": Toy(Scanned(-1), "layers/up@-1", UP),
    "scan scan": Toy(Nest(), "outer/inner/up@0,1", UP),
    "vmap, shared": Toy(Vmapped(), "up", UP),
    "subclass, input by name": Toy(Keyword(), "up", UP),
    "inside, setup": nested(InSetup, UP, "inner/up"),
    "inside, compact": nested(InCompact, UP, "inner/up"),
    "a method before the others": nested(
        lambda wrap: Head(wrap(Setup())), modules("up", "down"), "backbone/down backbone/up"
    ),
    "beside a layer of ours": Toy(
        Both(own=False), "own up", UP, wrap=lambda config: apply_lora_plus(Both(own=True), config)
    ),
    "tied": Toy(
        Tied(),
        "layers_0 layers_1 words",
        modules("words", "layers_0", "layers_1"),
        (np.array([[1, 2, 3]], np.int32),),
        options=STATS,
    ),
    "one layer": Toy(nn.Dense(5), ".", {"target_modules": ".*"}),
    "own apply, constants": Toy(OwnApply(), "last", modules("last")),
    "own apply, our parameters": Toy(OwnApply(), "inner/kernel", parameters(inner__kernel="io")),
    "passed inside": Toy(Passing(), "given", modules("given")),
    "shared scope": Toy(SharedScope(nn.Dense(4, name="fc")), ".", {"target_modules": ".*"}),
    "taken apart": Toy(Unbound(), "up", UP),
    "initialized inside": Toy(OwnInit(), "made", {"target_modules": ".*"}),
    "two equations": Toy(Reversed(), "both/kernel", parameters(both__kernel="io")),
    "names that hold a slash": Toy(Whitened(), "down", modules("down")),
    **{
        f"{norm.__name__}, {net.__name__}": Toy(
            net(norm), path, parameters(**{path: "io"}), whole=True, scales=False, close=1e-7, options=STATS
        )
        for norm, net, path in (
            (nn.SpectralNorm, Whitened, "up/kernel"),
            (nn.WeightNorm, Inside, "normed/layer_instance/kernel"),
        )
    },
    "changed by its layer": Toy(Standardized(4), "kernel", parameters(kernel="io"), whole=True),
    "mapped": Toy(
        Halved(), "first/kernel last", modules("last") | parameters(first__kernel="io"), whole=True
    ),
    "parameters": Toy(Raw(), "experts plain w", modules("plain") | parameters(w="oi", experts="eio")),
    "jit": Toy(Jitted(), "up", UP | {"alpha": 40.0}),
    "these with patterns": Toy(
        JittedBlocks(),
        LAYERS,
        UP | {"rank_pattern": {"layer_0/up": 3}, "alpha_pattern": {"layer_1/up": 50.0}},
    ),
    "loops": Toy(Looping(), "d", modules("d"), gradients=False),
    "vjp inside": Toy(Inward(), "d", modules("d")),
    "custom_vjp": Toy(Custom(), "d/kernel", parameters(d__kernel="io"), options={"rngs": RNGS}, whole=True),
    "collections": Toy(Keeping(), "d e", modules("d", "e"), options={"mutable": ["stats", "intermediates"]}),
    "a cache": Toy(
        nn.MultiHeadDotProductAttention(2, decode=True),
        "key out query value",
        {"target_modules": "all-linear"},
        (0.1 * np.arange(8.0).reshape(2, 1, 4),),
        options={"mutable": ["cache"]},
    ),
    "recurrent": Toy(
        nn.RNN(nn.SimpleCell(4, param_dtype=float)),
        "cell/h cell/i",
        {"target_modules": "all-linear"},
        (0.1 * np.arange(24.0).reshape(2, 3, 4),),
    ),
    "partitioned": Toy(partitioned(), "layers_0 layers_1", {"target_modules": "all-linear"}),
    "state, keys and results": Toy(
        Busy(),
        "w",
        parameters(w="io"),
        options={"rngs": RNGS, "mutable": ["batch_stats", "calls", "intermediates"]},
    ),
}


class Weight(nn.Module):
    """A parameter used by a function of the input and the parameter."""

    shape: tuple[int, ...]
    use: Callable

    @nn.compact
    def __call__(self, x, *rest):
        y = self.use(x, self.param("w", nn.initializers.normal(), self.shape, jnp.float32))
        return (y, None) if rest else y


def lifted(transform, shape=(4, 4), use=jnp.matmul, **options):
    """A model that runs the parameter's module by a transform of Flax's, in a loop if that is `nn.scan`."""

    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            part = transform(Weight, **options)(shape, lambda x, w: jnp.tanh(use(x, w)), name="part")
            return part(x, None)[0] if "length" in options else part(x)

    return Lifted()


class Reused(nn.Module):
    """A parameter that a loop reads at every step."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (4, 4), jnp.float32)
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0]


def used(shape, use, axes, x=X, **fields):
    use = use if callable(use) else lambda x, w, equation=use: jnp.einsum(equation, x, w)
    return Toy(Weight(shape, use), "w", parameters(w=axes), (x,), **fields)


def part(net, axes, x=X, **fields):
    return Toy(net, "part/w", parameters(part__w=axes), (x,), **fields)


def steps(axis=0, **options):
    return {"variable_axes": {"params": axis}, "length": 3} | STACKED | options


def rematted(part, **options):
    return nn.scan(nn.remat(part), **options)


def stopped(w):
    return jax.lax.stop_gradient(w)


ROWS = np.ones((3, 2, 4))
WEIGHTS = {
    "weight first": used((5, 4), lambda x, w: w @ x.T, "oi"),
    "other way round": used((5, 4), lambda x, w: x @ w.T, "io"),
    "from heads": used((2, 3, 5), "bnh,nho->bo", "iio", np.ones((3, 2, 3))),
    "experts that are summed": used((3, 4, 5), "ebi,eio->bo", "eio", ROWS),
    "rows": used((7, 4), lambda x, w: jnp.take(w, x, axis=0), "io", IDS),
    "rows by index": used((7, 4), lambda x, w: w[x], "io", IDS),
    "columns": used((4, 7), lambda x, w: w[:, x], "io", IDS, whole=True),
    "half": used((4, 5), lambda x, w: x @ w.astype(jnp.float16).astype(x.dtype), "io", whole=True),
    "kernel of a layer": Toy(nn.Dense(5), "kernel", parameters(kernel="io")),
    "convolution": Toy(nn.Conv(6, (3,)), "kernel", parameters(kernel="iio"), (np.ones((2, 5, 4)),)),
    "vmap": part(lifted(nn.vmap, variable_axes={"params": 0}, **STACKED), "eio", ROWS),
    "scan of the last axis": part(lifted(nn.scan, **steps(-1)), "ioe"),
    "scan backwards": part(lifted(nn.scan, **steps(1, reverse=True, unroll=2)), "ieo"),
    "scan of remat": part(lifted(rematted, **steps()), "eio"),
    "scan over the inputs": part(lifted(nn.scan, **steps()), "ioo", whole=True),
    "scan that only reads": Toy(Reused(), "w", parameters(w="io")),
    "stacked lookup": part(lifted(nn.scan, (7, 4), lambda x, w: x + w[jnp.arange(2)], **steps()), "eio"),
    "part of the inputs": used((2, 4, 5), "bi,jio->bjo", "iio", whole=True),
    "reshaped": used((2, 2, 5), lambda x, w: x @ w.reshape(4, 5), "iio"),
    "with itself": used((4, 5), lambda x, w: x @ (w @ w.T), "io", whole=True),
    "stopped": used((4, 5), lambda x, w: x @ (w + 2 * stopped(w)), "io", whole=True),
    "whole numbers": used((4, 5), lambda x, w: x @ (9 * w).astype(int) + x @ w, "io", whole=True),
    "branch": used((4, 4), lambda x, w: jax.lax.cond(x.sum() > -9, lambda: x @ w, lambda: x), "io"),
    "result": used((4, 5), lambda x, w: (x @ w, w), "io", whole=True),
}


# Models that read a weight past its layer, the layer that must not be adapted therefore, and the weight.


class ByVariables(nn.Module):
    def setup(self):
        self.d = nn.Dense(4)

    def __call__(self, x):
        return self.d(x) @ self.d.variables["params"]["kernel"].T


class ByGetVariable(nn.Module):
    @nn.compact
    def __call__(self, x):
        d = nn.Dense(4, name="d")
        return d(x) @ d.get_variable("params", "kernel").T


class OwnLogits(nn.Embed):
    """A method of a subclass's own, and an embedding that is read as an attribute."""

    def __call__(self, ids):
        return super().__call__(ids) @ self.embedding.T


class OwnTied(nn.Module):
    attend: bool

    @nn.compact
    def __call__(self, ids):
        emb = LoRAPlusEmbed(7, 6, rank=2, name="emb")
        x = LoRAPlusDense(6, rank=2, name="d")(emb(ids))
        return emb.attend(x) if self.attend else x @ emb.embedding.T


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
        d = nn.Dense(4, name="d")
        return jnp.tanh(d(x)) @ d.variables["params"]["kernel"].T, None


class PastAdapted(nn.Module):
    """What was read reaches the output through another adapted layer only."""

    @nn.compact
    def __call__(self, x):
        d = nn.Dense(4, name="d")
        return nn.Dense(3, name="last")(d(x) @ d.variables["params"]["kernel"])


class Chosen(nn.Module):
    """The weight only decides."""

    @nn.compact
    def __call__(self, x):
        d = nn.Dense(6, name="d")
        y = d(x)
        return jax.lax.cond(jnp.sum(d.variables["params"]["kernel"]) > -99, lambda y: y, lambda y: -y, y)


READ = {
    "variables": (ByVariables(), X, "d/kernel"),
    "get_variable": (ByGetVariable(), X, "d/kernel"),
    "a method of a subclass's own": (nn.Sequential([OwnLogits(7, 6)]), IDS, "layers_0/embedding"),
    "a penalty": (Penalised(sown=False), X, "d/kernel"),
    "a sown penalty": (Penalised(sown=True), X, "d/kernel"),
    "scanned": (Scanned(body=Reading, remat=True), X, "layers/d/kernel"),
    "through an adapted layer": (PastAdapted(), X, "d/kernel"),
    "a choice": (Chosen(), X, "d/kernel"),
    "custom_vjp": (Custom(), X, "d/kernel"),
}
