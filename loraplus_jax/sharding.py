"""Meshes, and placing trees on them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .train_step import DATA_AXIS


def make_mesh(data: int = -1) -> Mesh:
    """A mesh of `data` devices along the axis `"data"`; -1 takes all.

    Raises:
      ValueError: more devices than there are, or none.

    >>> make_mesh(1).size
    1
    """
    devices = jax.devices()
    size = len(devices) if data == -1 else data
    if not 1 <= size <= len(devices):
        raise ValueError(f"mesh.data must be -1 or from 1 to the {len(devices)} devices here, got {data}")
    return Mesh(np.array(devices[:size]), (DATA_AXIS,))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
