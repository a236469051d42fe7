"""One behavioural suite over every layer that can be adapted, met in a model and as a layer of our own."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loraplus_jax import (
    LoRAPlusConfig,
    LoRAPlusConv,
    LoRAPlusDense,
    LoRAPlusDenseGeneral,
    LoRAPlusEinsum,
    LoRAPlusEmbed,
    LoRAPlusMultiHeadDotProductAttention,
    apply_lora_plus,
    label_params,
    merge,
)
from loraplus_jax import nnx as loraplus_nnx
from loraplus_jax.linen import quantize_base
from loraplus_jax.quantization.packed_array import is_packed

from ..marks import slow
from ..zoo.properties import (
    KEY,
    Toy,
    assert_as_merged,
    assert_trees,
    drawn,
    modules,
    of_linen,
    of_nnx,
    traced,
)

DEPTH = 3


@dataclasses.dataclass(frozen=True)
class Subject:
    """A layer under test.

    Attributes:
      make: the plain layer, of a name and dtypes.
      ours: the same with an adapter of its own, or None.
      shape: of the input; a layer under scan gives back what has this shape.
      weights: path below the layer to the weight's leaf, kind, axes and shape.
      nnx: the layer in NNX, of an `nnx.Rngs`; None where NNX has no such layer.
      attend: whether the layer looks indices up, and is used by its `attend` too.
    """

    make: Callable[..., nn.Module]
    ours: Callable[..., nn.Module] | None
    shape: tuple[int, ...]
    weights: dict[str, tuple[str, str, str, tuple[int, ...]]]
    nnx: Callable[[nnx.Rngs], nnx.Module] | None
    attend: bool = False


OURS = {
    nn.Dense: LoRAPlusDense,
    nn.DenseGeneral: LoRAPlusDenseGeneral,
    nn.Einsum: LoRAPlusEinsum,
    nn.Conv: LoRAPlusConv,
    nn.Embed: LoRAPlusEmbed,
    nn.MultiHeadDotProductAttention: LoRAPlusMultiHeadDotProductAttention,
}


def layer(cls, *args, **fields):
    """The plain layer and, if there is one, ours."""
    ours = partial(OURS[cls], *args, **fields) if cls in OURS else None
    return partial(cls, *args, **fields), ours


def twin(cls, *args, **fields):
    return lambda rngs: cls(*args, **fields, param_dtype=float, rngs=rngs)


def kernel(kind, axes, *shape):
    return {"": ("kernel", kind, axes, shape)}


HEADS = dict.fromkeys(("query", "key", "value"), ("kernel", "dense_general", "ioo", (6, 2, 3)))
MASK = np.tril(np.ones((3, 4, 4), np.float32))  # JAX caches what a float64 array becomes, with x64 or without
SUBJECTS = {
    "dense of a vector": Subject(
        *layer(nn.Dense, 5), (5,), kernel("dense", "io", 5, 5), twin(nnx.Linear, 5, 5)
    ),
    "general": Subject(
        *layer(nn.DenseGeneral, (4, 5), axis=(-2, -1)),
        (2, 4, 5),
        kernel("dense_general", "iioo", 4, 5, 4, 5),
        twin(nnx.LinearGeneral, (4, 5), (4, 5), axis=(-2, -1)),
    ),
    "general, outer axis": Subject(
        *layer(nn.DenseGeneral, 4, axis=1),
        (2, 4, 4),
        kernel("dense_general", "io", 4, 4),
        twin(nnx.LinearGeneral, 4, 4, axis=1),
    ),
    "general, batch": Subject(
        *layer(nn.DenseGeneral, 5, batch_dims=(0,)),
        (3, 2, 5),
        kernel("dense_general", "eio", 3, 5, 5),
        twin(nnx.LinearGeneral, 5, 5, batch_axis={0: 3}),
    ),
    "einsum": Subject(
        *layer(nn.Einsum, (6, 2, 3), "btd,dnh->btnh"),
        (2, 4, 6),
        kernel("einsum", "ioo", 6, 2, 3),
        twin(nnx.Einsum, "btd,dnh->btnh", (6, 2, 3), (2, 3)),
    ),
    "einsum, outputs first": Subject(
        *layer(nn.Einsum, (5, 4), "...d,kd->...k", use_bias=False),
        (2, 3, 4),
        kernel("einsum", "oi", 5, 4),
        twin(nnx.Einsum, "...d,kd->...k", (5, 4)),
    ),
    "einsum, batch last": Subject(
        *layer(nn.Einsum, (5, 5, 3), "bie,ioe->boe", use_bias=False),
        (2, 5, 3),
        kernel("einsum", "ioe", 5, 5, 3),
        twin(nnx.Einsum, "bie,ioe->boe", (5, 5, 3)),
    ),
    "conv, one dimension": Subject(
        *layer(nn.Conv, 4, (3,), padding="CAUSAL", kernel_dilation=2),
        (2, 7, 4),
        kernel("conv", "iio", 3, 4, 4),
        twin(nnx.Conv, 4, 4, (3,), padding="CAUSAL", kernel_dilation=2),
    ),
    "conv, strides and groups": Subject(
        *layer(nn.Conv, 6, (3, 2), strides=2, padding="VALID", feature_group_count=2),
        (2, 7, 6, 4),
        kernel("conv", "iiio", 3, 2, 2, 6),
        twin(nnx.Conv, 4, 6, (3, 2), strides=2, padding="VALID", feature_group_count=2),
    ),
    "conv, masked": Subject(
        *layer(nn.Conv, 4, (3,), mask=MASK),
        (2, 5, 4),
        kernel("conv", "iio", 3, 4, 4),
        twin(nnx.Conv, 4, 4, (3,), mask=MASK),
    ),
    "conv, circular": Subject(
        *layer(nn.Conv, 4, (3,), padding="CIRCULAR"),
        (5, 4),
        kernel("conv", "iio", 3, 4, 4),
        twin(nnx.Conv, 4, 4, (3,), padding="CIRCULAR"),
    ),
    "conv, local": Subject(*layer(nn.ConvLocal, 4, (3,)), (2, 5, 4), kernel("conv", "aio", 5, 12, 4), None),
    "conv, transposed": Subject(
        *layer(nn.ConvTranspose, 4, (3, 3), strides=(2, 2)),
        (2, 3, 3, 4),
        kernel("conv_transpose", "iiio", 3, 3, 4, 4),
        twin(nnx.ConvTranspose, 4, 4, (3, 3), strides=(2, 2)),
    ),
    "conv, transposed kernel": Subject(
        *layer(nn.ConvTranspose, 5, (3,), transpose_kernel=True),
        (2, 4, 3),
        kernel("conv_transpose", "ioi", 3, 5, 3),
        twin(nnx.ConvTranspose, 3, 5, (3,), transpose_kernel=True),
    ),
    "embed and attend": Subject(
        *layer(nn.Embed, 7, 5),
        (2, 3),
        {"": ("embedding", "embed", "io", (7, 5))},
        twin(nnx.Embed, 7, 5),
        attend=True,
    ),
    "attention": Subject(
        *layer(nn.MultiHeadDotProductAttention, 2),
        (2, 4, 6),
        HEADS | {"out": ("kernel", "dense_general", "iio", (2, 3, 6))},
        twin(nnx.MultiHeadAttention, 2, 6, decode=False),
    ),
}


class Body(nn.Module):
    """The layer as a user's model has it; under `nn.scan` the carry is what goes in."""

    subject: str
    ours: bool = False
    variant: str = "lora"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, _=None):
        subject = SUBJECTS[self.subject]
        fields = {"name": "layer", "dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.ours:
            assert subject.ours is not None
            fields |= {"rank": 2, "alpha": 3.0, "variant": self.variant}
            module = subject.ours(**fields)
        else:
            module = subject.make(**fields)
        y = module(x)
        y = module.attend(y) if subject.attend else y
        return x, y


class Whole(nn.Module):
    """The body in one of Flax's liftings."""

    lifting: str
    body: dict

    @nn.compact
    def __call__(self, x):
        body, lifted = Body, ("params", "lora", "lora_scale")
        if self.lifting == "remat":
            body = nn.remat(Body)
        if self.lifting in ("scan", "vmap"):
            axes = {name: {"scan": 1, "vmap": 0}[self.lifting] for name in lifted}
            split = {"params": True, "dropout": True}
            if self.lifting == "scan":
                body = nn.scan(nn.remat(Body), variable_axes=axes, split_rngs=split, length=DEPTH)
            else:
                body = nn.vmap(Body, variable_axes=axes, split_rngs=split, in_axes=None, axis_size=DEPTH)
        return body(**self.body, name="body")(x, *((None,) if self.lifting in ("scan", "vmap") else ()))[1]


LIFTED = {"plain": "", "scan": "@1", "remat": "", "vmap": "@0"}
"""The liftings, and how `Toy.paths` tells the axes that they stack."""


def inputs(subject):
    rng, shape = np.random.default_rng(0), SUBJECTS[subject].shape
    return rng.integers(0, 7, shape) if SUBJECTS[subject].attend else rng.normal(size=shape)


class Twin(nnx.Module):
    """The subject in NNX, at the path that `Whole` has it at."""

    def __init__(self, subject, rngs):
        self.body = nnx.Module()
        self.body.layer = SUBJECTS[subject].nnx(rngs)
        self.attend = SUBJECTS[subject].attend

    def __call__(self, x):
        y = self.body.layer(x)
        return self.body.layer.attend(y) if self.attend else y


def toys(subject, lifting):
    """The layer in a Linen model, and the same in NNX if there is such a layer."""
    row = SUBJECTS[subject]
    names = [("layer/" + name).removesuffix("/") for name in row.weights]
    paths = " ".join(f"body/{name}{LIFTED[lifting]}" for name in names)
    fields = {"paths": paths, "rules": modules(*names), "args": (inputs(subject),)}
    twin = [Toy(partial(Twin, subject), **fields)] if row.nnx and lifting == "plain" else []
    return [Toy(Whole(lifting, {"subject": subject}), **fields), *twin]


def subjects(subject, lifting, **fields):
    """All of one layer: in a Linen model, in NNX, and with an adapter of its own; with the Linen model's trees."""
    toy, *twins = toys(subject, lifting)
    first, *others = of_linen(toy, **fields), *(of_nnx(twin, **fields) for twin in twins)
    for other in others:
        assert other.specs == first.specs
        assert jax.tree.map(jnp.shape, other.base) == jax.tree.map(jnp.shape, first.base)
        assert jax.tree.map(jnp.shape, other.start) == jax.tree.map(jnp.shape, first.start)
    adapted = [first.adapted[0], *(other.adapted[0] for other in others)]
    if SUBJECTS[subject].ours:
        ours = Whole(lifting, {"subject": subject, "ours": True, **fields})
        assert traced(ours, *first.args, base=first.base)[1] == first.specs
        adapted.append(ours.apply)
    return first._replace(adapted=tuple(adapted))


EVERY = [(name, "plain") if name == "general" else slow(name, "plain") for name in SUBJECTS]
LIFTINGS = [
    slow("einsum, outputs first", "scan"),
    slow("general, outer axis", "remat"),
    slow("conv, local", "vmap"),
]
# One for each way in which the table writes a term.
TERMS = ("dense of a vector", "general, batch", "einsum, batch last", "conv, local")
TERMS += ("conv, strides and groups", "conv, transposed kernel", "embed and attend")


@pytest.mark.parametrize(("subject", "lifting"), [*EVERY, *LIFTINGS])
def test_a_layer_has_all_properties_in_linen_in_nnx_and_as_our_own(subject, lifting, tmp_path):
    with jax.enable_x64(True):
        every = subjects(subject, lifting)
        assert_trees(every, toys(subject, lifting)[0].paths, tmp_path)
        for name, (leaf, kind, axes, shape) in SUBJECTS[subject].weights.items():
            path = ("body/layer/" + name).removesuffix("/")
            spec = every.specs[path]
            for axis in spec.stacked:
                shape = (*shape[:axis], DEPTH, *shape[axis:])
            assert (spec.leaf, spec.kind, spec.axes) == (f"params/{path}/{leaf}", kind, axes)
            assert (spec.shape, spec.rank, spec.scale) == (shape, 2, 1.5)
        roles = {"embedding"} if SUBJECTS[subject].attend else {"a", "b"}
        assert set(jax.tree.leaves(label_params({"lora": every.start}, every.specs))) == roles
        assert_as_merged(every, 1e-6 if subject == "attention" else 1e-9)  # NNX's multiplies in float32


@pytest.mark.slow
@pytest.mark.parametrize("subject", TERMS)
def test_dora_has_them_too(subject, tmp_path):
    with jax.enable_x64(True):
        every = subjects(subject, "plain", variant="dora")
        assert_trees(every, toys(subject, "plain")[0].paths, tmp_path)
        assert_as_merged(every)


@pytest.mark.slow
@pytest.mark.parametrize("subject", TERMS)
def test_a_layer_in_bfloat16_computes_what_its_merged_weights_do(subject):
    """Outputs and gradients against those in float32 of the same numbers."""
    dtype = jnp.bfloat16
    toy = toys(subject, "plain")[0]
    x = jnp.asarray(toy.args[0], jnp.int32 if SUBJECTS[subject].attend else jnp.float32)
    lora, specs = traced(apply_lora_plus(toy.make, toy.config()), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype("float32")}
    half = Whole("plain", {"subject": subject, "dtype": dtype, "param_dtype": dtype})
    base = {"params": drawn(jax.eval_shape(half.init, KEY, x)["params"], dtype=None)}
    lora = drawn(lora, 5, dtype=jnp.float32)
    adapted, wide = apply_lora_plus(half, toy.config()), jax.tree.map(lambda w: w.astype(jnp.float32), base)

    def loss(lora, net, merged):
        y = net.apply(merge(wide, lora, specs) if merged else base | {"lora": lora}, x)
        return jnp.mean(jnp.sin(y.astype(jnp.float32))), y

    @jax.jit
    def program(lora):
        return [jax.grad(loss, has_aux=True)(lora, *net) for net in ((adapted, False), (toy.make, True))]

    (found, y), (expected, merged) = program(lora)
    assert y.dtype == dtype
    size = float(jnp.std(merged))
    np.testing.assert_allclose(np.float32(y), merged, rtol=0, atol=0.05 * max(1.0, 4 * size))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.05 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("subject", [name for name in TERMS if SUBJECTS[name].ours])
def test_a_layer_of_our_own_costs_the_same(subject):
    """What a step costs but for the optimizer, which sees the same tree."""
    toy, ours = toys(subject, "plain")[0], Whole("plain", {"subject": subject, "ours": True})
    x = jnp.asarray(toy.args[0])
    shapes = jax.eval_shape(ours.init, KEY, x)

    def cost(model):
        loss = lambda lora, params: jnp.sin(model.apply({"params": params, "lora": lora}, x)).sum()  # noqa: E731
        step = jax.jit(jax.grad(loss)).lower(shapes["lora"], shapes["params"])
        return step.compile().cost_analysis()["flops"]

    assert cost(ours) == cost(apply_lora_plus(toy.make, toy.config())) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "kind"), [*zip(TERMS, itertools.cycle(("nf4", "int8")), strict=False)])
