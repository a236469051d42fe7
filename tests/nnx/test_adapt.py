"""apply_lora_plus on NNX models: the base untouched, the adapters equal to merged weights."""

import copy
import dataclasses
import functools
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.interpreter.low_rank import LowRankWeight
from loraplus_jax.nnx import apply_lora_plus, base_variables, disabled, lora_tree, merge, set_lora, unmerge

from ..marks import every
from ..messages import mentions

X = jax.random.normal(jax.random.key(1), (2, 5, 8))
IDS = jnp.arange(10).reshape(2, 5)


class One(nnx.Module):
    """A model of one layer, called `layer`."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class Attends(One):
    def __call__(self, x):
        return self.layer.attend(self.layer(x))


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


class Sides(nnx.Module):
    """A layer of someone else's, whose two shapes stand in fields."""

    def __init__(self, rngs):
        self.in_features_shape, self.out_features_shape = (8,), (2, 3)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (8, 2, 3)))

    def __call__(self, x):
        return jax.lax.dot_general(x, self.kernel[...], (((2,), (0,)), ((), ())))


class Super(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Bare(nnx.Module):
    """Two parameters of one module; its method calls another one of its own."""

    def __init__(self, rngs):
        self.wq, self.wo = (nnx.Param(jax.random.normal(rngs.params(), (8, 8))) for _ in range(2))

    def inner(self, x):
        return x @ self.wq[...]

    def __call__(self, x):
        return jnp.tanh(self.inner(x)) @ self.wo[...].T


class Row(NamedTuple):
    make: object
    x: object = X
    rule: object = ("layer",)
    by_rank: bool = True
    wrap: type = One
    parameters: object = ()


def linear(**options):
    return lambda rngs: nnx.Linear(8, 6, rngs=rngs, **options)


ROWS = {
    "linear": Row(linear()),
    "linear, bfloat16 weights": Row(linear(param_dtype=jnp.bfloat16)),
    "linear, bfloat16 products": Row(linear(dtype=jnp.bfloat16)),
    "linear, no bias": Row(linear(use_bias=False, precision="highest")),
    "linear general": Row(lambda r: nnx.LinearGeneral((5, 8), (2, 3), axis=(1, 2), rngs=r)),
    "linear general, batch": Row(lambda r: nnx.LinearGeneral(8, (3,), batch_axis={0: 2}, rngs=r)),
    "einsum": Row(lambda r: nnx.Einsum("btd,dnh->btnh", (8, 2, 3), rngs=r)),
    "einsum, batch": Row(lambda r: nnx.Einsum("btd,bdo->bto", (2, 8, 3), rngs=r)),
    "einsum, ellipsis": Row(lambda r: nnx.Einsum("...d,df->...f", (8, 3), rngs=r)),
    "conv": Row(lambda r: nnx.Conv(8, 6, (3,), strides=2, rngs=r)),
    "conv, groups": Row(lambda r: nnx.Conv(8, 6, (3,), feature_group_count=2, rngs=r)),
    "conv, mask": Row(
        lambda r: nnx.Conv(8, 6, (3,), mask=jnp.ones((3, 8, 6)).at[0].set(0), rngs=r), by_rank=False
    ),
    "conv transpose": Row(lambda r: nnx.ConvTranspose(8, 6, (3,), strides=2, rngs=r)),
    "embed": Row(lambda r: nnx.Embed(11, 8, rngs=r), IDS),
    "embed and attend": Row(lambda r: nnx.Embed(11, 8, rngs=r), IDS, wrap=Attends),
    "attention": Row(lambda r: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r), rule=("query", "out")),
    "einsum_str of its own": Row(Letters),
    "in_features_shape of its own": Row(Sides),
    "subclass": Row(lambda r: Super(8, 6, rngs=r)),
    "parameters": Row(Bare, rule=(), parameters={"layer/w[qo]": "io"}),
}


def build(row, config=None, **options):
    model = row.wrap(row.make(nnx.Rngs(0)))
    fields = {"target_modules": row.rule, "target_parameters": row.parameters, "rank": 2, "alpha": 3.0}
    specs = apply_lora_plus(model, LoRAPlusConfig(**fields | (config or {})), rngs=nnx.Rngs(1), **options)
    return model, specs


def randomise(model, seed=7):
    """Sets normal draws, so that no factor is zero."""
    random = np.random.default_rng(seed)
    set_lora(model, jax.tree.map(lambda x: random.normal(size=x.shape), lora_tree(model)))
    return model


