"""What is known of TPU chips and their compiler, and topologies to compile for with no TPU there."""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax

from .._validation import suggest

PIP = "pip install 'loraplus_jax[tpu-plan]'"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's published figures.

    Attributes:
      name: as in a topology's name.
      hbm_bytes: of memory.
      flops: peak bfloat16 FLOP/s.
      hbm_rate: bytes/s from and to its memory.
      ici_rate: bytes/s that it can receive from other chips, over all links together; it sends as much at once.
      dimensions: of the torus.
      most: chips of a pod.
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
both directions: half of it is here. That of v4 is 6 links of 50 GB/s (arXiv 2304.01433, table 4)."""

_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)")
# libtpu must not look for a TPU's metadata server and workers, nor for a lock that another process holds.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(topology: str) -> tuple[Chip, list[Any]]:
    """The chip of a topology such as `"v5e:16x16"`, and its devices, one a chip, to compile for.

    Works on a machine without a TPU, and there only: JAX itself is told to stay on the CPU.

    Raises:
      ValueError: no such chip or shape.
      ImportError: libtpu, the compiler, is not installed.
    """
    chip, shape = _parse_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(f"compiling for {topology} needs libtpu, which is not installed: {PIP}")
    jax.config.update("jax_platforms", "cpu")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # A host has four chips; of a smaller topology it has all. A v4 chip's two cores work as one, as they do in use.
    bounds = (min(2, shape[0]), min(2, shape[1]), 1)
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=bounds, **options
        )
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split()).removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(f"the installed libtpu cannot compile for {topology}: {reason:.200}") from None
    return chip, list(description.devices)


def _parse_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
    match = _NAME.fullmatch(topology)
    if match is None or match[1] not in CHIPS:
        known = [f"{name}:{'x'.join(['4'] * chip.dimensions)}" for name, chip in CHIPS.items()]
        raise ValueError(
            f"topology must be a chip and a shape such as {', '.join(known)}, got {topology!r}"
            f"{suggest(topology.partition(':')[0], CHIPS, fallback=False)}"
        )
    chip, shape = CHIPS[match[1]], tuple(int(n) for n in match[2].split("x"))
    if len(shape) != chip.dimensions or 0 in shape:
        form = "x".join("ABC"[: chip.dimensions])
        raise ValueError(f"a topology of {chip.name} has the form {chip.name}:{form}, got {topology!r}")
    if math.prod(shape) > chip.most:
        raise ValueError(
            f"a pod of {chip.name} has {chip.most:,} chips, {topology} would be {math.prod(shape):,}"
        )
    known = topology_shapes(chip)
    if shape not in known:
        near = sorted(known, key=lambda candidate: _distance(candidate, shape))[:3]
        names = ", ".join(f"{chip.name}:{'x'.join(map(str, candidate))}" for candidate in near)
        raise ValueError(f"there is no topology {topology}; the nearest are {names}")
    return chip, shape


def topology_shapes(chip: Chip) -> list[tuple[int, ...]]:
    """The slices of a chip's pods that can be had, smallest first.

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
"""Of chips in a torus of three dimensions; from 4x4x4 on sides are multiples of four, in growing order."""


def _distance(left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """How far two shapes are apart, by the factors between their sides and that between their sizes."""
    pairs = [*zip(sorted(left), sorted(right), strict=True), (math.prod(left), math.prod(right))]
    return sum(abs(math.log2(a / b)) for a, b in pairs)
