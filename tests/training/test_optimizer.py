"""Every optimizer setting's effect by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.optim.lora_muon import lora_muon
from loraplus_jax.optim.lora_plus import lora_plus_adamw
from loraplus_jax.optim.lora_rite import lora_rite
from loraplus_jax.optim.riemannian import scale_by_riemannian
from loraplus_jax.settings.schema import OptimizerSettings
from loraplus_jax.training.optimizer import make_optimizer, schedule_for

SPECS = {
    "query": AdapterSpec(leaf="params/query/kernel", kind="dense", axes="io", shape=(3, 3), rank=2, scale=8.0)
}


PARAMS = {
    "lora": {"query": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))}},
    "params": {"head": {"bias": jnp.ones(2)}},
}


def test_a_schedule_by_hand():
    fields = {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 5, "final_fraction": 0.5}
    schedule = schedule_for(OptimizerSettings(**fields), 10, 2.0)
    found = [float(schedule(step)) for step in (0, 1, 2, 5, 9, 10, 11)]
    assert found == pytest.approx([0, 1, 2, 2, 1.2, 1, 1], abs=1e-6)


def updates(lr_ratio, **fields):
    """The first update of every group where all gradients are one."""
    tx = make_optimizer(OptimizerSettings(**fields), lr_ratio, 10, SPECS)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    found, _ = tx.update(ones, tx.init(PARAMS), PARAMS)
    factors = found["lora"]["query"]
    leaves = {"a": factors["lora_a"], "b": factors["lora_b"], "head": found["params"]["head"]["bias"]}
    return {name: float(jnp.ravel(leaf)[0]) for name, leaf in leaves.items()}


def test_every_setting_of_the_optimizer_has_its_effect():
    rate = {"schedule": "constant", "learning_rate": 0.1}
    # Adam's first step is the rate, whatever the gradient's size.
    assert updates(4.0, **rate) == pytest.approx({"a": -0.1, "b": -0.4, "head": -0.1}, rel=1e-5)
    assert updates(1.0, **rate) == pytest.approx({"a": -0.1, "b": -0.1, "head": -0.1}, rel=1e-5)
    head = updates(4.0, **rate, head_learning_rate=0.3)
    assert head == pytest.approx({"a": -0.1, "b": -0.4, "head": -0.3}, rel=1e-5)
    coupled = updates(4.0, **rate, weight_decay=0.5)
    assert coupled == pytest.approx({"a": -0.15, "b": -0.6, "head": -0.15}, rel=1e-5)
    equal = updates(4.0, **rate, weight_decay=0.5, decay="equal")
    assert equal == pytest.approx({"a": -0.15, "b": -0.45, "head": -0.15}, rel=1e-5)
    # g / (g + eps): one half at eps = 1, and with clipping to norm 1 of 14 ones g is 1 / sqrt(14).
    assert updates(4.0, **rate, eps=1.0)["a"] == pytest.approx(-0.05, rel=1e-5)
    clipped = 1 / math.sqrt(14)
    assert updates(4.0, **rate, eps=1.0, max_grad_norm=1.0) == pytest.approx(
        {
            "a": -0.1 * clipped / (clipped + 1),
            "b": -0.4 * clipped / (clipped + 1),
            "head": -0.1 * clipped / (clipped + 1),
        },
        rel=1e-5,
    )
    assert set(updates(4.0, learning_rate=0.1, head_learning_rate=0.3, warmup_steps=2).values()) == {0}


def test_the_moments_decay_as_set():
    b1, b2 = 0.5, 0.9
    tx = make_optimizer(OptimizerSettings(schedule="constant", learning_rate=1.0, b1=b1, b2=b2), 1.0, 10, {})
    params = {"params": {"w": jnp.zeros(1)}}
    state = tx.init(params)
    for g in (1.0, 3.0):
        found, state = tx.update({"params": {"w": jnp.full(1, g)}}, state, params)
    m = (b1 * (1 - b1) + (1 - b1) * 3) / (1 - b1**2)
    v = (b2 * (1 - b2) + (1 - b2) * 9) / (1 - b2**2)
    assert float(found["params"]["w"][0]) == pytest.approx(-m / np.sqrt(v), rel=1e-4)


@pytest.mark.parametrize("name", ["riemannian", "lora_rite", "lora_muon"])
def test_named_optimizers(name):
    """Clipping, then the transform of the name, then rates and decay by role."""
    fields = {
        "name": name,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
        "schedule": "constant",
    }
    lr_ratio = 4.0 if name == "riemannian" else 1.0
    make_optimizer(OptimizerSettings(**fields, warmup_steps=2), lr_ratio, 10, SPECS).init(
        PARAMS
    )  # from rate 0
    tx = make_optimizer(OptimizerSettings(**fields), lr_ratio, 10, SPECS)
    clip = optax.clip_by_global_norm(0.5)
    by_hand = {
        "riemannian": [scale_by_riemannian(specs=SPECS), lora_plus_adamw(1e-2, 4.0, weight_decay=0.1)],
        "lora_rite": [lora_rite(1e-2, eps=1e-8, weight_decay=0.1, specs=SPECS)],
        "lora_muon": [lora_muon(1e-2, 0.9, weight_decay=0.1, specs=SPECS)],
    }[name]
    wanted = optax.chain(clip, *by_hand)
    params, state, wanted_state = PARAMS, tx.init(PARAMS), wanted.init(PARAMS)
    for size in (2.0, 0.5):
        grads = jax.tree.map(lambda x: size * jnp.cos(jnp.arange(x.size) + 1.0).reshape(x.shape), params)  # noqa: B023
        update, state = tx.update(grads, state, params)
        expected, wanted_state = wanted.update(grads, wanted_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), update, expected)
        params = optax.apply_updates(params, update)
    assert tx.rates(0)["a"] == (pytest.approx(1e-2), 0.1)


def test_adalora_lowers_the_ranks_between_a_tenth_and_seven_tenths_of_the_steps():
    tx = make_optimizer(OptimizerSettings(target_rank=1), 4.0, 100, SPECS)
    params = {"lora": PARAMS["lora"]}
    state, update, low = tx.init(params), jax.jit(tx.update), []
    for step in range(1, 101):
        grads = jax.tree.map(lambda x: jnp.sin(step + jnp.arange(x.size).reshape(x.shape) ** 2.0), params)  # noqa: B023
        moved, state = update(grads, state, params)
        params = optax.apply_updates(params, moved)
        if not (params["lora"]["query"]["lora_b"] != 0).any(-1).all():
            low.append(step)
    assert low == [20, 30, 40, 50, 60, *range(70, 101)]


def test_every_seed_draws_other_values_for_adalora():
    def drawn(seed):
        tx = make_optimizer(OptimizerSettings(target_rank=1), 4.0, 100, SPECS, seed=seed)
        fresh = {"lora": {"query": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((2, 3))}}}
        return tx.init(fresh).triplets.q["lora/query/lora_b"]

    np.testing.assert_array_equal(drawn(3), drawn(3))
    assert not np.allclose(drawn(3), drawn(4))


def test_the_embedding_rate_of_peft_follows_the_schedule():
    fields = {"policy": "peft", "schedule": "linear", "warmup_steps": 2}
    tx = make_optimizer(OptimizerSettings(**fields), 4.0, 12, SPECS)
    found = [float(tx.rates(step)["embedding"][0]) for step in (0, 1, 2, 7)]
    assert found == pytest.approx([0, 5e-7, 1e-6, 5e-7], rel=1e-5)