def assert_close(got, expected, tolerance=1e-5):
    scale = float(jnp.abs(jnp.asarray(expected, jnp.float32)).max())
    np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", ROWS)
def test_a_layer_starts_as_the_plain_one_and_then_equals_the_merged_one(name, variant, monkeypatch):
    row, sums = ROWS[name], []
    plain = row.wrap(row.make(nnx.Rngs(0)))
    model, specs = build(row, {"variant": variant})
    before = plain(row.x)
    half = any("bfloat16" in str(v.dtype) for v in jax.tree.leaves((before, nnx.state(plain))))
    assert_close(model(row.x), before, 0 if variant == "lora" else 2e-2 if half else 1e-6)
    assert isinstance(model.layer, type(plain.layer))
    np.testing.assert_array_equal(model(row.x), before)
    assert {v.shape for v in jax.tree.leaves(lora_tree(model))} == {
        shape for spec in specs.values() for shape in spec.factor_shapes
    }
    randomise(model)
    original = LowRankWeight.sum
    monkeypatch.setattr(LowRankWeight, "sum", lambda self: (sums.append(1), original(self))[1])
    y = model(row.x)
    assert not sums if row.by_rank else sums
    assert y.dtype == before.dtype
    assert_close(y, merge(model)(row.x), 2e-2 if half else 1e-5)
    assert float(jnp.abs(y - before).max()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", every(3, ROWS))
def test_gradients_are_those_of_the_merged_model(name):
    row = ROWS[name]
    model, _ = build(row)
    randomise(model)
    if any("bfloat16" in str(v.dtype) for v in jax.tree.leaves((model(row.x), nnx.state(model)))):
        pytest.skip("compared in float32")
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    found = nnx.grad(lambda m: jnp.sum(jnp.sin(m(row.x))), argnums=wrt)(model)
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    expected = jax.grad(lambda lora: jnp.sum(jnp.sin(merge(nnx.merge(graph, lora, rest, copy=True))(row.x))))(
        lora
    )
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), found, expected)


def test_the_base_keeps_its_paths_class_and_checkpoints():
    plain = ROWS["attention"].wrap(ROWS["attention"].make(nnx.Rngs(0)))
    model, _ = build(ROWS["attention"])
    base = nnx.state(model, nnx.Not(nnx.LoRAParam))
    assert [p for p, _ in nnx.to_flat_state(base)] == [p for p, _ in nnx.to_flat_state(nnx.state(plain))]
    randomise(model)
    nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(plain)))  # a checkpoint made without adapters
    kernel = plain.layer.query.kernel[...]
    np.testing.assert_array_equal(model.layer.query.kernel[...], kernel + 1)
    assert base_variables(model)["params"]["layer"]["query"]["kernel"].shape == kernel.shape


def test_copies_and_instances_share_a_trace():
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    model, _ = build(ROWS["attention"])
    other, _ = build(ROWS["attention"])
    randomise(model)
    copies = (
        nnx.clone(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        nnx.merge(*nnx.split(model)),
    )
    y = run(model, X)
    run(other, X)
    for twin in copies:
        np.testing.assert_array_equal(run(twin, X), y)
    np.testing.assert_array_equal(run(disabled(model), X), run(other, X))
    assert len(traces) == 1


def test_unmerge_restores_bit_by_bit_and_remove_leaves_nothing():
    model, _ = build(ROWS["parameters"])
    plain = ROWS["parameters"].wrap(ROWS["parameters"].make(nnx.Rngs(0)))
    randomise(model)
    merged = merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(plain)
    unmerge(merged, model)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(merged), nnx.state(plain))
    from loraplus_jax.nnx import remove_adapters

    remove_adapters(model)
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    with pytest.raises(ValueError, match="apply_lora_plus"):
        lora_tree(model)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Stack(nnx.Module):
    """Three blocks made by nnx.vmap and run by nnx.scan with nnx.remat inside."""

    def __init__(self, rngs, axis=0):
        self.axis = axis
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=(0,), out_axes=axis))(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, self.axis), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_layers(axis):
    model, plain = Stack(nnx.Rngs(0), axis), Stack(nnx.Rngs(0), axis)
    config = LoRAPlusConfig(target_modules=["up", "down"], rank=2, init="lora")
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    assert specs["blocks/up"].stacked == (axis,)
    first = lora_tree(model)["blocks"]["up"]["lora_a"]
    assert not np.array_equal(*np.take(first, [0, 1], axis).swapaxes(0, axis)[:2])  # a draw for every layer
    np.testing.assert_array_equal(model(X), plain(X))
    randomise(model)
    assert_close(model(X), merge(model)(X))


