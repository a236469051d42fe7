"""One behavioural suite over every layer that can be adapted, met in a model and as a layer of our own."""

import dataclasses
import functools
from collections.abc import Callable
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
    disabled,
    init_lora,
    label_params,
    merge,
    save_adapter,
    unmerge,
)
from loraplus_jax import nnx as loraplus_nnx
from loraplus_jax.linen.quantize import quantize_base
from loraplus_jax.quantization.packed_array import is_packed

RANK, ALPHA, DEPTH = 2, 3.0, 3


@dataclasses.dataclass(frozen=True)
class Subject:
    """A layer under test.

    Attributes:
      make: the plain layer, of a name and dtypes.
      ours: the same with an adapter of its own, or None.
      shape: of the input; a layer under scan gives back what has this shape.
      weights: path below the layer to the weight's leaf, kind, axes and shape.
      nnx: the layer in NNX, of an `nnx.Rngs`; None where NNX has no such layer.
      ids: whether the input holds indices.
      attend: whether the layer is used by its `attend` too.
    """

    make: Callable[..., nn.Module]
    ours: Callable[..., nn.Module] | None
    shape: tuple[int, ...]
    weights: dict[str, tuple[str, str, str, tuple[int, ...]]]
    nnx: Callable[[nnx.Rngs], nnx.Module] | None
    ids: bool = False
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
    ours = functools.partial(OURS[cls], *args, **fields) if cls in OURS else None
    return functools.partial(cls, *args, **fields), ours


def twin(cls, *args, **fields):
    return lambda rngs: cls(*args, **fields, rngs=rngs)


def kernel(kind, axes, *shape):
    return {"": ("kernel", kind, axes, shape)}


