"""A batch with another adapter in each row against a call of each adapter by itself."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, disabled, init_lora
from loraplus_jax import nnx as loraplus_nnx
from loraplus_jax.adapter import AdapterSpec, apply_rows, put_adapter, select_adapters, stack_adapters
from loraplus_jax.interop import Adapter
from loraplus_jax.linen import quantize_base
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama

from ..marks import slow
from ..messages import mentions

ROWS = np.array([0, 3, 1, 4, 2, 2, 0, 1])  # slot 4 is empty
IDS = np.random.default_rng(0).integers(1, 13, (8, 6)).astype(np.int32)


class Mixed(nn.Module):
    """Layers of several kinds; the rows are not the leading axis of the last one's inputs."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(13, 16, name="emb")(ids)
        x = x + nn.MultiHeadDotProductAttention(2, name="att")(x)
        x = x + nn.Conv(16, (3,), name="conv")(x)
        gate = self.param("gate", nn.initializers.normal(0.3), (16, 16))
        x = jnp.tanh(x @ gate)
        return nn.Dense(5, name="head")(x.swapaxes(0, 1)).swapaxes(0, 1)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.emb = nnx.Embed(13, 16, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 16, rngs=rngs)
        self.head = nnx.Einsum("btd,df->btf", (16, 5), (5,), rngs=rngs)

    def __call__(self, ids):
        x = self.emb(ids)
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.head(x.swapaxes(0, 1)).swapaxes(0, 1)


def configs(first, second, third, **parameters):
    """Adapters of other ranks, scales and targets."""
    return [
        LoRAPlusConfig(target_modules=first, rank=2, alpha=3.0),
        LoRAPlusConfig(target_modules=second, rank=4, alpha=16.0, rank_pattern={second[0]: 1}),
        LoRAPlusConfig(
            target_modules=third, target_parameters=parameters, rank=3, alpha=8.0, use_rslora=True
        ),
        LoRAPlusConfig(target_modules=[*first, *third], rank=1, alpha=0.5),
    ]


CONFIGS = configs(["emb", "query"], ["conv", "att/out"], ["head"], gate="io")
CONFIGS[3] = dataclasses.replace(CONFIGS[3], variant="dora")


def randomised(lora, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.3, lora)


def make_adapters(model, base, all_configs):
    adapters = []
    for seed, config in enumerate(all_configs):
        lora, specs = init_lora(apply_lora_plus(model, config), jax.random.key(0), IDS, base=base)
        adapters.append(Adapter(randomised(lora, seed), specs, config, {}))
    return adapters


@pytest.fixture(scope="module")
def mixed():
    model = Mixed()
    base = jax.jit(model.init)(jax.random.key(1), IDS)
    return model, base, make_adapters(model, base, CONFIGS)


@functools.cache
def alone(config):
    return jax.jit(apply_lora_plus(Mixed(), config).apply)


def by_themselves(base, adapters):
    """The rows of a batch, each by a call with its adapter alone."""
    off = adapters[0]._replace(lora=disabled(adapters[0].lora), extras={})
    outputs = []
    for adapter in (*adapters, off):
        variables = {**base, **adapter.extras, "lora": adapter.lora}
        outputs.append(np.asarray(alone(adapter.config)(variables, IDS)))
    return np.stack([outputs[slot][row] for row, slot in enumerate(ROWS)])


def mixed_batch(model, stack):
    wrapped = apply_lora_plus(model, stack.config)
    return jax.jit(
        lambda base, stack, index, ids: apply_rows(wrapped.apply, base, select_adapters(stack, index), ids)
    )


class Stacked(nn.Module):
    """Two layers whose kernels are stacked along an axis."""

    axis: int

    @nn.compact
    def __call__(self, x):
        block = nn.scan(Square, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=2)
        return block(name="blocks")(x, None)[0]


