"""Digests of trees of arrays, independent of their sharding."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..adapter.tree import leaves_by_path


def fingerprint(tree: Any) -> str:
    """Computes a digest of a tree's paths, shapes, dtypes and bits, independent of the sharding.

    Computed on the device: no weight is copied to the host.

    Returns:
      16 hexadecimal digits.
    """
    # One leaf at a time: processes may start concurrent programs in different orders, and deadlock.
    return digest_of_lines(
        {path: fingerprint_line(path, leaf) for path, leaf in leaves_by_path(tree).items()}
    )


def fingerprint_line(path: str, leaf: jax.Array) -> str:
    """Path, shape, dtype and checksums of a leaf, to compute the `fingerprint` of its tree leaf by leaf."""
    return f"{path} {leaf.shape} {leaf.dtype} {jax.device_get(_checksum(leaf)).tolist()}"


def digest_of_lines(lines: Mapping[str, str]) -> str:
    """The `fingerprint` of a tree from the `fingerprint_line` of each path, in any order."""
    return hashlib.sha256("\n".join(lines[path] for path in sorted(lines)).encode()).hexdigest()[:16]


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Two sums of hashes of the leaf's 32-bit words, uint32 `(2,)`."""
    words = _to_uint32(leaf)
    # Each word is hashed with its index, and integers are summed: XLA may add up the shards in any order.
    index = jnp.arange(words.size, dtype=jnp.uint32).reshape(words.shape)
    return jnp.stack([jnp.sum(_hash_words(words, index, seed), dtype=jnp.uint32) for seed in (1, 2)])


def _to_uint32(leaf: jax.Array) -> jax.Array:
    # One word per narrower value, several per wider value.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    # bitcast_convert_type takes neither bool nor int4.
    if leaf.dtype.itemsize == 1 and (leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.integer)):
        leaf = leaf.astype(jnp.int8)
    width = min(32, 8 * leaf.dtype.itemsize)
    return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)


def _hash_words(words: jax.Array, index: jax.Array, seed: int) -> jax.Array:
    # Two rounds of multiply and shift, as in murmur3's finalizer.
    h = words ^ (index * jnp.uint32(0x9E3779B9) + jnp.uint32(seed))
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        h = (h ^ (h >> 16)) * jnp.uint32(factor)
    return h ^ (h >> 15)
