"""What implementations of attention share: masks, the platform, and the names of what the forward pass saves."""

import jax
import jax.numpy as jnp

COMPILED_FOR: dict[str, float] = {}
"""CUDA compute capability by kind of device: of GPUs that are compiled for, which this machine need not have."""
ATTENTION_NAMES = ("attention", "attention_norm")
"""Checkpoint names for a remat policy to save, so that the backward pass does not recompute attention."""


def token_mask(segment_ids: jax.Array | None, length: int, window: int | jax.Array | None) -> jax.Array:
    """Boolean (B or 1, T, T): whether each token attends to each other: earlier, in its segment and its window."""
    mask = window_mask(jnp.arange(length), length, window)[None]
    return mask if segment_ids is None else mask & (segment_ids[:, :, None] == segment_ids[:, None, :])


def window_mask(queries: jax.Array, keys: int, window: int | jax.Array | None) -> jax.Array:
    """Boolean (T, S): whether the key at each index below `keys` is at most a query's index, and in its window."""
    distance = queries[:, None] - jnp.arange(keys)[None, :]
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def target_platform() -> str:
    """The platform that the program being traced is for: that of the ambient mesh, or JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    # A plan compiles for the devices of the mesh, which this machine may not have.
    return jax.default_backend() if mesh.abstract_device is None else mesh.abstract_device.platform


def target_capability() -> float:
    """CUDA compute capability of the devices that the program being traced is for, such as 8.9; 0 without CUDA."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.device_kind in COMPILED_FOR:
        return COMPILED_FOR[device.device_kind]
    local = jax.local_devices()[0]
    return float(local.compute_capability) if "cuda" in local.client.platform_version else 0.0