class Square(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(7, use_bias=False, name="up")(x), None


@pytest.mark.parametrize(
    ("axis", "a", "b"),
    [
        (0, (2, 5, 7, 3), (2, 5, 3, 7)),
        slow(2, (5, 7, 3, 2), (5, 3, 7, 2)),
    ],
)
def test_layers_stacked_along_any_axis(axis, a, b):
    """The slots come first, except that layers come before them where nn.scan slices the first axis."""
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(2, 7, 7)), rng.normal(size=(8, 7))
    fields = {"leaf": "params/blocks/up/kernel", "kind": "dense", "axes": "io", "stacked": (axis,)}
    adapters, weights = [], []
    for rank, scale in ((2, 0.5), (1, 3.0), (3, 0.25), (2, 1.5)):
        shape = np.moveaxis(kernel, 0, axis).shape
        spec = AdapterSpec(shape=shape, rank=rank, scale=scale, **fields)
        factors = [rng.normal(size=(2, *size)) for size in ((7, rank), (rank, 7))]
        weights.append(kernel + scale * factors[0] @ factors[1])
        pair = [jnp.asarray(np.moveaxis(factor, 0, axis), jnp.float32) for factor in factors]
        lora = {"blocks": {"up": dict(zip(("lora_a", "lora_b"), pair, strict=True))}}
        adapters.append(Adapter(lora, {"blocks/up": spec}, None, {}))
    stack = put_adapter(stack_adapters([adapters[0], None, *adapters[2:]], slots=5), 1, adapters[1])
    assert (stack.slots, *(stack.values[f"lora/blocks/up/lora_{side}"].shape for side in "ab")) == (5, a, b)
    base = {"params": {"blocks": {"up": {"kernel": jnp.asarray(np.moveaxis(kernel, 0, axis), jnp.float32)}}}}
    found = mixed_batch(Stacked(axis), stack)(base, stack, ROWS, jnp.asarray(x, jnp.float32))
    weights.append(kernel)  # the empty slot
    expected = [x[row] @ weights[slot][0] @ weights[slot][1] for row, slot in enumerate(ROWS)]
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_of_nnx_too():
    model = NNXModel(nnx.Rngs(0))
    base = loraplus_nnx.base_variables(model)
    run = nnx.jit(lambda model: model(IDS))
    adapters, outputs = [], [run(model)]
    for seed, config in reversed([*enumerate(configs(["up"], ["down", "head"], ["emb"]))]):
        own = nnx.clone(model)
        specs = loraplus_nnx.apply_lora_plus(own, config, rngs=nnx.Rngs(1))
        lora = randomised(loraplus_nnx.lora_tree(own), seed)
        loraplus_nnx.set_lora(own, lora)
        adapters.insert(0, Adapter(lora, specs, config, {}))
        outputs.insert(0, run(own))
    stack = stack_adapters(adapters, slots=5)
    loraplus_nnx.apply_lora_plus(model, stack.config, rngs=nnx.Rngs(1))
    apply = loraplus_nnx.functional(model)
    run = jax.jit(lambda stack, index: apply_rows(apply, base, select_adapters(stack, index), IDS))
    expected = np.stack([outputs[slot][row] for row, slot in enumerate(ROWS)])
    np.testing.assert_allclose(run(stack, ROWS), expected, atol=1e-5)


@pytest.mark.slow
def test_fully_trained_parameters_are_those_of_the_row(mixed):
    model, base, adapters = mixed
    heads = [
        {"kernel": np.full((16, 5), 0.1 * n, np.float32), "bias": np.arange(5, dtype=np.float32)}
        for n in (1, 2)
    ]
    own = [adapters[0]._replace(extras={"params": {"head": head}}) for head in heads]
    adapters = [*own, adapters[0], adapters[1]]
    with pytest.raises(ValueError, match=mentions("adapters[2]", "params/head/bias", "base")):
        stack_adapters(adapters, slots=5)
    other = {"params": {"head": {"bias": np.zeros(4)}}}
    with pytest.raises(ValueError, match=mentions("base", "params/head/bias", "(5,)", "(4,)")):
        stack_adapters(adapters, slots=5, base=other)
    # Without the base an empty slot has no head, and no answer.
    empty = stack_adapters(own, slots=5)
    for one in (empty, put_adapter(empty, 3, own[0]), put_adapter(put_adapter(empty, 3, own[0]), 3, None)):
        assert np.isnan(one.values["params/head/bias"][4]).all()
    stack = stack_adapters(adapters, slots=5, base=base)
    found = mixed_batch(model, stack)(base, stack, ROWS, IDS)
    extras = [{"params": base["params"] | {"head": head}} for head in heads] + [base, base]
    full = [adapter._replace(extras=values) for adapter, values in zip(adapters, extras, strict=True)]
    np.testing.assert_allclose(found, by_themselves(base, full), atol=1e-5)


@pytest.mark.slow
def test_each_row_has_the_outputs_of_its_adapter_and_changing_a_slot_recompiles_nothing(mixed):
    model, base, adapters = mixed
    packed = {path: spec for path, spec in adapters[0].specs.items() if path == "att/query"}
    base = quantize_base(base, "nf4", packed)
    room = stack_adapters(adapters).specs
    stack = stack_adapters(adapters[:2], slots=5, room=room)
    run = mixed_batch(model, stack)
    expected = by_themselves(base, adapters)
    run(base, stack, ROWS, IDS)
    stack = put_adapter(put_adapter(stack, np.int64(3), adapters[3]), 2, adapters[0])
    wrong = run(base, stack, ROWS, IDS)
    stack = put_adapter(put_adapter(stack, 2, adapters[2]), 4, adapters[1])
    found = run(base, put_adapter(stack, 4, None), ROWS, IDS)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
    assert not np.allclose(wrong[4], expected[4], atol=1e-3)
    run(base, stack, ROWS[::-1], IDS)
    assert run._cache_size() == 1


