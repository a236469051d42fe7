"""A tree with one adapter and one extra, and runs of an optimizer over it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

PARAMS = {
    "lora": {"q": {"lora_a": jnp.array([[1.0], [2.0]]), "lora_b": jnp.array([[3.0, -4.0]])}},
    "params": {"head": {"bias": jnp.array([5.0, 6.0])}},
}
ONES = jax.tree.map(jnp.ones_like, PARAMS)
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
