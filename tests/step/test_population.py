"""Members of one compiled step train as their single runs do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from loraplus_jax import init_state, jit_step, lora_plus_adamw, population_step
from loraplus_jax.step.population import MEMBER_AXIS

from ..refusals import refusals

RATES = [(1e-2, 1.0), (3e-3, 4.0), (2e-2, 16.0)]
FROZEN = {"params": {"w": jnp.asarray(np.random.default_rng(9).normal(size=(6, 3)), jnp.float32)}}


def noisy_squares(variables, batch, rng):
    """Squares of x (w + A B) - y, where x has noise in the place of dropout."""
    q = variables["lora"]["q"]
    x = batch["x"] + 0.1 * jax.random.normal(rng, batch["x"].shape)
    error = x @ (variables["params"]["w"] + q["lora_a"] @ q["lora_b"]) - batch["y"]
    size = jnp.float32(error.size)
    return (jnp.sum(error**2), size), {"off": (jnp.sum(abs(error)), size)}


def make_tx(own):
    return lora_plus_adamw(own["learning_rate"], own["lr_ratio"], weight_decay=0.01, max_grad_norm=1.0)


def members(count=3):
    """Initial factors, keys, and batches of four steps, of each member."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    factors = [{"lora": {"q": {"lora_a": draw(6, 2), "lora_b": draw(2, 3)}}} for _ in range(count)]
    batches = [[{"x": draw(8, 6), "y": draw(8, 3)} for _ in range(4)] for _ in range(count)]
    return factors, [jax.random.key(n) for n in range(count)], batches


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def hyperparams(rates):
    rate, ratio = np.asarray(rates, np.float32).T
    return {"learning_rate": rate, "lr_ratio": ratio}


def first_states(factors, keys, own):
    init = lambda trainable, own, key: init_state(trainable, make_tx(own), key)  # noqa: E731
    return jax.jit(jax.vmap(init))(stack(factors), own, jnp.stack(keys))


@pytest.mark.slow
def test_members_equal_their_single_runs():
    """Some at once, with accumulation, and each on a device of its own."""
    factors, keys, batches = members()
    own, runs = hyperparams(RATES), []
    for how in ({"at_once": 2}, {"mesh": Mesh(jax.devices()[:3], (MEMBER_AXIS,))}):
        step = population_step(noisy_squares, make_tx, accumulate=2, **how)
        states, logs = first_states(factors, keys, own), []
        for n in range(4):
            states, metrics = step(states, own, FROZEN, stack([b[n] for b in batches]))
            logs.append(jax.device_get(metrics))
        runs.append((states, logs))
    for m, (rate, ratio) in ((0, RATES[0]), (2, RATES[2])):
        tx = lora_plus_adamw(rate, ratio, weight_decay=0.01, max_grad_norm=1.0)
        single, state = jit_step(noisy_squares, tx, accumulate=2), init_state(factors[m], tx, keys[m])
        for n in range(4):
            state, metrics = single(state, FROZEN, batches[m][n])
            for (_, logs), (name, value) in itertools.product(runs, metrics.items()):
                np.testing.assert_allclose(logs[n][name][m], value, rtol=1e-5, err_msg=name)
        for states, _ in runs:
            for x, y in zip(*map(jax.tree.leaves, (states.trainable, state.trainable)), strict=True):
                np.testing.assert_allclose(np.asarray(x)[m], y, rtol=1e-5, atol=1e-6)
            assert (int(np.asarray(states.step)[m]), states.rng[m]) == (4, keys[m])


@pytest.mark.slow
def test_new_rates_compile_nothing_and_states_are_donated():
    factors, keys, batches = members()
    step = population_step(noisy_squares, make_tx)
    states = first_states(factors, keys, hyperparams(RATES))
    for factor in (1.0, 0.5, 0.1):
        before, own = states, hyperparams([(factor * rate, ratio) for rate, ratio in RATES])
        states, metrics = step(states, own, FROZEN, stack([b[0] for b in batches]))
        assert before.trainable["lora"]["q"]["lora_a"].is_deleted()
        np.testing.assert_allclose(metrics["rate/b"], [factor * a * b for a, b in RATES], rtol=1e-6)
    assert step._cache_size() == 1


def test_a_member_that_diverges_leaves_the_others_alone():
    factors, keys, batches = members(2)
    step = population_step(noisy_squares, make_tx, skip_nonfinite=True)
    own = hyperparams(RATES[:2])
    states = first_states(factors, keys, own)
    broken = jax.tree.map(lambda x: x * np.inf, batches[1][0])
    states, metrics = step(states, own, FROZEN, stack([batches[0][0], broken]))
    assert metrics["skipped"].tolist() == [0, 1]
    found = states.trainable["lora"]["q"]
    np.testing.assert_array_equal(found["lora_a"][1], factors[1]["lora"]["q"]["lora_a"])
    assert np.isfinite(found["lora_b"]).all()


STEP = population_step(noisy_squares, make_tx)
BY_DATA = Mesh(jax.devices(), ("data",))
test_bad_arguments = refusals(
    (lambda: STEP({"a": jnp.ones(3)}, {"b": jnp.ones(2)}, {}, {"c": jnp.ones(3)}), "members", 2, 3),
    (lambda: population_step(noisy_squares, make_tx, at_once=0), "at_once", 0),
    (lambda: population_step(noisy_squares, make_tx, mesh=BY_DATA), "'members'", "'data'"),
    error=ValueError,
)