@pytest.mark.slow
def test_a_mixed_batch_has_the_flops_of_one_adapter():
    config = LlamaConfig(
        vocab_size=13,
        num_hidden_layers=2,
        max_position_embeddings=16,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    model = Llama(config, unroll=True)  # a loop's body is counted once
    base = jax.eval_shape(model.init, jax.random.key(0), IDS)
    adapters = make_adapters(model, None, [LoRAPlusConfig(target_modules=["q_proj", "v_proj"], rank=2)] * 4)
    one, stack = adapters[0], stack_adapters(adapters)
    wrapped = apply_lora_plus(model, one.config)
    single = jax.jit(lambda base, lora, ids: wrapped.apply({**base, "lora": lora}, ids))
    programs = [
        single.lower(base, one.lora, IDS),
        mixed_batch(model, stack).lower(base, stack, ROWS % 4, IDS),
    ]
    flops = [program.compile().cost_analysis()["flops"] for program in programs]
    assert flops[1] <= 1.05 * flops[0]


@pytest.mark.slow
def test_rows_may_be_several_for_one_adapter_and_other_axes(mixed):
    model, base, adapters = mixed
    stack = stack_adapters(adapters, slots=5)
    wrapped = apply_lora_plus(model, stack.config)

    def turned(variables, ids):
        return wrapped.apply(variables, ids.T).swapaxes(0, 1)

    @jax.jit
    def run(stack, base, ids):
        own, each = (select_adapters(stack, index) for index in (ROWS[:4], np.repeat(ROWS[:4], 2)))
        first = apply_rows(wrapped.apply, base, own, ids)  # two rows for each adapter
        third = apply_rows(turned, base, own, ids.T, in_axes=(1,), out_axes=1)
        return first, apply_rows(wrapped.apply, base, each, ids), third.swapaxes(0, 1)

    first, second, third = run(stack, base, IDS)
    np.testing.assert_allclose(first, second, atol=1e-5)
    np.testing.assert_allclose(third, first, atol=1e-5)


@pytest.mark.slow
def test_what_does_not_fit_is_an_error(mixed):
    model, base, adapters = mixed
    stack = stack_adapters(adapters[:1], slots=2)
    own = select_adapters(stack, ROWS[:1])
    apply = apply_lora_plus(model, stack.config).apply
    cases = [
        (lambda: stack_adapters([]), ("slots", 0)),
        (lambda: stack_adapters([None]), ("adapter", "room")),
        (lambda: stack_adapters(adapters, slots=3), ("slots", 4, 3)),
        (lambda: put_adapter(stack, 2, None), ("slot", 1, 2)),
        (lambda: put_adapter(stack, 0, adapters[1]), ("att/out", "room")),
        (lambda: select_adapters(stack, np.array([0, 2])), ("index", 1, 2)),
        (lambda: select_adapters(stack, np.array([0.0])), ("index", "integers")),
        (
            lambda: apply_rows(apply, base, select_adapters(stack, np.array([0, 1, 0])), IDS),
            ("args[0]", 3, "(8, 6)"),
        ),
        (lambda: apply_rows(apply, base, own, IDS, IDS[:4] * 0 + 1), ("args[1]", "(4, 6)")),
        (lambda: apply_rows(apply, base, own, IDS, segment_ids=IDS[:4]), ("kwargs['segment_ids']", "(4, 6)")),
        (lambda: apply_rows(apply, base, own, IDS, mutable=["cache"]), ("mutable",)),
        (lambda: apply_rows(apply, base, own, IDS, in_axes=(0, 0)), ("in_axes", 1, 2)),
        (lambda: apply_rows(apply, base, own), ("rows",)),
        (lambda: apply_rows(lambda v, x: apply(v, x).mean(0), base, own, IDS), ("out_axes", "(6, 5)")),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=mentions(*words)):
            call()
    with pytest.raises(TypeError, match=mentions("slot", "integer", "True")):
        put_adapter(stack, True, None)
    large = dataclasses.replace(adapters[0].config, rank=5)
    (other,) = make_adapters(model, base, [large])
    with pytest.raises(ValueError, match=mentions("rank", 2, 5, "query")):
        put_adapter(stack, 0, other)
    values = select_adapters(stack, ROWS[:1]).values
    traced = jax.jit(select_adapters)(stack, np.array([2]))
    assert all(np.all(np.isnan(traced.values[path])) for path in values)
    spec = next(iter(adapters[0].specs.values()))
    moved = adapters[0]._replace(specs={"other": spec, **adapters[0].specs})
    with pytest.raises(ValueError, match=mentions(spec.leaf, "other")):
        stack_adapters([moved])
    turned = adapters[0]._replace(
        specs={next(iter(adapters[0].specs)): dataclasses.replace(spec, axes="oii")}
    )
    with pytest.raises(ValueError, match=mentions("axes", "ioo", "oii")):
        stack_adapters([adapters[0], turned])