class BareStack(nnx.Module):
    """Stacked modules with parameters of their own."""

    def __init__(self, rngs, axis=0):
        self.axis = axis
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Bare, in_axes=(0,), out_axes=axis))(rngs)

    def __call__(self, x):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, self.axis), out_axes=nnx.Carry)
        return run(x / 9, self.blocks)


@pytest.mark.parametrize(
    ("axis", "axes", "stacked"),
    [(0, "bio", {}), (0, "io", {"wq": (0,), "wo": (0,)}), (1, "io", {"wq": (1,), "wo": (1,)})],
)
def test_parameters_of_stacked_modules(axis, axes, stacked):
    """The stack is a batch axis of the parameter, or named."""
    model, plain = BareStack(nnx.Rngs(0), axis), BareStack(nnx.Rngs(0), axis)
    config = LoRAPlusConfig(target_parameters={"blocks/w[qo]": axes}, rank=2)
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1), stacked=stacked)
    assert (specs["blocks/wq"].axes, specs["blocks/wq"].stacked) == (axes, stacked.get("wq", ()))
    np.testing.assert_array_equal(model(X), plain(X))
    randomise(model)
    assert_close(model(X), merge(model)(X))


def test_layers_to_transform_within_a_stack():
    model = Stack(nnx.Rngs(0))
    config = LoRAPlusConfig(target_modules=["up"], rank=2, layers_to_transform=[1])
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    assert specs["blocks/up"].layers == (1,)
    assert [bool(np.any(a)) for a in lora_tree(model)["blocks"]["up"]["lora_a"]] == [False, True, False]


class Twice(nnx.Module):
    """One module in two places."""

    def __init__(self, rngs):
        self.first = self.second = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(self.first(x))


def test_a_shared_module_has_one_adapter():
    model = Twice(nnx.Rngs(0))
    specs = apply_lora_plus(model, LoRAPlusConfig(target_modules=["first"], rank=2), rngs=nnx.Rngs(1))
    assert list(specs) == ["first"]
    randomise(model)
    assert_close(model(X), merge(model)(X))


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


def test_attention_decodes_with_its_cache():
    make = lambda: nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))  # noqa: E731
    model = make()
    apply_lora_plus(model, LoRAPlusConfig(target_modules=["query", "value", "out"], rank=2), rngs=nnx.Rngs(1))
    randomise(model)
    results = []
    for net in (model, merge(model)):
        net.init_cache(X.shape)
        results.append([net(X[:, n : n + 1]) for n in range(5)])
        assert int(net.cache_index[...]) == 5
    assert_close(jnp.stack(results[0]), jnp.stack(results[1]))
    assert_close(model.cached_value[...], merge(model).cached_value[...])
    whole = make()
    whole.decode = False
    nnx.update(whole, nnx.state(merge(model), nnx.Param))
    causal = nnx.make_causal_mask(jnp.ones(X.shape[:2]))
    assert_close(jnp.concatenate(results[0], axis=1), whole(X, mask=causal, decode=False))


class Norms(nnx.Module):
    """An adapted parameter beside batch statistics, in one module."""

    def __init__(self, rngs):
        self.w, self.norm = nnx.Param(jnp.eye(8)), nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.norm(x @ self.w[...])


def test_batch_statistics_move_as_in_the_plain_model():
    model, plain = Norms(nnx.Rngs(0)), Norms(nnx.Rngs(0))
    apply_lora_plus(model, LoRAPlusConfig(target_parameters={"w": "io"}, rank=2), rngs=nnx.Rngs(1))
    start = plain.norm.mean[...]
    for net in (model, plain):
        nnx.jit(lambda net, x: net(x))(net, X)
    np.testing.assert_array_equal(model.norm.mean[...], plain.norm.mean[...])
    assert np.any(plain.norm.mean[...] != start)


@jax.custom_vjp
def no_gradient(x, w):
    return x @ w


no_gradient.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: jax.tree.map(jnp.zeros_like, kept))


class Rule(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 8)))

    def __call__(self, x):
        return no_gradient(x, self.w[...])