HEADS = dict.fromkeys(("query", "key", "value"), ("kernel", "dense_general", "ioo", (6, 2, 3)))
SUBJECTS = {
    "dense": Subject(*layer(nn.Dense, 5), (2, 3, 5), kernel("dense", "io", 5, 5), twin(nnx.Linear, 5, 5)),
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
    "einsum, batch": Subject(
        *layer(nn.Einsum, (3, 5, 5), "ebi,eio->ebo", use_bias=False),
        (3, 2, 5),
        kernel("einsum", "eio", 3, 5, 5),
        twin(nnx.Einsum, "ebi,eio->ebo", (3, 5, 5)),
    ),
    "einsum, batch last": Subject(
        *layer(nn.Einsum, (5, 5, 3), "bie,ioe->boe", use_bias=False),
        (2, 5, 3),
        kernel("einsum", "ioe", 5, 5, 3),
        twin(nnx.Einsum, "bie,ioe->boe", (5, 5, 3)),
    ),
    "conv": Subject(
        *layer(nn.Conv, 4, (3, 3)),
        (2, 5, 5, 4),
        kernel("conv", "iiio", 3, 3, 4, 4),
        twin(nnx.Conv, 4, 4, (3, 3)),
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
        *layer(nn.Conv, 4, (3,), mask=np.tril(np.ones((3, 4, 4)))),
        (2, 5, 4),
        kernel("conv", "iio", 3, 4, 4),
        twin(nnx.Conv, 4, 4, (3,), mask=np.tril(np.ones((3, 4, 4)))),
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
    "embed": Subject(
        *layer(nn.Embed, 7, 5),
        (2, 3),
        {"": ("embedding", "embed", "io", (7, 5))},
        twin(nnx.Embed, 7, 5),
        ids=True,
    ),
    "embed and attend": Subject(
        *layer(nn.Embed, 7, 5),
        (2, 3),
        {"": ("embedding", "embed", "io", (7, 5))},
        twin(nnx.Embed, 7, 5),
        ids=True,
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
            fields |= {"rank": RANK, "alpha": ALPHA, "variant": self.variant}
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


LIFTINGS = ("plain", "scan", "remat", "vmap")
DTYPES = {"float32": (None, jnp.float32), "bfloat16": (jnp.bfloat16, jnp.bfloat16)}


def inputs(subject):
    rng = np.random.default_rng(0)
    shape = SUBJECTS[subject].shape
    return jnp.asarray(
        rng.integers(0, 7, shape) if SUBJECTS[subject].ids else rng.normal(size=shape),
        jnp.int32 if SUBJECTS[subject].ids else jnp.float32,
    )


def drawn(shapes, seed=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes)


def models(subject, lifting, dtype="float32", **more):
    """The plain model and the adapted one."""
    fields = {"subject": subject} | dict(zip(("dtype", "param_dtype"), DTYPES[dtype], strict=True))
    plain = Whole(lifting, fields)
    names = [("layer/" + name).removesuffix("/") for name in SUBJECTS[subject].weights]
    config = LoRAPlusConfig(target_modules=names, rank=RANK, alpha=ALPHA, **more)
    return plain, apply_lora_plus(plain, config)


def parts_of(subject, plain, adapted):
    """An input, drawn weights and factors, and the specs."""
    x, key = inputs(subject), jax.random.key(0, impl="rbg")
    lora, specs = init_lora(adapted, key, x)
    base = {"params": drawn(jax.eval_shape(plain.init, key, x)["params"])}
    return x, base, drawn(jax.eval_shape(lambda: lora), seed=5), specs


# Compiling takes nearly all the time, so the quick suite scans one layer only.
SCANNED = ("embed and attend",)


def is_quick(subject, lifting):
    return lifting == "plain" or (lifting == "scan" and subject in SCANNED)


def marks(subject, lifting):
    """Beyond the quick ones, `.ci/run` lifts every eighth layer in one way, each way in turn."""
    if is_quick(subject, lifting):
        return []
    number = list(SUBJECTS).index(subject)
    in_turn = number % 8 == 0 and number // 8 % len(LIFTINGS) == list(LIFTINGS).index(lifting)
    return [pytest.mark.slow] if in_turn else [pytest.mark.long]


EVERY = [
    pytest.param(subject, lifting, marks=marks(subject, lifting))
    for subject in SUBJECTS
    for lifting in LIFTINGS
]
every = pytest.mark.parametrize(("subject", "lifting"), EVERY)


def expected_specs(subject, lifting):
    """The table as it must be, from literals."""
    stack = {"scan": 1, "vmap": 0}.get(lifting)
    for name, (leaf, kind, axes, shape) in SUBJECTS[subject].weights.items():
        path = ("body/layer/" + name).removesuffix("/")
        full = shape if stack is None else (*shape[:stack], DEPTH, *shape[stack:])
        yield (
            path,
            (
                f"params/{path}/{leaf}",
                kind,
                axes,
                full,
                RANK,
                ALPHA / RANK,
                () if stack is None else (stack,),
            ),
        )


precise = pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])


@every
@precise
def test_the_table_the_roles_and_nothing_changed_at_init(subject, lifting, dtype):
    plain, adapted = models(subject, lifting, dtype)
    x, key = inputs(subject), jax.random.key(0, impl="rbg")
    lora, specs = init_lora(adapted, key, x)
    found = {p: (s.leaf, s.kind, s.axes, s.shape, s.rank, s.scale, s.stacked) for p, s in specs.items()}
    assert found == dict(expected_specs(subject, lifting))
    embedded = SUBJECTS[subject].ids
    roles = {"embedding"} if embedded else {"a", "b"}
    assert set(jax.tree.leaves(label_params({"lora": lora}, specs))) == roles
    assert set(jax.tree.leaves(label_params({"lora": lora}))) == roles
    base = {"params": drawn(jax.eval_shape(plain.init, key, x)["params"])}
    assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype("float32")}
    expected = jax.jit(plain.apply)(base, x)
    # The bits too, but where XLA makes one loop of all: there it sums in another order.
    close = 0.0 if lifting != "scan" else 1e-6 if dtype == "float32" else 2.0**-7
    found = jax.jit(adapted.apply)(base | {"lora": lora}, x)
    assert found.dtype == expected.dtype == dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), rtol=close, atol=close
    )
    assert jax.tree.map(jnp.shape, jax.eval_shape(adapted.init, key, x)["params"]) == jax.tree.map(
        jnp.shape, base["params"]
    )


