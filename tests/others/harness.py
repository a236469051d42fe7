"""What the adapters of every library must do, and trees of arrays: random values, comparisons.

A library gives its model, its loop and its names.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from loraplus_jax import save_peft
from loraplus_jax.interop import load_peft

RATIO = 8.0
"""Of the two learning rates, in every loop."""


def drawn(tree, seed=0, scale=0.3):
    """Values that are not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected, tolerance, least=0.0):
    """Leaf by leaf, to a tolerance relative to the largest value, or to `least` if that is larger."""

    def close(a, b):
        size = max(least, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size)

    jax.tree.map(close, found, expected)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): np.array(x) for k, x in leaves}


def assert_ratio(before, after, count, rel=0.01):
    """Of so many modules, a step moved B `RATIO` times as far as A; all leaves that moved are returned by path.

    Adapters of an embedding have a rate of their own, and are left out.
    """
    before = by_path(before)
    moved = {path: np.sqrt(np.mean(np.square(x - before[path]))) for path, x in by_path(after).items()}
    pairs = {path: re.sub(r"(lora(?:_kernel)?[_/])a\b", r"\1b", path) for path in moved}
    found = [moved[b] / moved[a] for a, b in pairs.items() if a != b]
    assert found == pytest.approx([RATIO] * count, rel=rel)
    return {path for path, distance in moved.items() if distance}


class Loop:
    """A functional loop: `step(*state)` returns the new state, whose first part holds the factors, and the loss."""

    def __init__(self, step, *state):
        self._step, self.state = step, state

    def factors(self):
        return self.state[0]

    def step(self):
        *self.state, loss = self._step(*self.state)
        return float(loss)

    def restore(self, state):
        self.state = state


def assert_trains_and_resumes(make, directory, *, modules, steps, below, mean_of=1):
    """`make()` gives a loop at its start. Returns it at the end.

    The first step moves B `RATIO` times as far as A. The mean loss of the last steps is below that of the first.
    Another loop, restored from half way, repeats the losses and ends with the same state, bitwise.
    """
    loop = make()
    before = by_path(loop.factors())
    losses = [loop.step()]
    assert_ratio(before, by_path(loop.factors()), modules)
    losses += [loop.step() for _ in range(steps // 2 - 1)]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "state", loop.state)
    losses += [loop.step() for _ in range(steps - steps // 2)]
    assert np.mean(losses[-mean_of:]) < below * np.mean(losses[:mean_of])
    resumed = make()
    with ocp.StandardCheckpointer() as checkpointer:
        resumed.restore(checkpointer.restore(directory / "state", loop.state))
    assert [resumed.step() for _ in range(steps - steps // 2)] == losses[steps // 2 :]
    assert_equal(jax.tree.leaves(resumed.state), jax.tree.leaves(loop.state))
    return loop


def to_peft_and_back(directory, lora, specs, config, names):
    """Writes the factors for PEFT, and reads the same ones again."""
    save_peft(directory, lora, specs, config, names)
    loaded = load_peft(directory, specs, names)
    assert_equal(loaded.lora, lora)
    return loaded
