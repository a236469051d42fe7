"""TPU chips, their topologies, and compiling for them on a machine without a TPU."""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax

from .._utils.validation import suggest

PIP = "pip install 'loraplus_jax[tpu-plan]'"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip.

    Attributes:
      name: name in a topology.
      hbm_bytes: HBM capacity, bytes.
      flops: peak bfloat16 FLOP/s.
      hbm_rate: HBM bandwidth, bytes/s.
      ici_rate: ICI bandwidth in one direction, all links together, bytes/s.
      dimensions: dimensions of the torus.
      most: chips per pod.
    """

    name: str
    hbm_bytes: float
    flops: float
    hbm_rate: float
    ici_rate: float
    dimensions: int
    most: int


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", hbm_bytes=32 * 2**30, flops=275e12, hbm_rate=1200e9, ici_rate=300e9, dimensions=3, most=4096
        ),
        Chip("v5e", hbm_bytes=16e9, flops=197e12, hbm_rate=819e9, ici_rate=200e9, dimensions=2, most=256),
        Chip("v5p", hbm_bytes=95e9, flops=459e12, hbm_rate=2765e9, ici_rate=600e9, dimensions=3, most=8960),
        Chip("v6e", hbm_bytes=32e9, flops=918e12, hbm_rate=1638e9, ici_rate=400e9, dimensions=2, most=256),
    )
}
"""From cloud.google.com/tpu/docs (v4, v5e, v5p and v6e, November 2026). Its "bidirectional" ICI bandwidth counts
both directions, so half of it is used here. v4 has 6 links of 50 GB/s (arXiv 2304.01433, table 4)."""

_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)")
# Keeps libtpu from querying a TPU's metadata server and workers, and from taking the lock of another process.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(topology: str) -> tuple[Chip, list[Any]]:
    """The chip of a topology such as `"v5e:16x16"`, and its devices to compile for, one per chip.

    Only for machines without a TPU: switches JAX to the CPU platform.

    Raises:
      ValueError: the chip or shape is unknown.
      ImportError: libtpu, the TPU compiler, is not installed.
    """
    chip, shape = _parse_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(f"topology {topology} needs libtpu, the TPU compiler; install it with {PIP}")
    # With libtpu installed, JAX would look for a TPU and wait for it.
    jax.config.update("jax_platforms", "cpu")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Loads libtpu, which reads the environment once.
    from jax.experimental import topologies

    # A host has four chips, or all chips of a smaller topology. A v4 chip's two cores act as one (megacore).
    bounds = (min(2, shape[0]), min(2, shape[1]), 1)
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=bounds, **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split()).removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(
            f"the installed libtpu does not support topology {topology}: {reason:.200}"
        ) from None
    return chip, list(description.devices)


def _parse_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
    match = _NAME.fullmatch(topology)
    if match is None or match[1] not in CHIPS:
        known = [f"{name}:{'x'.join(['4'] * chip.dimensions)}" for name, chip in CHIPS.items()]
        raise ValueError(
            f"topology must be CHIP:SHAPE, such as {', '.join(known)}; got {topology!r}"
            f"{suggest(topology.partition(':')[0], CHIPS, fallback=False)}"
        )
    chip, shape = CHIPS[match[1]], tuple(int(n) for n in match[2].split("x"))
    if len(shape) != chip.dimensions or 0 in shape:
        form = "x".join("ABC"[: chip.dimensions])
        raise ValueError(f"topology for {chip.name} must have the form {chip.name}:{form}, got {topology!r}")
    if math.prod(shape) > chip.most:
        raise ValueError(
            f"topology {topology} has {math.prod(shape):,} chips, a {chip.name} pod at most {chip.most:,}"
        )
    known = topology_shapes(chip)
    if shape not in known:
        near = sorted(known, key=lambda other: abs(math.log(math.prod(other) / math.prod(shape))))[:3]
        names = ", ".join(f"{chip.name}:{'x'.join(map(str, candidate))}" for candidate in near)
        raise ValueError(f"unknown topology {topology}; the nearest available are {names}")
    return chip, shape


def topology_shapes(chip: Chip) -> list[tuple[int, ...]]:
    """Available slice shapes of a chip's pods, smallest first.

    >>> topology_shapes(CHIPS["v4"])[:6]
    [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8)]
    """
    if chip.dimensions == 2:
        return list(_FLAT)
    sides = range(4, chip.most // 16 + 1, 4)
    cubes = [
        cube for cube in itertools.combinations_with_replacement(sides, 3) if math.prod(cube) <= chip.most
    ]
    return [*_BELOW_CUBE, *sorted(cubes, key=math.prod)]


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
"""Shapes of 3D tori below 4x4x4; from there on sides are multiples of four, in increasing order."""