@every
@precise
def test_merged_equals_unmerged_compiled_once(subject, lifting, dtype):
    plain, adapted = models(subject, lifting, dtype)
    x, base, lora, specs = parts_of(subject, plain, adapted)
    apply = jax.jit(adapted.apply)
    found = apply(base | {"lora": lora}, x)
    apply(base | {"lora": jax.tree.map(jnp.zeros_like, lora)}, x + 0)
    assert apply._cache_size() == 1
    merged = merge(base, lora, specs)
    expected = jax.jit(plain.apply)(merged, x)
    assert found.dtype == expected.dtype == (jnp.bfloat16 if dtype == "bfloat16" else jnp.float32)
    off = jax.jit(plain.apply)(base, x)
    size = float(jnp.std(expected.astype(jnp.float32)))
    assert float(jnp.abs(found.astype(jnp.float32) - off.astype(jnp.float32)).max()) > 0.1 * size
    tolerance = 0.05 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0, atol=tolerance * max(1.0, 4 * size)
    )
    jax.tree.map(np.testing.assert_array_equal, unmerge(merged, base, specs), base)


@every
def test_dora_changes_nothing_at_first_and_then_equals_its_merged_form(subject, lifting):
    plain, adapted = models(subject, lifting, variant="dora")
    x, key = inputs(subject), jax.random.key(0, impl="rbg")
    base = {"params": drawn(jax.eval_shape(plain.init, key, x)["params"])}
    lora, specs = init_lora(adapted, key, x, base=base)
    apply, apply_plain = jax.jit(adapted.apply), jax.jit(plain.apply)
    expected = apply_plain(base, x)
    close = 1e-6 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(apply(base | {"lora": lora}, x), expected, rtol=0, atol=close)
    lora = drawn(jax.eval_shape(lambda: lora), seed=5)
    found = apply(base | {"lora": lora}, x)
    assert float(jnp.abs(found - expected).max()) > 0.1 * float(jnp.std(expected))
    merged = apply_plain(merge(base, lora, specs), x)
    np.testing.assert_allclose(found, merged, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(merged).max())))
    np.testing.assert_allclose(apply(base | {"lora": disabled(lora)}, x), expected, rtol=0, atol=close)
    assert apply._cache_size() == 1
    if lifting == "plain" and SUBJECTS[subject].ours is not None:
        fields = {"subject": subject, "ours": True, "variant": "dora"}
        ours = jax.jit(Whole(lifting, fields).apply)(base | {"lora": lora}, x)
        np.testing.assert_allclose(ours, found, rtol=0, atol=close)


@every
@precise
def test_gradients_are_those_of_the_merged_form(subject, lifting, dtype):
    """In bfloat16 they are held against those in float32, from the same numbers."""
    _, adapted = models(subject, lifting, dtype)
    plain, _ = models(subject, lifting)
    x, key = inputs(subject), jax.random.key(0, impl="rbg")
    lora, specs = init_lora(adapted, key, x)
    base = {"params": drawn(jax.eval_shape(adapted.init, key, x)["params"])}
    lora = drawn(jax.eval_shape(lambda: lora), seed=5)
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)  # noqa: E731

    def loss(lora, merged):
        y = (
            plain.apply(merge(wide(base), lora, specs), x)
            if merged
            else adapted.apply(base | {"lora": lora}, x)
        )
        return jnp.mean(jnp.sin(y.astype(jnp.float32)))

    found = wide(jax.jit(jax.grad(loss), static_argnums=1)(lora, False))
    expected = jax.jit(jax.grad(loss), static_argnums=1)(wide(lora), True)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # A bfloat16 holds 8 bits, and errors add up through attention's four projections.
        close = (
            1e-5
            if dtype == "float32"
            else (0.15 if subject == "attention" else 0.05) * float(jnp.abs(b).max())
        )
        np.testing.assert_allclose(a, b, rtol=0, atol=close)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(expected))


