"""Trees of arrays: random values, comparisons, and how far factors moved."""

import jax
import jax.numpy as jnp
import numpy as np


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


def size(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def ratios(before, after):
    """How far B moved over how far A moved, by module."""
    moved = jax.tree.map(lambda a, b: size(a - b), before, after)
    leaves = jax.tree_util.tree_leaves_with_path(moved)
    flat = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in leaves}
    return [flat[path.replace("lora_a", "lora_b")] / a for path, a in flat.items() if path.endswith("lora_a")]
