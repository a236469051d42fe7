"""The optimizer that the settings name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax import describe
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.optim.lora_muon import lora_muon
from loraplus_jax.optim.lora_plus import lora_plus_adamw
from loraplus_jax.optim.lora_rite import lora_rite
from loraplus_jax.optim.riemannian import scale_by_riemannian
from loraplus_jax.settings.schema import OptimizerSettings
from loraplus_jax.training.optimizer import make_optimizer, schedule_for

from ..marks import slow

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


def waves(tree, size, start=1.0):
    """Gradients of both signs."""
    return jax.tree.map(
        lambda x: (size * np.cos(np.arange(x.size) ** 2 + start)).reshape(x.shape).astype(np.float32), tree
    )


DECAY = {"weight_decay": 0.1}
EVERY = DECAY | {"b1": 0.5, "b2": 0.6, "eps": 0.5, "decay": "equal", "head_learning_rate": 0.3}
TRANSFORMS = {
    "lora_rite": lora_rite(1e-2, eps=1e-8, weight_decay=0.1, specs=SPECS),
    "lora_muon": lora_muon(1e-2, 0.9, weight_decay=0.1, specs=SPECS),
    "riemannian": optax.chain(scale_by_riemannian(specs=SPECS), lora_plus_adamw(1e-2, 4.0, **DECAY)),
}


@pytest.mark.parametrize(
    ("fields", "lr_ratio", "transform"),
    [
        slow(EVERY, 1.5, lora_plus_adamw(1e-2, 1.5, **EVERY)),
        *(
            (slow if name != "riemannian" else pytest.param)(
                DECAY | {"name": name}, 4.0 if name == "riemannian" else 1.0, transform
            )
            for name, transform in TRANSFORMS.items()
        ),
    ],
    ids=["every setting", *TRANSFORMS],
)
def test_an_optimizer_is_clipping_and_then_what_its_settings_name(fields, lr_ratio, transform):
    fields = fields | {"learning_rate": 1e-2, "max_grad_norm": 0.5, "schedule": "constant"}
    tx = make_optimizer(OptimizerSettings(**fields), lr_ratio, 10, SPECS)
    wanted = optax.chain(optax.clip_by_global_norm(0.5), transform)
    params, state, wanted_state = PARAMS, jax.jit(tx.init)(PARAMS), jax.jit(wanted.init)(PARAMS)
    ours, theirs = jax.jit(tx.update), jax.jit(wanted.update)
    for size in (2.0, 0.1):  # one that is clipped and one that is not
        grads = waves(PARAMS, size)
        update, state = ours(grads, state, params)
        expected, wanted_state = theirs(grads, wanted_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), update, expected)
        params = optax.apply_updates(params, update)
    row, *_ = describe(PARAMS, tx).rows
    assert (row.role, row.rate, row.decay) == ("a", pytest.approx(1e-2), pytest.approx(0.1))
    warm = make_optimizer(OptimizerSettings(**fields, warmup_steps=2), lr_ratio, 10, SPECS)
    update = jax.jit(lambda grads: warm.update(grads, warm.init(PARAMS), PARAMS)[0])(grads)
    assert not any(np.any(x) for x in jax.tree.leaves(update))


@pytest.mark.slow
def test_adalora_lowers_the_ranks_between_a_tenth_and_seven_tenths_of_the_steps():
    tx = make_optimizer(OptimizerSettings(target_rank=1), 4.0, 100, SPECS)
    params = {"lora": PARAMS["lora"]}
    state, update, low = jax.jit(tx.init)(params), jax.jit(tx.update), []
    for step in range(1, 101):
        moved, state = update(waves(params, 1.0, step), state, params)
        params = optax.apply_updates(params, moved)
        if not np.any(params["lora"]["query"]["lora_b"], -1).all():
            low.append(step)
    assert low == [20, 30, 40, 50, 60, *range(70, 101)]


@pytest.mark.slow
def test_every_seed_draws_other_values_for_adalora():
    def drawn(seed):
        tx = make_optimizer(OptimizerSettings(target_rank=1), 4.0, 100, SPECS, seed=seed)
        fresh = {"lora": {"query": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.zeros((2, 3))}}}
        return jax.jit(tx.init)(fresh).triplets.q["lora/query/lora_b"]

    np.testing.assert_array_equal(drawn(3), drawn(3))
    assert not np.allclose(drawn(3), drawn(4))


def test_the_embedding_rate_of_peft_follows_the_schedule():
    fields = {"policy": "peft", "schedule": "linear", "warmup_steps": 2}
    tx = make_optimizer(OptimizerSettings(**fields), 4.0, 12, None)
    params = {"lora": {"t": {"lora_embedding_a": jnp.ones((3, 2)), "lora_embedding_b": jnp.ones((2, 3))}}}
    found = [describe(params, tx, step=step).rows[0].rate for step in (0, 1, 2, 7)]
    assert found == pytest.approx([0, 5e-7, 1e-6, 5e-7], rel=1e-5)
