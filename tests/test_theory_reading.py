"""What is read from the terms of a run's steps, and whether rates do move them as the reading says."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from loraplus_jax import lora_plus_adamw
from loraplus_jax.lora import delta, update_squares
from loraplus_jax.theory import BALANCED, reading


@pytest.mark.parametrize(
    ("delta1", "delta2", "init", "said"),
    [
        (
            0.1,
            0.9,
            "lora",
            "0.11 x as much as B: A starves; learning_rate x 9 with lr_ratio 16 -> 1.8, which keeps B",
        ),
        (
            0.9,
            0.1,
            "lora",
            "9 x as much as B: B starves; learning_rate x 0.11 with lr_ratio 16 -> 140, which keeps B",
        ),
        (
            0.1,
            0.9,
            "gaussian",
            "A starves; learning_rate x 9 with lr_ratio 16 -> 1.8, which keeps B's rate, would bring",
        ),
        (
            0.1,
            0.9,
            "lora_b",
            "A starves; lr_ratio 16 -> 1.8, which keeps A's rate, would bring them closer (",
        ),
        (
            0.9,
            0.1,
            "lora_b",
            "B starves; lr_ratio 16 -> 140, which keeps A's rate, would bring them closer (",
        ),
        (
            0.1,
            0.9,
            None,
            "A starves; learning_rate x 9 with lr_ratio 16 -> 1.8, which keeps B's rate, would bring",
        ),
        (0.1, 0.2, "lora", "0.5 x as much as B: of the same order, no reason in this to change a rate ("),
        (0.0, 0.2, "lora", "one of the factors has not moved any layer's output yet"),
    ],
)
def test_the_reading_names_the_factor_that_starves_what_to_move_and_its_basis(delta1, delta2, init, said):
    line = reading({"q": {"delta1": delta1, "delta2": delta2}}, 16.0, init)
    assert said in line
    assert "\n" not in line
    assert delta1 == 0 or "2402.12354" in line


def test_the_reading_says_how_the_share_goes_on():
    balanced = {"q": {"delta1": 1.0, "delta2": 1.0}}
    said = {init: reading(balanced, 4.0, init) for init in ("lora", "gaussian", "lora_b", None)}
    early = "with the steps: a short run's is an early one"
    assert (
        f"B zero at the start the share follows A's rate and rises {early}"
        in said["lora"]
        == said["gaussian"]
    )
    assert f"A zero at the start the share follows B's rate and falls {early}" in said["lora_b"]
    assert "neither factor zero at the start the share follows lr_ratio" in said[None]


@pytest.mark.parametrize("init", ["lora", "lora_b", None])
def test_no_lr_ratio_below_one_is_ever_advised(init):
    for ratio in (0.5, 1.0, 4.0):
        for delta1 in (1e-3, 0.1, 1.0, 10.0):
            line = reading({"q": {"delta1": delta1, "delta2": 1.0}}, ratio, init)
            assert all(float(n) >= 1 for n in re.findall("-> ([0-9.e+-]+)", line)), line
    low = {"q": {"delta1": 0.1, "delta2": 1.0}}
    assert "lr_ratio 4 -> 1, which keeps" in reading(low, 4.0, init)
    assert "would bring them closer; no lr_ratio below 1 is advised" in reading(low, 4.0, init)
    assert "A starves; no lr_ratio below 1 is advised" in reading(low, 1.0, init)


@functools.partial(jax.jit, static_argnames="steps")
def shares(lora, rate, ratio, steps=40):
    """delta1 / delta2 in the two halves of a short run of Adam on y = tanh(x (W + D)) v, D of rank 4."""
    keys = jax.random.split(jax.random.key(3), 5)
    x, w = jax.random.normal(keys[0], (256, 64)), jax.random.normal(keys[1], (64, 64)) / 8
    change = jax.random.normal(keys[2], (64, 4)) @ jax.random.normal(keys[3], (4, 64)) / 128
    v = jax.random.normal(keys[4], (64, 3)) / 8
    tx = lora_plus_adamw(rate, lr_ratio=ratio)

    def loss(tree):
        out = jnp.tanh(x @ w + delta(x, tree["lora"]["lora_a"], tree["lora"]["lora_b"], 2.0)) @ v
        return jnp.mean((out - jnp.tanh(x @ (w + change)) @ v) ** 2)

    def step(carry, _):
        old, state = carry
        updates, state = tx.update(jax.grad(loss)(old), state, old)
        new = optax.apply_updates(old, updates)
        before, after = ((t["lora"]["lora_a"], t["lora"]["lora_b"]) for t in (old, new))
        squares = update_squares(delta, x, before, after, 2.0)
        return (new, state), jnp.sqrt(squares[:2])

    (tree, _), terms = jax.lax.scan(step, ({"lora": lora}, tx.init({"lora": lora})), length=steps)
    halves = terms.reshape(2, -1, 2).sum(axis=1)
    return halves[:, 0] / halves[:, 1], tree["lora"]


def first(init):
    a = jax.random.uniform(jax.random.key(0), (64, 8), minval=-0.3, maxval=0.3)
    b = jax.random.uniform(jax.random.key(0), (8, 64), minval=-0.9, maxval=0.9)
    return {"lora_a": 0 * a if init == "lora_b" else a, "lora_b": b if init == "lora_b" else 0 * b}


def later(lora, rate, ratio):
    return float(shares(lora, rate, ratio)[0][1])


def test_where_b_starts_at_zero_the_balance_follows_the_rate_of_a():
    lora = first("lora")
    (early, late), _ = shares(lora, 2e-4, 4.0)
    assert early < late / 2
    assert 0.5 < later(lora, 2e-4, 16.0) / later(lora, 2e-4, 1.0) < 2
    assert later(lora, 8e-4, 1.0) > 2 * later(lora, 2e-4, 4.0)


def test_where_a_starts_at_zero_the_balance_follows_the_rate_of_b():
    lora = first("lora_b")
    (early, late), _ = shares(lora, 1e-4, 4.0)
    assert early > late
    assert later(lora, 1e-4, 1.0) > 2 * later(lora, 1e-4, 4.0) > 4 * later(lora, 1e-4, 16.0)
    assert 0.5 < later(lora, 4e-4, 1.0) / later(lora, 1e-4, 4.0) < 2


def test_where_neither_starts_at_zero_the_balance_follows_the_ratio():
    _, lora = shares(first("lora"), 3e-3, 4.0)
    found = {ratio: later(lora, 1e-5, ratio) for ratio in (1.0, 4.0, 16.0)}
    assert 2.5 < found[1.0] / found[4.0] < 6
    assert 2.5 < found[4.0] / found[16.0] < 6
    assert 0.7 < later(lora, 4e-5, 4.0) / found[4.0] < 1.4


@pytest.mark.parametrize(
    ("init", "rate", "ratio"), [("lora", 5e-4, 16.0), ("lora", 2e-4, 4.0), ("lora_b", 1e-4, 4.0)]
)
def test_rates_moved_as_the_reading_says_bring_the_two_closer(init, rate, ratio):
    lora = first(init)
    share = later(lora, rate, ratio)
    assert not 1 / BALANCED < share < BALANCED
    line = reading({"q": {"delta1": share, "delta2": 1.0}}, ratio, init)
    factor = re.search("learning_rate x ([0-9.]+)", line)
    named = re.search("-> ([0-9.]+), which keeps (.)'s rate, would bring them closer", line)
    assert named is not None
    moved, new = rate * (float(factor[1]) if factor else 1.0), float(named[1])
    kept = (moved, rate) if named[2] == "A" else (moved * new, rate * ratio)
    assert kept[0] == pytest.approx(kept[1], rel=0.1)
    assert abs(math.log(later(lora, moved, new))) < abs(math.log(share)) / 1.5