def test_a_custom_gradient_is_kept():
    model, _ = build(Row(Rule, rule=(), parameters={"layer/w": "io"}))
    randomise(model)
    assert_close(model(X), merge(model)(X))
    grads = nnx.grad(lambda m: jnp.sum(m(X)), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


class Inside(nnx.Module):
    """A weight used in a checkpoint, a loop and a branch of its module's method."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 8)) / 3)

    def __call__(self, x):
        w = self.w[...]
        x = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, w)
        x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, 2)[0]
        return jax.lax.cond(jnp.sum(x) > 0, lambda x, w: x @ w, lambda x, w: x @ w + 1, x, w)


def test_checkpoints_loops_and_branches_inside_a_method():
    model, _ = build(Row(Inside, rule=(), parameters={"layer/w": "io"}))
    randomise(model)
    assert_close(model(X), merge(model)(X))
    program = jax.make_jaxpr(lambda x: model(x))(X)
    assert any(eqn.primitive.name in ("checkpoint", "remat2") for eqn in program.jaxpr.eqns)


def test_dropout_follows_the_mode_and_its_own_stream():
    model, _ = build(ROWS["linear"], {"dropout": 0.5})
    randomise(model)
    assert not np.array_equal(model(X), model(X))
    model.eval()
    np.testing.assert_array_equal(model(X), model(X))
    assert_close(model(X), merge(model)(X))


def test_factors_of_a_bfloat16_base_are_float32_and_its_mesh_axes_are_carried():
    metadata = {"kernel_metadata": {"out_sharding": ("fsdp", "tensor")}}
    with jax.set_mesh(jax.make_mesh((1, 1), ("fsdp", "tensor"))):
        model, _ = build(Row(linear(param_dtype=jnp.bfloat16, **metadata)))
    assert model.layer.lora_a.get_value().dtype == jnp.float32
    names = [model.layer.lora_a.get_metadata(), model.layer.lora_b.get_metadata()]
    found = [
        next(tuple(m[k]) for k in ("out_sharding", "sharding_names", "sharding") if m.get(k)) for m in names
    ]
    assert found == [("fsdp", None), (None, "tensor")]


def test_an_abstract_model_gets_adapters():
    model = nnx.eval_shape(lambda: One(nnx.Linear(8, 6, rngs=nnx.Rngs(0))))
    specs = apply_lora_plus(model, LoRAPlusConfig(target_modules=["layer"], rank=2), rngs=nnx.Rngs(1))
    assert specs["layer"].shape == (8, 6)
    assert lora_tree(model)["layer"]["lora_a"].shape == (8, 2)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.emb, self.head = nnx.Embed(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.head.kernel = self.emb.embedding


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        (lambda r: One(nnx.Linear(8, 6, rngs=r)), {"target_modules": ["layr"]}, ("layr", "layer")),
        (
            lambda r: One(nnx.Linear(8, 6, rngs=r)),
            {"target_modules": ["layer"], "rank": 7},
            ("rank", 6, "layer"),
        ),
        (
            lambda r: One(nnx.Einsum("bd,bd->b", (2, 8), rngs=r)),
            {"target_modules": ["layer"]},
            ("layer", "bd,bd->b"),
        ),
        (Tied, {"target_modules": ["head"]}, ("emb/embedding", "head/kernel")),
        (lambda r: One(Bare(r)), {"target_modules": ["layer"]}, ("layer", "Bare", "wq", "target_parameters")),
        (lambda r: One(Bare(r)), {"target_parameters": {".*wq": "ioo"}}, ("layer/wq", "ioo", 2)),
    ],
)
def test_a_model_that_cannot_be_adapted_is_named_and_stays_as_it_is(model, config, words):
    model = model(nnx.Rngs(0))
    before = nnx.graphdef(model)
    with pytest.raises(ValueError, match=mentions(*words)):
        apply_lora_plus(model, LoRAPlusConfig(**{"rank": 2} | config), rngs=nnx.Rngs(1))
    assert nnx.graphdef(model) == before


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


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (lambda r: Jitted(8, 6, rngs=r), {}),
        (lambda r: JaxJitted(8, 6, rngs=r), {}),
        (PartlyJitted, {"layer/w": "io"}),
    ],
)
def test_methods_under_jit_use_their_adapters(make, parameters):
    model, _ = build(Row(make, rule=() if parameters else ("layer",), parameters=parameters))
    randomise(model)
    assert_close(model(X), merge(model)(X))
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda m: jnp.sum(jnp.square(m(X))), argnums=wrt)(model)
    assert all(np.any(g) for g in jax.tree.leaves(grads))


class Applies(nnx.Linear):
    def __call__(self, x, act):
        return act(super().__call__(x))


def test_an_argument_may_close_over_a_traced_value():
    model, _ = build(Row(lambda r: Applies(8, 6, rngs=r)))
    randomise(model)
    run = nnx.jit(lambda net, t: net(X, lambda y: y * t))
    for t in (2.0, 3.0):
        assert_close(run(model, t), merge(model)(X, lambda y, t=t: y * t))


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


def test_fields_and_arguments_need_not_be_hashable():
    model, _ = build(Row(Configured, rule=(), parameters={"layer/w": "io"}))
    randomise(model)
    assert_close(model(X, {"scale": 0.5}), merge(model)(X, {"scale": 0.5}))
    assert_close(nnx.jit(lambda m: m(X, {"scale": 0.5}))(model), merge(model)(X, {"scale": 0.5}))


def test_integer_inputs_do_not_round_the_factors():
    class Counts(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 8)))

        def __call__(self, x):
            numbers = (((2,), (0,)), ((), ()))
            return jax.lax.dot_general(x, self.w[...], numbers, preferred_element_type=jnp.float32)

    model, _ = build(Row(Counts, rule=(), parameters={"layer/w": "io"}))
    randomise(model)
    x = jnp.arange(80, dtype=jnp.int8).reshape(2, 5, 8)
    assert_close(model(x), merge(model)(x))


class Mixed(nnx.Module):
    """A layer and a parameter in each of three stacked modules."""

    def __init__(self, rngs):
        self.fc, self.w = nnx.Linear(8, 8, rngs=rngs), nnx.Param(jax.random.normal(rngs.params(), (8, 8)))

    def __call__(self, x):
        return jnp.tanh(self.fc(x) @ self.w[...])


def test_dropout_is_made_for_layers_alone():
    stack = nnx.split_rngs(splits=3)(nnx.vmap(Mixed, in_axes=(0,), out_axes=0))(nnx.Rngs(0))
    config = LoRAPlusConfig(target_modules=["fc"], target_parameters={"w": "bio"}, rank=1, dropout=0.5)
    apply_lora_plus(stack, config, rngs=nnx.Rngs(1))
    run = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    assert run(stack, X).shape == X.shape


class Homemade(nnx.Linear):
    """A user's own LoRA layer."""

    def __init__(self, *sizes, rngs):
        super().__init__(*sizes, rngs=rngs)
        self.lora_a, self.lora_b = nnx.Param(jnp.ones((8, 1))), nnx.Param(jnp.ones((1, 6)))


class Lazy(nnx.Linear):
    def __call__(self, x):
        self.made = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        return self.made(super().__call__(x))


def test_a_module_that_a_call_makes_is_named():
    model, _ = build(Row(lambda r: Lazy(8, 6, rngs=r)))
    with pytest.raises(ValueError, match=mentions("Lazy", "__init__")):
        model(X)


@pytest.mark.parametrize(
    ("make", "rngs", "options", "words"),
    [
        (lambda r: Homemade(8, 6, rngs=r), nnx.Rngs(1), {}, ("Homemade", "'lora_a'", "exclude_modules")),
        (
            lambda r: nnx.LoRALinear(8, 6, lora_rank=2, rngs=r),
            nnx.Rngs(1),
            {},
            ("'layer/lora/lora_a'", "specs_of"),
        ),
        (lambda r: nnx.Linear(8, 6, rngs=r), nnx.Rngs(params=1), {}, ("rngs", "'dropout'", "params")),
        (
            lambda r: nnx.Linear(8, 6, rngs=r),
            nnx.Rngs(1),
            {"stacked": {"layer": 0}},
            ("stacked", "(0,)", "layer"),
        ),
        (
            lambda r: nnx.Linear(8, 6, rngs=r),
            nnx.Rngs(1),
            {"stacked": {"layer": (0,)}},
            ("stacked", "(8, 6)", "(6,)"),
        ),
        (lambda r: nnx.Linear(8, 6, rngs=r), jax.random.key(0), {}, ("rngs", "Rngs")),
    ],
)
def test_what_cannot_be_adapted_leaves_the_model_as_it_is(make, rngs, options, words):
    model = One(make(nnx.Rngs(0)))
    before = nnx.graphdef(model)
    config = LoRAPlusConfig(target_modules=["layer"], rank=1, dropout=0.1)
    with pytest.raises((ValueError, TypeError), match=mentions(*words)):
        apply_lora_plus(model, config, rngs=rngs, **options)
    assert nnx.graphdef(model) == before


def test_a_second_adapter_is_rejected():
    model, _ = build(ROWS["linear"])
    with pytest.raises(ValueError, match="layer"):
        apply_lora_plus(model, LoRAPlusConfig(target_modules=["layer"], rank=2), rngs=nnx.Rngs(1))