@pytest.mark.parametrize("lifting", ["plain", pytest.param("scan", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "subject",
    [
        pytest.param(name, marks=[] if name in ("general", "conv", "embed") else pytest.mark.slow)
        for name, subject in SUBJECTS.items()
        if subject.ours
    ],
)
def test_a_layer_of_our_own_is_the_same(subject, lifting):
    _, adapted = models(subject, lifting)
    ours = Whole(lifting, {"subject": subject, "ours": True})
    x, key = inputs(subject), jax.random.key(0, impl="rbg")
    shapes = jax.eval_shape(ours.init, key, x)
    lora, specs = init_lora(adapted, key, x)
    _, own_specs = init_lora(ours, key, x)
    assert own_specs == specs
    assert jax.tree.map(jnp.shape, shapes["lora"]) == jax.tree.map(jnp.shape, lora)
    variables = drawn({"params": shapes["params"], "lora": shapes["lora"]})
    one, other = (jax.jit(model.apply).lower(variables, x).compile() for model in (ours, adapted))
    np.testing.assert_array_equal(one(variables, x), other(variables, x))
    step = [
        gradient_of(model).lower(variables["lora"], variables["params"], x).compile()
        for model in (ours, adapted)
    ]
    jax.tree.map(np.testing.assert_array_equal, *(g(variables["lora"], variables["params"], x) for g in step))
    for programs in ((one, other), step):
        assert programs[0].cost_analysis()["flops"] == programs[1].cost_analysis()["flops"] > 0


def gradient_of(model):
    """What a step costs but for the optimizer, which sees the same tree."""
    return jax.jit(
        jax.grad(lambda lora, params, x: jnp.sin(model.apply({"params": params, "lora": lora}, x)).sum())
    )


def packed_cases():
    for n, (name, subject) in enumerate(SUBJECTS.items()):
        for kind in ("nf4", "int8"):
            quick = name in ("general", "conv, strides and groups", "embed and attend") and kind == "nf4"
            in_turn = ("nf4", "int8")[n % 2] == kind
            marks = [] if quick else [pytest.mark.slow] if in_turn else [pytest.mark.long]
            yield pytest.param(name, kind, "plain", marks=marks)
            if not subject.attend and "local" not in name:
                yield pytest.param(
                    name, kind, "vmap", marks=pytest.mark.slow if in_turn and n % 3 == 0 else pytest.mark.long
                )


@pytest.mark.parametrize(("subject", "kind", "lifting"), [*packed_cases()])
def test_a_packed_base_is_its_values(subject, kind, lifting):
    """Outputs and gradients, Linen and NNX, against the dense base that the packed one stands for."""
    plain, adapted = models(subject, lifting)
    x, base, lora, specs = parts_of(subject, plain, adapted)
    packed = quantize_base(base, kind, specs)
    dense = jax.tree.map(lambda w: w.dequantize() if is_packed(w) else w, packed, is_leaf=is_packed)
    leaves = jax.tree.leaves(packed, is_leaf=is_packed)
    assert sum(map(is_packed, leaves)) == len(specs)
    step = lambda net: jax.jit(  # noqa: E731
        jax.value_and_grad(lambda lora, base: jnp.sin(net(base | {"lora": lora}, x)).mean())
    )
    expected = step(adapted.apply)(lora, dense)
    nets = [(adapted.apply, packed)]
    if SUBJECTS[subject].nnx and lifting == "plain":
        model = Twin(subject)
        loraplus_nnx.apply_lora_plus(model, adapted.lora_config, rngs=nnx.Rngs(1))
        nets.append((loraplus_nnx.functional(model), dense))
        loraplus_nnx.quantize_base(model, kind, specs)
        nets.append((loraplus_nnx.functional(model), packed))
    for net, variables in nets:
        found = step(net)(lora, variables)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=kind):
        merge(packed, lora, specs)
    jax.tree.map(
        np.testing.assert_array_equal, merge(packed, lora, specs, dequantize=True), merge(dense, lora, specs)
    )


class Twin(nnx.Module):
    """The subject in NNX, at the path that `Whole` has it at."""

    def __init__(self, subject):
        self.body = nnx.Module()
        self.body.layer = SUBJECTS[subject].nnx(nnx.Rngs(0))
        self.attend = SUBJECTS[subject].attend

    def __call__(self, x):
        y = self.body.layer(x)
        return self.body.layer.attend(y) if self.attend else y


@pytest.mark.parametrize(
    "subject",
    [
        pytest.param(name, marks=[] if name in ("general", "conv", "embed and attend") else pytest.mark.slow)
        for name, subject in SUBJECTS.items()
        if subject.nnx
    ],
)
def test_linen_and_nnx_are_the_same(subject, tmp_path):
    """Specs, files, outputs and gradients, for the same weights and factors."""
    plain, adapted = models(subject, "plain")
    x, base, lora, specs = parts_of(subject, plain, adapted)
    model = Twin(subject)
    assert loraplus_nnx.apply_lora_plus(model, adapted.lora_config, rngs=nnx.Rngs(1)) == specs
    apply = loraplus_nnx.functional(model)
    assert jax.tree.map(jnp.shape, loraplus_nnx.lora_tree(model)) == jax.tree.map(jnp.shape, lora)
    step = lambda net: jax.jit(  # noqa: E731
        jax.value_and_grad(lambda lora: jnp.sin(net(base | {"lora": lora}, x)).sum())
    )
    np.testing.assert_allclose(
        apply(base | {"lora": lora}, x), adapted.apply(base | {"lora": lora}, x), atol=1e-5
    )
    for found, expected in zip(
        *map(jax.tree.leaves, (step(apply)(lora), step(adapted.apply)(lora))), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    loraplus_nnx.set_lora(model, lora)
    np.testing.assert_allclose(
        loraplus_nnx.merge(model)(x),
        plain.apply(merge({"params": loraplus_nnx.base_variables(model)["params"]}, lora, specs), x),
        atol=1e-5,
    )
    for name, tree in (("linen", lora), ("nnx", loraplus_nnx.lora_tree(model))):
        save_adapter(tmp_path / name, tree, specs, adapted.lora_config)
    files = sorted(path.name for path in (tmp_path / "linen").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "nnx").iterdir())
    for name in files:
        assert (tmp_path / "linen" / name).read_bytes() == (tmp_path / "nnx" / name).read_bytes()


class Boxed(nn.Module):
    """A kernel with mesh axes in its metadata, and one that is a target for itself."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(5, name="other")(nn.Dense(5, kernel_init=init, name="layer")(x))


def test_a_packed_weight_may_be_boxed_or_a_target():
    x, key = jnp.ones((2, 6)), jax.random.key(0)
    base = {"params": Boxed().init(key, x)["params"]}
    config = LoRAPlusConfig(target_modules=["layer"], target_parameters={"other/kernel": "io"}, rank=2)
    model = apply_lora_plus(Boxed(), config)
    lora, specs = init_lora(model, key, x)
    lora = drawn(lora)
    packed = quantize_base(base, "int8", specs)
    assert isinstance(packed["params"]["layer"]["kernel"], nn.Partitioned)
    merged = merge(packed, lora, specs, dequantize=True)
    np.testing.assert_allclose(model.apply(packed | {"lora": lora}, x), Boxed().apply(merged, x), rtol=1e-5)


def test_an_embedding_of_one_row_ignores_its_indices():
    """As Flax's does."""
    config, ids = LoRAPlusConfig(target_modules=".*", rank=1), jnp.array([[0, 3]])
    model = apply_lora_plus(nn.Embed(1, 4), config)
    _, specs = init_lora(model, jax.random.key(0), ids)
    base = {"params": {"embedding": jnp.array([[1.0, 2.0, 3.0, 4.0]])}}
    lora = {"lora_embedding_a": jnp.array([[0.5]]), "lora_embedding_b": jnp.array([[1.0, 0.0, 0.0, 2.0]])}
    y = model.apply(base | {"lora": lora}, ids)
    expected = jnp.array([1.0, 2.0, 3.0, 4.0]) + specs[""].scale * jnp.array([0.5, 0.0, 0.0, 1.0])
    np.testing.assert_allclose(y, jnp.broadcast_to(expected, (1, 2, 4)), rtol=1e-6)
