"""B learns lambda times faster than A, exactly: at every step, under any optimizer, however many adapters."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from loraplus_jax import LoRAPlusConfig, lora_plus, lora_plus_adamw
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.tree import leaves_by_path
from loraplus_jax.optim.adalora import adalora
from loraplus_jax.optim.diagnostics import describe, probe
from loraplus_jax.optim.keep_float32 import keep_float32
from loraplus_jax.optim.roles import lr_ratio_of

from ..marks import slow
from ..messages import mentions
from ..refusals import refusals
from .toy import ONES, PARAMS, SCHEDULES, gradients, leaves, run

inject = optax.inject_hyperparams


@pytest.mark.slow
def test_b_is_scaled_once_however_many_adapters_there_are():
    one = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}
    params = {"lora": {f"layer_{n}": one for n in range(24)}}
    tx = lora_plus(optax.sgd(1e-3), lr_ratio=16.0)
    updates, _ = tx.update(params, tx.init(params), params)
    assert len(updates["lora"]) == 24
    for pair in updates["lora"].values():
        np.testing.assert_allclose(pair["lora_a"], np.full((2, 1), -1e-3), rtol=1e-5)
        np.testing.assert_allclose(pair["lora_b"], np.full((1, 2), -16e-3), rtol=1e-5)


def test_lambda_one_is_bitwise_plain_adamw():
    rate = SCHEDULES["warm-up and cosine"]
    adamw = optax.adamw(rate, weight_decay=0.1)
    built = run(lora_plus_adamw(rate, lr_ratio=1.0, weight_decay=0.1, max_grad_norm=1.0), 10)
    plain = run(optax.chain(optax.clip_by_global_norm(1.0), adamw), 10)
    jax.tree.map(np.testing.assert_array_equal, run(lora_plus(adamw, lr_ratio=1.0), 10), run(adamw, 10))
    jax.tree.map(np.testing.assert_array_equal, built, plain)


def test_the_wrapper_equals_the_builder_with_decay_and_clipping():
    rate = SCHEDULES["cosine with a floor"]
    adam = {"b1": 0.8, "b2": 0.95, "eps": 1e-2, "weight_decay": 0.1}
    built = lora_plus_adamw(rate, lr_ratio=4.0, max_grad_norm=1.0, **adam)
    wrapped = lora_plus(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, **adam)), lr_ratio=4.0)
    got, expected = run(built, 20), run(wrapped, 20)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, expected)
    still = run(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, **adam)), 20)
    assert (abs(leaves(got[-1][0])[1] - leaves(still[-1][0])[1]) > 1e-2).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [optax.lion(0.01), optax.adafactor(0.01), optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01))],
    ids=["lion", "adafactor", "clipped adam"],
)
def test_any_optimizer_scales_only_b(tx):
    # The same parameters at every step: what differs is the update alone.
    plain, plus = (jax.jit(t.update) for t in (tx, lora_plus(tx, lr_ratio=16.0)))
    state, other = tx.init(PARAMS), lora_plus(tx, lr_ratio=16.0).init(PARAMS)
    for step in range(3):
        expected, state = plain(gradients(step), state, PARAMS)
        got, other = plus(gradients(step), other, PARAMS)
        for ratio, ours, theirs in zip((1, 16, 1), leaves(got), leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, ratio * theirs)


def train_product(tx, scale, size=1.0, seed=0):
    """s A B after 100 steps of a regression in float64, from B = 0 and A `size` times as large."""
    random = np.random.default_rng(seed)
    w, a, x, y = (jnp.asarray(random.normal(size=n)) for n in ((6, 5), (6, 2), (32, 6), (32, 5)))

    def loss(p):
        return jnp.mean((x @ (w + scale * p["lora_a"] @ p["lora_b"]) - y) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"lora_a": size * a, "lora_b": jnp.zeros((2, 5))}
    assert params["lora_b"].dtype == jnp.float64
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=100)
    return scale * params["lora_a"] @ params["lora_b"]


def test_lora_plus_is_lora_with_alpha_times_lambda_under_adam_without_eps():
    # With B0 = 0, no decay and no clipping: B = lambda B' for the plain run's B'.
    ratio = 16.0
    with jax.enable_x64(True):
        plus = train_product(lora_plus_adamw(1e-3, lr_ratio=ratio, eps=1e-30), 1.0)
        plain = train_product(optax.adam(1e-3, eps=1e-30), ratio)
        decayed = train_product(lora_plus_adamw(1e-3, lr_ratio=ratio, eps=1e-30, weight_decay=1.0), 1.0)
        same = train_product(optax.adamw(1e-3, eps=1e-30, weight_decay=1.0), ratio)
        size = abs(plain).max()
        assert size > 0.1
        assert abs(plus - plain).max() / size < 1e-9
        assert abs(decayed - same).max() / size > 1e-3


ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


ROWS = jnp.ones((3, 4))
FACTORS = {"lora_a": jnp.ones((3, 4, 2)), "lora_b": jnp.ones((3, 2, 4)), "lora_magnitude": ROWS}
LAYERS = {
    "lora": {"q": FACTORS},
    "params": {"norm": {"scale": ROWS, "bias": ROWS}, "head": {"kernel": jnp.ones((4, 2))}},
}
KEPT = ("norm", "magnitude")
"""Leaves, of stacked layers too, that `"kernels"` leaves out."""


def is_decayed(tree):
    text = jax.tree_util.keystr
    return jax.tree.map_with_path(lambda path, _: not any(x in text(path) for x in KEPT), tree)


def is_matrix(tree):
    kept = lambda path, x: x.ndim > 1 and not any(name in "/".join(path) for name in KEPT)  # noqa: E731
    return traverse_util.path_aware_map(kept, tree)


@pytest.mark.parametrize(
    ("mask", "decay"),
    [slow("kernels", "coupled"), slow(is_decayed, "equal"), (is_matrix, "coupled")],
)
def test_a_mask_says_which_leaves_decay_and_the_table_shows_it(mask, decay):
    tx = lora_plus_adamw(0.1, lr_ratio=4.0, weight_decay=0.5, decay=decay, decay_mask=mask)
    state = tx.init(LAYERS)
    found, state = tx.update(jax.tree.map(jnp.zeros_like, LAYERS), state, LAYERS)
    for table in (describe(LAYERS, tx), describe(LAYERS, state), describe(LAYERS, optax.chain(tx))):
        for row in table.rows:
            none = any(name in row.path for name in KEPT)
            assert row.decay == (0 if none else 0.125 if (decay, row.role) == ("equal", "b") else 0.5)
            # With no gradient a step is -rate * decay * parameter alone.
            step = -leaves_by_path(found)[row.path]
            np.testing.assert_allclose(step, np.full(row.shape, row.rate * row.decay), rtol=1e-6)


@pytest.mark.slow
def test_a_mask_may_be_a_prefix_and_decay_may_change_in_a_run():
    prefix = {"lora": True, "params": {"norm": False, "head": True}}
    fields = {"lr_ratio": 4.0, "weight_decay": 0.5, "decay_mask": lambda _: prefix}
    tx = inject(lora_plus_adamw, static_args="decay_mask")(0.1, **fields)
    state = optax.tree.set(tx.init(LAYERS), weight_decay=jnp.float32(0.25))
    _, state = tx.update(LAYERS, state, LAYERS)
    decays = {row.path: row.decay for row in describe(LAYERS, state).rows}
    assert decays["params/norm/bias"] == 0
    assert decays["params/head/kernel"] == decays["lora/q/lora_magnitude"] == 0.25


def test_the_least_epsilon_leaves_parameters_without_gradient_unchanged():
    tx = lora_plus_adamw(0.1, 4.0, eps=1e-30, b1=1 - 1e-7)
    updates = leaves(run(tx, 1, grads=lambda _: ZEROS)[0][1])
    assert all((x == 0).all() for x in updates)


NUMBERS = {
    "lr_ratio": lambda v: lora_plus_adamw(1e-3, lr_ratio=v),
    "lr_ratio of lora_plus": lambda v: lora_plus(optax.sgd(1.0), lr_ratio=v),
    "learning_rate": lambda v: lora_plus_adamw(v, 4.0),
    "max_grad_norm": lambda v: lora_plus_adamw(1e-3, 4.0, max_grad_norm=v),
    "head_learning_rate": lambda v: lora_plus_adamw(1e-3, 4.0, head_learning_rate=v),
    "embedding_learning_rate": lambda v: lora_plus_adamw(1e-3, 4.0, embedding_learning_rate=v),
}
REQUIRED = list(NUMBERS)[:3]  # the others may be None


def given(names, *values):
    """A row for each of these numbers and values."""
    for name, value in itertools.product(names, values):
        yield functools.partial(NUMBERS[name], value), name.split()[0], 0, repr(value)


test_bad_numbers = refusals(*given(NUMBERS, 0.0, -1.0, math.nan, math.inf), error=ValueError)
test_what_is_no_number = refusals(*given(NUMBERS, "x"), *given(REQUIRED, None), error=TypeError)


EXTRAS = {
    "params": {
        "head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "gain": jnp.ones(3)},
        "layer_norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
        "rms_norm": {"scale": jnp.ones(3)},
    }
}


def first_updates(tx, params):
    """The first update of every leaf where all gradients are one, by its last two segments."""
    found, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    return {"/".join(p.split("/")[-2:]): float(jnp.ravel(x)[0]) for p, x in leaves_by_path(found).items()}


def test_the_policy_of_peft_by_hand():
    params = {"lora": {"q": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))}}, **EXTRAS}
    tx = lora_plus_adamw(0.1, lr_ratio=4.0, weight_decay=0.5, policy="peft", eps=1e-30)
    # rate (1 + decay): A and matrices 0.1, B and vectors 0.4; no decay of biases and LayerNorms, RMSNorms have it.
    calm, fast = ("q/lora_a", "head/kernel"), ("q/lora_b", "head/gain", "rms_norm/scale")
    undecayed = ("head/bias", "layer_norm/scale", "layer_norm/bias")
    expected = dict.fromkeys(calm, -0.15) | dict.fromkeys(fast, -0.6) | dict.fromkeys(undecayed, -0.4)
    assert first_updates(tx, params) == pytest.approx(expected, rel=1e-5)
    plain = lora_plus_adamw(0.1, lr_ratio=4.0, weight_decay=0.5, eps=1e-30)
    expected |= dict.fromkeys((*fast[1:], *undecayed), -0.15)
    assert first_updates(plain, params) == pytest.approx(expected, rel=1e-5)
    wrapped = lora_plus(optax.adamw(0.1, eps=0.0, weight_decay=0.0), lr_ratio=4.0, policy="peft")
    expected = dict.fromkeys(calm, -0.1) | dict.fromkeys((*fast, *undecayed), -0.4)
    assert first_updates(wrapped, params) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_policy_of_peft_in_stacked_layers():
    """Stacked layers move as the same layers apart: their vectors at B's rate, with PEFT's decay."""
    layer = {"norm": {"scale": (3,), "bias": (3,)}, "rms": {"scale": (4,)}}
    layer["fc"] = {"kernel": (3, 4), "bias": (4,)}
    random = np.random.default_rng(0)

    def draw():
        stacked = lambda shape: jnp.asarray(random.normal(size=(2, *shape)), jnp.float32)  # noqa: E731
        return jax.tree.map(stacked, layer, is_leaf=lambda x: isinstance(x, tuple))

    def apart(tree):
        return [jax.tree.map(lambda x, n=n: x[n], tree) for n in range(2)]

    start, grads = draw(), [draw() for _ in range(4)]
    for tx in (
        lora_plus_adamw(0.01, lr_ratio=8.0, weight_decay=0.5, policy="peft"),
        lora_plus(optax.adam(0.01), lr_ratio=8.0, policy="peft"),
    ):
        stacked = run(tx, 4, start, grads.__getitem__)[-1][0]
        single = run(tx, 4, apart(start), lambda step: apart(grads[step]))[-1][0]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), apart(stacked), single)


EMBEDDED = {"lora": {"e": {"lora_embedding_a": jnp.ones((3, 2)), "lora_embedding_b": jnp.ones((2, 3))}}}
EMBEDDING = AdapterSpec(leaf="params/e/embedding", kind="embed", axes="io", shape=(3, 3), rank=2, scale=1.0)


OWN_RATE = {"embedding_learning_rate": 0.3}


@pytest.mark.parametrize("specs", [None, {"e": EMBEDDING}], ids=["by name", "by specs"])
@pytest.mark.parametrize(
    ("fields", "rate"),
    [({}, 0.1), ({"policy": "peft"}, 1e-6), (OWN_RATE | {"policy": "peft"}, 0.3), (OWN_RATE, 0.3)],
)
def test_adapters_of_embeddings_move_at_their_own_rate(specs, fields, rate):
    tx = lora_plus_adamw(0.1, lr_ratio=4.0, specs=specs, eps=1e-30, **fields)
    expected = {"e/lora_embedding_a": -rate, "e/lora_embedding_b": -rate}
    assert first_updates(tx, EMBEDDED) == pytest.approx(expected, rel=1e-4)


PAIR = {"q": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))}}


def test_rates_can_be_read_and_changed_in_a_run_without_compiling_again():
    adam = {"b1": 0.5, "b2": 0.5, "eps": 1e-30}
    tx = inject(lora_plus_adamw, static_args=(*adam,))(learning_rate=0.1, lr_ratio=4.0, **adam)
    state, update = tx.init(PAIR), jax.jit(tx.update)
    assert float(optax.tree.get(state, "learning_rate")) == pytest.approx(0.1)
    assert float(optax.tree.get(state, "lr_ratio")) == pytest.approx(4.0)
    seen, told = [], []
    for rate, ratio in ((0.1, 4.0), (0.1, 2.0), (0.3, 1.0)):
        state = optax.tree.set(state, learning_rate=jnp.float32(rate), lr_ratio=jnp.float32(ratio))
        found, state = update(jax.tree.map(jnp.ones_like, PAIR), state, PAIR)
        seen.append((-float(found["q"]["lora_a"][0, 0]), -float(found["q"]["lora_b"][0, 0])))
        told.append(tuple(row.rate for row in describe(PAIR, state).rows))
    expected = [(0.1, 0.4), (0.1, 0.2), (0.3, 0.3)]
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    np.testing.assert_allclose(told, expected, rtol=1e-5)
    assert update._cache_size() == 1


def test_a_step_may_donate_the_first_state():
    """No buffer is in it twice: tunix donates it, and a buffer can be donated once."""
    tx = optax.MultiSteps(inject(lora_plus_adamw)(learning_rate=0.1, lr_ratio=4.0), 2)
    arrays = [x for x in jax.tree.leaves(tx.init(PAIR)) if isinstance(x, jax.Array)]
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)


@pytest.mark.slow
def test_every_number_can_be_changed_in_a_run():
    params = {**PAIR, **EMBEDDED["lora"], "head": {"kernel": jnp.ones((3, 1))}}
    fields = {"weight_decay": 0.5, "head_learning_rate": 0.2, "embedding_learning_rate": 0.01}
    tx = inject(lora_plus_adamw)(optax.constant_schedule(0.1), lr_ratio=4.0, max_grad_norm=1.0, **fields)
    state, update = tx.init(params), jax.jit(tx.update)
    assert set(state.hyperparams) == {
        *fields,
        "learning_rate",
        "lr_ratio",
        "b1",
        "b2",
        "eps",
        "max_grad_norm",
    }
    zeros, seen = jax.tree.map(jnp.zeros_like, params), []
    # with no gradient a step is -rate * decay * parameter alone
    for changes in ({}, {"head_learning_rate": 0.4}, {"weight_decay": 1.0, "lr_ratio": 2.0}):
        state = optax.tree.set(state, **{name: jnp.float32(value) for name, value in changes.items()})
        found, state = update(zeros, state, params)
        seen.append([-float(x.ravel()[0]) for x in jax.tree.leaves(found)])
    expected = [  # embedding A, B, head, A, B
        [0.005, 0.005, 0.1, 0.05, 0.2],
        [0.005, 0.005, 0.2, 0.05, 0.2],
        [0.01, 0.01, 0.4, 0.1, 0.2],
    ]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    assert update._cache_size() == 1


def test_the_ratio_of_a_wrapped_optimizer_can_be_changed_in_a_run():
    plain, tx = lora_plus(optax.sgd(0.1), lr_ratio=4.0), inject(lora_plus)(optax.sgd(0.1), lr_ratio=4.0)
    state, update = tx.init(PAIR), jax.jit(tx.update)
    found, state = update(PAIR, state, PAIR)
    expected = plain.update(PAIR, plain.init(PAIR), PAIR)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    state = optax.tree.set(state, lr_ratio=jnp.float32(2.0))
    found, state = update(PAIR, state, PAIR)
    assert [float(x[0, 0]) for x in jax.tree.leaves(found)] == [pytest.approx(-0.1), pytest.approx(-0.2)]
    assert float(optax.tree.get(state, "lr_ratio")) == 2.0
    assert update._cache_size() == 1


@pytest.mark.slow
def test_an_injected_schedule_may_start_and_end_at_zero():
    schedule = optax.join_schedules([optax.linear_schedule(0, 0.1, 2), optax.linear_schedule(0.1, 0, 2)], [2])
    tx = inject(lora_plus_adamw)(schedule, lr_ratio=4.0, eps=1e-30, head_learning_rate=schedule)
    state, steps = tx.init(PAIR), []
    for _ in range(5):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, PAIR), state, PAIR)
        steps.append([-float(x[0, 0]) for x in jax.tree.leaves(updates)])
        ratio = lr_ratio_of(state)
        assert ratio == (pytest.approx(4.0) if steps[-1][0] else None)
    np.testing.assert_allclose(steps, [[n, 4 * n] for n in (0, 0.05, 0.1, 0.05, 0)], rtol=1e-5)


adamw, sgd = functools.partial(lora_plus_adamw, 1e-3, 4.0), functools.partial(lora_plus, optax.sgd(0.1))
CHAIN = optax.chain(sgd(8.0))

test_bad_settings_and_optimizers = refusals(
    (lambda: adamw(weight_decay=-0.1), "weight_decay", 0, -0.1),
    (lambda: adamw(weight_decay=math.nan), "weight_decay", 0, "nan"),
    (lambda: adamw(b1=1.0), "b1", 0, 1, 1.0),
    (lambda: adamw(decay="none"), "decay", "coupled", "equal", "'none'"),
    (lambda: adamw(decay_mask="all"), "decay_mask", "kernels", "'all'"),
    (lambda: adamw(policy="torch"), "policy", "lora_plus", "peft", "'torch'"),
    # B starts at zero, so A has no gradient in the first step, and 0 / (0 + 0) would be its direction.
    (lambda: adamw(eps=0.0), "eps", 1e-30, 0.0),
    (lambda: adamw(eps=9e-31), "eps", 1e-30, 9e-31),
    (lambda: adamw(eps=1e-60), "eps", 1e-30, 1e-60),
    (lambda: lora_plus_adamw(jnp.float32(-0.5), 4.0), "learning_rate", -0.5),
    (lambda: optax.flatten(adamw()).init(PAIR), "optax.flatten"),
    (lambda: lora_plus(optax.contrib.madgrad(0.1), 8.0).init(PARAMS), "lr_ratio", "label_params"),
    (lambda: lora_plus(optax.contrib.cocob(0.1), 8.0).init(PARAMS), "lr_ratio", "label_params"),
    (lambda: lora_plus(adamw(), 8.0).init(PARAMS), "lr_ratio", "twice"),
    (lambda: lora_plus(adamw(), 1.0).init(PARAMS), "lr_ratio", "twice"),
    (lambda: lora_plus(CHAIN, 8.0).init(PARAMS), "lr_ratio", "twice"),
    (lambda: lora_plus(CHAIN, 1.0).init(PARAMS), "lr_ratio", "twice"),
    error=ValueError,
)


SPECS = {"q": AdapterSpec(leaf="params/q/kernel", kind="dense", axes="io", shape=(2, 2), rank=1, scale=1.0)}
SWAPPED = {"lora": {"q": {"lora_a": jnp.ones((1, 2)), "lora_b": jnp.ones((2, 1))}}}

test_swapped_factors = refusals(
    (lambda: adamw(specs=SPECS).init(SWAPPED), "lora/q", "(1, 2)", "(2, 1)"),
    (lambda: sgd(4.0, specs=SPECS).init(SWAPPED), "lora/q", "(1, 2)", "(2, 1)"),
)


CONFIG = LoRAPlusConfig(target_modules=["q"])
PACKED = {**PAIR, "base": {"qvalue": jnp.zeros((4, 2), jnp.uint8)}}

test_configs_and_packed_integers = refusals(
    (lambda: lora_plus_adamw(0.1, lr_ratio=CONFIG), "pass config.lr_ratio"),
    (lambda: sgd(CONFIG), "pass config.lr_ratio"),
    (lambda: adamw().init(PACKED), "base/qvalue", "uint8"),
    (lambda: describe(PACKED, adamw()), "base/qvalue", "uint8"),
    (lambda: sgd(4.0).init(PACKED), "base/qvalue", "uint8"),
    (lambda: describe(PACKED, sgd(4.0)), "base/qvalue", "uint8"),
    error=TypeError,
)


WRAPPERS = {
    "keep_float32": keep_float32,
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "sam": lambda tx: optax.contrib.sam(tx, optax.sgd(0.0)),
    "mechanize": optax.contrib.mechanize,
    "lookahead": lambda tx: optax.lookahead(tx, 2, 0.5),
    "adalora": lambda tx: adalora(
        tx, optax.sgd(0.0), steps=9, target_rank=1, initial_steps=8, final_steps=0, orthogonality=0.0
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_ratio_belongs_inside_a_transform_that_keeps_parameters(name):
    """Constant gradients, so that B moves lambda times as far as by the plain optimizer, after every step."""
    wrap, ends = WRAPPERS[name], []
    start = optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS
    for tx in (wrap(optax.sgd(0.01)), wrap(lora_plus(optax.sgd(0.01), 8.0))):
        params, state, update = start, jax.jit(tx.init)(start), jax.jit(tx.update)
        for _ in range(6):
            updates, state = update(ONES, state, params)
            params = optax.apply_updates(params, updates)
        ends.append(leaves(params.fast if name == "lookahead" else params))
    if name not in ("mechanize", "adalora"):  # which adapt: one their rate, one Λ
        for plain, plus, first, ratio in zip(*ends, leaves(PARAMS), (1, 8, 1), strict=True):
            np.testing.assert_allclose(plus - first, ratio * (plain - first), rtol=1e-4)
    with pytest.raises(ValueError, match=mentions(name, "lora_plus")):
        lora_plus(optax.chain(wrap(optax.sgd(0.01))), 8.0).init(start)


@pytest.mark.slow
def test_rates_carry_over_between_starts_as_the_guide_says():
    # docs/choosing_lambda.md, "From one start to the other": c is the new A over the old.
    c, ratio = 6**-0.5, 4.0
    with jax.enable_x64(True):

        @functools.partial(jax.jit, static_argnames="decay")
        def train(size, rate, ratio, scale, **fields):
            tx = lora_plus_adamw(rate, ratio, **({"eps": 1e-30, "max_grad_norm": 1e9} | fields))
            return train_product(tx, scale, size, seed=1)

        def difference(new, old, **fields):
            start = train(1.0, 1e-3, ratio, 1.0, **old, **fields)
            found = train(c, c * 1e-3, *new[0], **new[1], **fields)
            return float(abs(found - start).max() / abs(start).max())

        same_ratio, same_alpha, same_b_rate = (ratio, c**-2), (ratio * c**-2, 1.0), (ratio / c, 1 / c)
        decay, clip = {"weight_decay": 1.0}, {"max_grad_norm": 0.1}
        decayed, clipped = {"weight_decay": 1 / c}, {"max_grad_norm": 0.1 / c}
        for row in (same_ratio, same_alpha, same_b_rate):
            assert difference((row, {}), {}) < 1e-9
            assert difference((row, decayed), decay, decay="equal") < 1e-9
        old, new = decay | clip | {"eps": 1e-3}, decayed | clipped | {"eps": 1e-3 / c}
        assert difference((same_ratio, new), old) < 1e-9
        for name in old:
            assert difference((same_ratio, new | {name: old[name]}), old) > 1e-4, name
        for old, new in ((decay, decayed), (clip, clipped)):
            assert difference((same_alpha, new), old) > 1e-3
        assert difference(((ratio, 1.0), {}), {}) > 0.1


@pytest.mark.parametrize("ratio", [3.0, 5.0, 10.0, 20.0])
def test_groups_of_other_rates_have_one_ratio(ratio):
    pair = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))}
    rates = {"e": 1e-4, "d": 3e-4}
    labels = lambda params: {"lora": {"e": "e", "d": "d"}}  # noqa: E731
    tx = optax.multi_transform({n: lora_plus_adamw(rate, ratio) for n, rate in rates.items()}, labels)
    assert lr_ratio_of(tx.init({"lora": {"e": pair, "d": pair}})) == ratio


TWICE = optax.chain(lora_plus_adamw(0.1, 8.0), lora_plus(optax.identity(), 1.0))
test_two_members_of_a_chain_do_not_update_one_leaf = refusals(
    *(
        (call, "lr_ratio", "twice", "optax.multi_transform")
        for call in (
            lambda: lr_ratio_of(TWICE.init(PARAMS)),
            lambda: describe(PARAMS, TWICE),
            lambda: describe(PARAMS, TWICE.init(PARAMS)),
            lambda: probe(TWICE, TWICE.init(PARAMS), PARAMS),
        )
    )
)


@pytest.mark.slow
def test_members_of_separate_leaves_are_one_optimizer():
    """By optax.masked, also below accumulation and a count of errors."""
    pair = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))}
    params = {"lora": {"e": pair, "d": pair}}
    only = lambda name: lambda tree: {"lora": {n: n == name for n in tree["lora"]}}  # noqa: E731
    injected = optax.inject_hyperparams(lora_plus)
    chain = optax.chain(
        *(optax.masked(injected(optax.sgd(0.1), lr_ratio=8.0), only(name)) for name in ("e", "d"))
    )
    for tx in (chain, optax.apply_if_finite(optax.MultiSteps(chain, 2).gradient_transformation(), 3)):
        state = tx.init(params)
        assert lr_ratio_of(state) == 8.0
        assert [row.rate for row in describe(params, state).rows] == [1.0, 8.0, 1.0, 8.0]
        assert float(probe(chain, chain.init(params), params)["b/a"]) == pytest.approx(8.0)
