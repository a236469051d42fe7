"""What is reported is what happens: the table of groups, the realised step, the norms by role."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax import describe, lora_plus, lora_plus_adamw, probe
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.tree import leaves_by_path
from loraplus_jax.optim.keep_float32 import keep_float32

from ..marks import slow
from ..messages import mentions
from ..refusals import refusals

TRAINABLE = {
    "lora": {"enc": {"q": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 5))}}},
    "params": {"head": {"bias": jnp.ones(4)}},
}
SPEC = AdapterSpec(leaf="params/enc/q/kernel", kind="dense", axes="io", shape=(3, 5), rank=2, scale=2.0)


def test_describe_in_full():
    tx = lora_plus_adamw(1e-3, lr_ratio=4.0, weight_decay=0.01, decay="equal")
    frozen = {"params": {"enc": {"q": {"kernel": jnp.ones((300, 5))}}}}
    assert str(describe(TRAINABLE, tx, {"enc/q": SPEC}, frozen=frozen)).splitlines() == [
        "path               shape  role   rank  rate   decay   count",
        "lora/enc/q/lora_a  3x2    a      2     0.001  0.01    6",
        "lora/enc/q/lora_b  2x5    b      2     0.004  0.0025  10",
        "params/head/bias   4      extra  -     0.001  0.01    4",
        "trainable 20 of 1,520 (1.32 %)",
    ]


def test_describe_without_the_frozen_part_and_from_shapes():
    shapes = jax.eval_shape(lambda: TRAINABLE)
    description = describe(shapes, lora_plus_adamw(1e-3, 4.0))
    assert (description.trainable, description.total, description.summary) == (20, None, "trainable 20")
    assert [row.count for row in description.rows] == [6, 10, 4]


@pytest.mark.parametrize(("step", "a", "b"), [(0, 0.0, 0.0), (5, 0.5, 2.0), (99, 1.0, 4.0)])
def test_schedules_are_read_at_the_step(step, a, b):
    tx = lora_plus_adamw(optax.linear_schedule(0.0, 1.0, 10), lr_ratio=4.0)
    rows = describe(TRAINABLE, tx, step=step).rows
    assert [row.rate for row in rows] == [a, b, a]


def test_a_wrapped_optimizer_shows_multiples():
    table = describe(TRAINABLE, lora_plus(optax.sgd(0.1), lr_ratio=4.0))
    assert [(row.rate, row.decay, row.relative) for row in table.rows] == [(n, None, True) for n in (1, 4, 1)]
    assert "4 x base" in str(table)
    # Its update needs the loss.
    plateau = lora_plus(optax.contrib.reduce_on_plateau(), lr_ratio=4.0)
    assert [row.rate for row in describe(TRAINABLE, plateau, step=7).rows] == [1, 4, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "wrap"), [(0, lambda tree: tree), (5, lambda tree: jax.eval_shape(lambda: tree))]
)
def test_describe_before_training(step, wrap):
    settings = {"learning_rate": optax.linear_schedule(0, 1.0, 10), "lr_ratio": 4.0, "weight_decay": 0.5}
    injected = optax.inject_hyperparams(lora_plus_adamw)(**settings)
    for tx in (injected, keep_float32(optax.chain(optax.identity(), lora_plus_adamw(**settings)))):
        rows = describe(wrap(TRAINABLE), tx, step=step).rows
        assert [row.rate for row in rows] == pytest.approx([step / 10 * n for n in (1, 4, 1)])
        assert {row.decay for row in rows} == {0.5}
    many = optax.MultiSteps(injected, 2)
    assert len(describe(TRAINABLE, many).rows) == 3
    for optimizer in (many, injected.init(TRAINABLE)):
        with pytest.raises(ValueError, match=mentions("step", 0, 7)):
            describe(TRAINABLE, optimizer, step=7)


test_describe_of_what_it_does_not_know = refusals(
    (lambda: describe(TRAINABLE, optax.chain(optax.adam(1e-3))), "lora_plus_adamw"),
    (lambda: describe(TRAINABLE, optax.adam(1e-3).init(TRAINABLE)), "lora_plus_adamw"),
    (lambda: describe(TRAINABLE, lora_plus_adamw(1e-3, 4.0).init(TRAINABLE["lora"])), "trainable variables"),
    error=TypeError,
)
test_describe_without_rates_by_step = refusals(
    (lambda: describe(TRAINABLE, lora_plus_adamw(lambda n: 1e-3 / int(n + 1), 4.0)), "traced", "state"),
    (
        lambda: describe(
            TRAINABLE, optax.chain(optax.contrib.reduce_on_plateau(), lora_plus_adamw(1e-3, 4.0)), step=7
        ),
        "value",
        "state",
    ),
)


def test_describe_beside_another_optimizer():
    parts = {"plus": lora_plus_adamw(1e-3, 4.0), "other": optax.adam(0.5)}
    labels = {"lora": "plus", "params": "other"}
    tx = optax.multi_transform(parts, labels)
    table = describe(TRAINABLE, tx.init(TRAINABLE))
    assert [row.role for row in table.rows] == ["a", "b", "extra"]
    assert [row.rate for row in table.rows] == [pytest.approx(1e-3), pytest.approx(4e-3), None]
    assert "params/head/bias   4      extra  -     -      -      4" in str(table)


# What is trained beside plain factors: an embedding's, a head, biases and norms.
EVERYTHING = {
    "lora": {
        "enc": {"q": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 5))}},
        "emb": {"lora_embedding_a": jnp.ones((7, 2)), "lora_embedding_b": jnp.ones((2, 3))},
    },
    "params": {
        "head": {"kernel": jnp.ones((5, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
        "rms": {"scale": jnp.ones(3)},
    },
}
SCHEDULE = {"learning_rate": optax.linear_schedule(0.1, 0.0, 10), "head_learning_rate": 0.02}
METHODS = {
    "plain": lambda **fields: lora_plus_adamw(**fields),
    "chain": lambda **fields: optax.chain(optax.identity(), lora_plus_adamw(**fields)),
    "inject": lambda **fields: optax.inject_hyperparams(lora_plus_adamw)(**fields),
    "lora": lambda **fields: lora_plus_adamw(**fields | {"lr_ratio": 1.0}),
}


@pytest.mark.parametrize(
    ("policy", "method", "rates"),
    [
        slow("lora_plus", "plain", {"decay": "equal"}),
        ("peft", "chain", SCHEDULE),
        slow("peft", "inject", {"embedding_learning_rate": 0.003}),
        slow("lora_plus", "lora", {"head_learning_rate": 0.02, "max_grad_norm": 1e9}),
    ],
)
def test_what_describe_says_is_what_a_step_does(policy, method, rates):
    params = EVERYTHING
    fields = {"learning_rate": 0.1, "lr_ratio": 4.0, "weight_decay": 0.5, "eps": 1e-30, "policy": policy}
    tx = METHODS[method](**fields | rates)
    state, ones = jax.jit(tx.init)(params), jax.tree.map(np.ones_like, params)
    zeros, update = jax.tree.map(np.zeros_like, params), jax.jit(tx.update)
    for _ in range(2):
        # A step is -rate (Adam's direction + decay * parameter): parameters of 0 show the rate, of 1 the decay too.
        moved, after = update(ones, state, zeros)
        decayed, state = update(ones, state, ones)
        rows = {row.path: row for row in describe(params, after).rows}
        for path, step in leaves_by_path(moved).items():
            rate = -np.unique(np.asarray(step))
            np.testing.assert_allclose(rate, rows[path].rate, rtol=1e-4)
            decay = -np.unique(np.asarray(leaves_by_path(decayed)[path])) / rate - 1
            np.testing.assert_allclose(decay, rows[path].decay, rtol=1e-3, atol=1e-4)
    realised = probe(tx, state, zeros)
    by_role = {row.role: row.rate for row in describe(params, update(ones, state, zeros)[1]).rows}
    assert {role: float(realised[role]) for role in by_role} == pytest.approx(by_role, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tx", "rates"),
    [
        (lora_plus_adamw(1e-3, lr_ratio=16.0, head_learning_rate=0.5), (1e-3, 16e-3, 0.5)),
        (lora_plus(optax.lion(1e-3, weight_decay=0.0), lr_ratio=4.0), (1e-3, 4e-3, 1e-3)),
        (optax.adam(1e-3), (1e-3, 1e-3, 1e-3)),
    ],
)
def test_probe_shows_the_realised_rates(tx, rates):
    found = probe(tx, tx.init(TRAINABLE), TRAINABLE)
    np.testing.assert_allclose([found[role] for role in ("a", "b", "extra")], rates, rtol=1e-4)
    np.testing.assert_allclose(found["b/a"], rates[1] / rates[0], rtol=1e-5)


@pytest.mark.slow
def test_probe_with_gradients_takes_root_mean_squares():
    grads = jax.tree.map(jnp.zeros_like, TRAINABLE)
    grads["lora"]["enc"]["q"]["lora_a"] = jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0]])
    grads["lora"]["enc"]["q"]["lora_b"] = jnp.full((2, 5), 2.0)
    tx = lora_plus(optax.sgd(1.0), lr_ratio=4.0)
    found = probe(tx, tx.init(TRAINABLE), TRAINABLE, grads)
    np.testing.assert_allclose([found["a"], found["b"]], [(25 / 6) ** 0.5, 8.0], rtol=1e-6)
    assert found["extra"] == 0
    grads["lora"]["enc"]["q"]["lora_a"] *= 0  # as of a fresh adapter
    assert jnp.isinf(probe(tx, tx.init(TRAINABLE), TRAINABLE, grads)["b/a"])


@pytest.mark.slow
def test_probe_amid_micro_batches_shows_the_update_that_ends_them():
    tx = optax.MultiSteps(lora_plus(optax.sgd(0.1), lr_ratio=4.0), 4)
    state = tx.init(TRAINABLE)
    assert float(probe(tx, state, TRAINABLE)["b/a"]) == pytest.approx(4.0)
    threes = jax.tree.map(lambda x: jnp.full_like(x, 3.0), TRAINABLE)
    for _ in range(2):
        _, state = tx.update(threes, state, TRAINABLE)
    found = jax.jit(lambda state: probe(tx, state, TRAINABLE))(state)
    # The mean of 3, 3, 1 and 1 is 2.
    assert (float(found["a"]), float(found["b"])) == pytest.approx((0.2, 0.8))
    # Of two, one is a micro-batch ahead, so that they never end together.
    tree = {"q": {"lora_a": jnp.ones((2, 3)), "lora_b": jnp.ones((3, 2))}}
    each = {name: optax.MultiSteps(optax.sgd(rate), 2) for name, rate in (("lora_a", 0.1), ("lora_b", 0.4))}
    both = optax.partition(each, {"q": {name: name for name in each}})
    state = both.init(tree)
    (ahead,) = both.update(tree, state, tree)[1].inner_states["lora_b"]
    state.inner_states["lora_b"] = type(state.inner_states["lora_b"])(ahead)
    found = probe(both, state, tree)
    assert (float(found["a"]), float(found["b"])) == pytest.approx((0.1, 0.4))
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), TRAINABLE)
    skipping = optax.MultiSteps(optax.sgd(0.1), 4, should_skip_update_fn=optax.skip_not_finite)
    assert float(probe(skipping, skipping.init(TRAINABLE), TRAINABLE, nan)["a"]) == 0.0


def test_probe_passes_on_what_an_optimizer_needs():
    tx = lora_plus(optax.polyak_sgd(max_learning_rate=2.0), lr_ratio=4.0)
    state, values = tx.init(TRAINABLE), sum(x.size for x in jax.tree.leaves(TRAINABLE))
    # Polyak's step is the loss over the squared norm, here the number of values.
    found = probe(tx, state, TRAINABLE, value=values / 2)
    assert (float(found["a"]), float(found["b"])) == pytest.approx((0.5, 2.0))
    with pytest.raises(TypeError, match="value"):
        probe(tx, state, TRAINABLE)


def test_probe_behind_float32_copies_shows_the_realised_rates():
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.3, jnp.bfloat16), TRAINABLE)
    inner = lora_plus_adamw(1e-4, 4.0)
    tx = keep_float32(inner)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert float(probe(inner, state.inner_state, state.masters)["b/a"]) == pytest.approx(4, rel=1e-4)
