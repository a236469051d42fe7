"""A tree with one adapter and one extra, and runs of an optimizer over it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from loraplus_jax import make_schedule

PARAMS = {
    "lora": {"q": {"lora_a": jnp.array([[1.0], [2.0]]), "lora_b": jnp.array([[3.0, -4.0]])}},
    "params": {"head": {"bias": jnp.array([5.0, 6.0])}},
}
ONES = jax.tree.map(jnp.ones_like, PARAMS)
SCHEDULES = {
    "constant": 0.1,
    "linear": optax.linear_schedule(0.1, 0.01, 6),
    "cosine with a floor": optax.cosine_decay_schedule(0.1, 6, alpha=0.1),
    "warm-up and cosine": optax.warmup_cosine_decay_schedule(0.02, 0.1, 3, 8, end_value=0.01),
    "wsd": make_schedule("wsd", 0.1, 8, warmup_steps=2, final_fraction=0.25),
}
PARTS = (("lora", "q", "lora_a"), ("lora", "q", "lora_b"), ("params", "head", "bias"))


def leaves(tree):
    """A, B and the extra."""
    return tuple(functools.reduce(lambda t, k: t[k], path, tree) for path in PARTS)


def gradients(step):
    """Other gradients at every step, of both signs and several sizes."""
    random = np.random.default_rng(step)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), PARAMS)


def run(tx, steps, params=PARAMS, grads=gradients):
    """The parameters and the updates after every step."""
    update = jax.jit(tx.update)
    state, history = tx.init(params), []
    for step in range(steps):
        updates, state = update(grads(step), state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, updates))
    return history
