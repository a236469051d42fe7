"""A member's step: which failures in a row end it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.settings.schema import OptimizerSettings
from loraplus_jax.step.problem import Problem
from loraplus_jax.step.train_step import init_state
from loraplus_jax.sweep.member_programs import Members, make_member_step
from loraplus_jax.training.optimizer import make_optimizer

SPECS = {"q": AdapterSpec(leaf="params/q/kernel", kind="dense", axes="io", shape=(3, 3), rank=2, scale=1.0)}


@pytest.fixture(scope="module")
def step():
    """Steps of one member, whose batch is what its loss is multiplied by, from its first step."""
    settings = OptimizerSettings(schedule="constant")
    trainable = {"lora": {"q": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))}}}

    def loss_fn(variables, batch, rng):
        return (batch * jnp.sum(variables["lora"]["q"]["lora_a"]), jnp.float32(1)), {}

    optimizer = functools.partial(make_optimizer, settings, steps=10, specs=SPECS)
    losses = dict.fromkeys(("loss", "unbounded_loss", "evaluate"), loss_fn)
    shapes = {"trainable": trainable, "frozen": {}, "train_batch": {}, "eval_batch": {}}
    problem = Problem(**losses, **shapes, specs=SPECS, batch=None, steps=10)
    step = jax.jit(make_member_step(problem, optimizer, 3))
    tx = make_optimizer(settings, jnp.float32(4), 10, SPECS)
    state = init_state(trainable, tx, jax.random.key_data(jax.random.key(0)))
    rates = jnp.float32(0.1), jnp.float32(4)
    first = Members(state, *rates, {"q": jnp.float32(1)}, jnp.int32(0), jnp.bool_(True))

    def run_steps(*batches):
        members = [first]
        for batch in batches:
            members.append(step(members[-1], {}, jnp.float32(batch)))
        return members[1:]

    return run_steps


def test_only_consecutive_failures_end_a_member(step):
    nan = np.nan
    members = step(nan, nan, 1, nan, nan, nan, 1)
    assert [int(member.skipped) for member in members] == [1, 2, 0, 1, 2, 3, 3]
    assert [bool(member.alive) for member in members] == [True] * 5 + [False] * 2
    values = [float(member.state.trainable["lora"]["q"]["lora_a"][0, 0]) for member in members]
    assert values[:2] == [1, 1]
    assert len({*values[2:]}) == 1  # the third step alone moved it
    assert values[2] < 1
    assert all(member.alive for member in step(nan, nan, 1, nan, nan, 1))