def test_a_packed_base_is_its_values(subject, kind):
    """Outputs and gradients, Linen and NNX, against the dense base that the packed one stands for."""
    toy, *twins = toys(subject, "plain")
    with jax.enable_x64(True):
        first = of_linen(toy)
        lora = drawn(first.start)
        packed = quantize_base(jax.tree.map(lambda w: w.astype(jnp.float32), first.base), kind, first.specs)
        dense = jax.tree.map(lambda w: w.dequantize() if is_packed(w) else w, packed, is_leaf=is_packed)
        assert sum(map(is_packed, jax.tree.leaves(packed, is_leaf=is_packed))) == len(first.specs)
        nets = [first.adapted[0]]
        for twin in twins:
            model = twin.make(nnx.Rngs(0))
            loraplus_nnx.apply_lora_plus(model, twin.config(), rngs=nnx.Rngs(1))
            loraplus_nnx.quantize_base(model, kind, first.specs)
            nets.append(loraplus_nnx.functional(model))

        @jax.jit
        def program(packed, dense, lora):
            def step(net, base):
                return jax.value_and_grad(
                    lambda lora: jnp.sin(net(base | {"lora": lora}, *first.args)).mean()
                )(lora)

            return step(first.adapted[0], dense), [step(net, packed) for net in nets]

        expected, results = program(packed, dense, lora)
        for found in results:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, expected)
        with pytest.raises(ValueError, match=kind):
            merge(packed, lora, first.specs)
        again = merge(packed, lora, first.specs, dequantize=True), merge(dense, lora, first.specs)
        jax.tree.map(np.testing.assert_array_equal, *again)


class Boxed(nn.Module):
    """A kernel with mesh axes in its metadata, and one that is a target for itself."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(5, name="other")(nn.Dense(5, kernel_init=init, name="layer")(x))


@pytest.mark.slow
def test_a_packed_weight_may_be_boxed_or_a_target():
    x = jnp.ones((2, 6))
    base = {"params": jax.jit(Boxed().init)(KEY, x)["params"]}
    config = LoRAPlusConfig(target_modules=["layer"], target_parameters={"other/kernel": "io"}, rank=2)
    model = apply_lora_plus(Boxed(), config)
    lora, specs = traced(model, x)
    lora = drawn(lora, dtype=None)
    packed = quantize_base(base, "int8", specs)
    assert isinstance(packed["params"]["layer"]["kernel"], nn.Partitioned)
    merged = merge(packed, lora, specs, dequantize=True)
    np.testing.assert_allclose(model.apply(packed | {"lora": lora}, x), Boxed().apply(merged, x), rtol=1e-5)


@pytest.mark.slow
def test_an_embedding_of_one_row_ignores_its_indices():
    """As Flax's does."""
    model = apply_lora_plus(nn.Embed(1, 4), LoRAPlusConfig(target_modules=".*", rank=1, alpha=2.0))
    lora = {"lora_embedding_a": np.array([[0.5]]), "lora_embedding_b": np.array([[1.0, 0.0, 0.0, 2.0]])}
    variables = {"params": {"embedding": np.array([[1.0, 2.0, 3.0, 4.0]])}, "lora": lora}
    y = jax.jit(model.apply)(variables, np.array([[0, 3]]))
    np.testing.assert_allclose(y, [[[2.0, 2.0, 3.0, 6.0]] * 2], rtol=1e-6)


def test_masked_indices_beyond_the_last_row_leave_the_gradient_finite():
    """The rows there are NaN, as Flax's are, and a model that pads with such indices masks them."""
    model = apply_lora_plus(nn.Embed(5, 4), LoRAPlusConfig(target_modules=".*", rank=2))
    ids = jnp.array([1, 3, 9])
    variables = jax.eval_shape(model.init, KEY, ids)
    variables = jax.tree.map(lambda x: jnp.ones(x.shape), variables)

    def loss(lora, ids):
        rows = model.apply(variables | {"lora": lora}, ids)
        return jnp.sum(jnp.sin(jnp.where(ids[:, None] < 5, rows, 0)))

    found, expected = (jax.grad(loss)(variables["lora"], ids[:n]) for n in (3, 2))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
