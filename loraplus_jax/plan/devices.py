"""TPUs and NVIDIA GPUs: their figures, topologies, and devices to compile for on a machine that has none."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
from pydantic import ConfigDict, Field

from .._utils.field_types import check_schema
from .._utils.validation import suggest
from .._utils.yaml_files import read_yaml
from ..models.attention_common import COMPILED_FOR, target_capability
from ..training.xla import restore_platforms

Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Number = Annotated[int, Field(gt=0)]


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a TPU chip or a GPU.

    Attributes:
      name: name in a topology.
      memory: memory capacity, bytes.
      flops: peak bfloat16 FLOP/s of dense matrices.
      memory_rate: memory bandwidth, bytes/s.
      link_rate: bandwidth to other chips of the slice or host in one direction, all links together, bytes/s.
    """

    name: str
    memory: Amount
    flops: Amount
    memory_rate: Amount
    link_rate: Amount

    @property
    def available(self) -> int:
        """Bytes that programs can use."""
        return int(self.memory)

    def rate_between(self, hosts: int) -> float:
        """Bandwidth among devices of so many hosts in one direction, bytes/s."""
        del hosts  # a slice's links are the same everywhere
        return self.link_rate


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
    """A TPU chip.

    Attributes:
      dimensions: dimensions of the torus.
      most: chips per pod.
    """

    dimensions: int
    most: int


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """An NVIDIA GPU; what follows `capability` is only needed by the compiler.

    Attributes:
      host_rate: network bandwidth between hosts in one direction, per GPU, bytes/s.
      kind: the name that the driver reports.
      capability: CUDA compute capability, such as 8.9; at least 7.5, for CUDA 13.
      cores: number of multiprocessors.
      clock: GHz.
      cache: bytes of the L2 cache.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    host_rate: Amount
    kind: str
    capability: Annotated[float, Field(ge=7.5, allow_inf_nan=False)]
    cores: Number
    clock: Amount
    cache: Number

    @property
    def available(self) -> int:
        """Bytes that JAX reserves: `XLA_CLIENT_MEM_FRACTION` of the memory, by default 75 %."""
        return int(self.memory * memory_fraction())

    def rate_between(self, hosts: int) -> float:
        """Bandwidth among GPUs of so many hosts in one direction, bytes/s."""
        return self.link_rate if hosts == 1 else self.host_rate


MAX_FRACTION = 0.92
"""Largest part of a GPU's memory to reserve. The rest is for the CUDA context, NCCL's buffers, CUDA graphs and the
libraries' own memory, which are outside the reservation."""


MEM_FRACTION = "XLA_CLIENT_MEM_FRACTION"
"""Environment variable of the part of a GPU's memory that JAX reserves."""
_OLD_MEM_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # deprecated, which jaxlib reads too


def memory_fraction() -> float:
    """Part of a GPU's memory that JAX reserves; raises ValueError if the environment sets no such part."""
    name = next((name for name in (_OLD_MEM_FRACTION, MEM_FRACTION) if os.environ.get(name)), MEM_FRACTION)
    text = os.environ.get(name) or "0.75"
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction <= 1:
        raise ValueError(
            f"{name} in the environment must be above 0 and at most 1, such as 0.9; got {text!r}"
        )
    return fraction


TPUS: Mapping[str, Tpu] = {
    chip.name: chip
    for chip in (
        Tpu("v4", 32 * 2**30, 275e12, 1200e9, 300e9, dimensions=3, most=4096),
        Tpu("v5e", 16e9, 197e12, 819e9, 200e9, dimensions=2, most=256),
        Tpu("v5p", 95e9, 459e12, 2765e9, 600e9, dimensions=3, most=8960),
        Tpu("v6e", 32e9, 918e12, 1638e9, 400e9, dimensions=2, most=256),
    )
}
"""From cloud.google.com/tpu/docs (v4, v5e, v5p and v6e, November 2026). Its "bidirectional" ICI bandwidth counts
both directions, so half of it is used here. v4 has 6 links of 50 GB/s (arXiv 2304.01433, table 4)."""
GPUS: Mapping[str, Gpu] = {
    name: Gpu(
        name=name,
        memory=memory * 1e9,
        flops=flops * 1e12,
        memory_rate=memory_rate * 1e9,
        link_rate=link_rate * 1e9,
        host_rate=host_rate * 1e9,
        kind=f"NVIDIA {kind}",
        capability=capability,
        cores=cores,
        clock=clock,
        cache=cache * 2**20,
    )
    # GB, TFLOP/s, GB/s of memory, links and network, kind, capability, cores, GHz, MiB of cache
    for name, memory, flops, memory_rate, link_rate, host_rate, kind, capability, cores, clock, cache in (
        ("rtx4080", 16.8, 97.5, 716.8, 32, 12.5, "GeForce RTX 4080", 8.9, 76, 2.505, 64),
        ("l4", 23.5, 121, 300, 32, 12.5, "L4", 8.9, 58, 2.04, 48),
        ("a10g", 23.6, 70, 600, 32, 12.5, "A10G", 8.6, 80, 1.71, 6),
        ("rtx4090", 25.2, 165.2, 1008, 32, 12.5, "GeForce RTX 4090", 8.9, 128, 2.52, 72),
        ("a100-40", 42.3, 312, 1555, 300, 25, "A100-SXM4-40GB", 8.0, 108, 1.41, 40),
        ("a6000", 51.0, 154.8, 768, 32, 12.5, "RTX A6000", 8.6, 84, 1.8, 6),
        ("h100", 84.9, 989.4, 3352, 450, 50, "H100 80GB HBM3", 9.0, 132, 1.98, 50),
        ("a100-80", 85.1, 312, 2039, 300, 25, "A100-SXM4-80GB", 8.0, 108, 1.41, 40),
        ("rtx6000pro", 102.6, 503.8, 1792, 64, 12.5, "RTX PRO 6000 Blackwell", 12.0, 188, 2.6, 128),
        ("h200", 151.3, 989.4, 4800, 450, 50, "H200", 9.0, 132, 1.98, 50),
        ("b200", 191.5, 2250, 8000, 900, 50, "B200", 10.0, 148, 1.965, 126),
        ("gb200", 197.9, 2500, 8000, 900, 50, "GB200", 10.0, 152, 2.062, 126),
    )
}
"""From NVIDIA's data sheets, smallest memory first; memory as the driver reports it. Links are NVLink, or PCIe
without it; the network is assumed to be one adapter per GPU of 100, 200 or 400 Gbit/s."""

_MULTIPROCESSORS = {8.0: (64, 2048, 164, 163), 9.0: (128, 2048, 228, 227), 10.0: (128, 2048, 228, 227)}
"""By compute capability: float32 units, threads, and KiB of shared memory of a multiprocessor and of a block
(CUDA programming guide, technical specifications per compute capability)."""
_OTHER_MULTIPROCESSORS = (128, 1536, 100, 99)

_TOPOLOGY = re.compile(r"(.+):([0-9]+(?:x[0-9]+)*)")
# Keeps libtpu from querying a TPU's metadata server and workers, and from taking the lock of another process.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@contextlib.contextmanager
def restore_targets() -> Iterator[None]:
    """Undoes at its end what `target_devices` changes in this process, which may then use its own devices."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    checks, known = {name: getattr(fused, name) for name in _CHECKS}, {*COMPILED_FOR}
    with restore_platforms(*_TPU_ENVIRONMENT, "TF_CPP_MIN_LOG_LEVEL"):
        try:
            yield
        finally:
            for name, check in checks.items():
                setattr(fused, name, check)
            for kind in {*COMPILED_FOR} - known:
                del COMPILED_FOR[kind]


def target_devices(topology: str) -> tuple[Chip, list[Any]]:
    """The chip of a topology such as `"h100:8"` or `"v5e:16x16"`, and its devices to compile for.

    A GPU topology is `GPU:COUNT` or `GPU:HOSTSxCOUNT`, where GPU is a name in `GPUS` or a YAML file with the fields
    of `Gpu`. Switches JAX to the CPU platform, until a `restore_targets` ends.

    Raises:
      ValueError: the chip or shape is unknown, or the installed compiler does not know the chip.
      ImportError: the compiler is not installed.
    """
    chip, shape = _parse_topology(topology)
    memory_fraction()  # before JAX reads it, with a traceback
    is_tpu = isinstance(chip, Tpu)
    package, extra = ("libtpu", "tpu-plan") if is_tpu else ("jax_cuda13_plugin", "gpu-plan")
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"topology {topology} needs the compiler of {package}; install it with "
            f"pip install 'loraplus_jax[{extra}]'"
        )
    # With a compiler installed, JAX would look for its devices, and wait or print a traceback.
    jax.config.update("jax_platforms", "cpu")
    if is_tpu:
        for name, value in _TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    elif os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # JAX's own default
        # XLA would log each GPU program that is larger than the memory; the plan compares the sizes itself.
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # Loads the compiler, which reads the environment once.
    from jax.experimental import topologies

    if isinstance(chip, Gpu):
        # Slices, hosts, GPUs per host.
        options = {"platform": "cuda", "topology": "x".join(map(str, (1, *shape)))}
        options["target_config"] = gpu_spec(chip)
        _answer_for_targets(chip)
    else:
        # A host has four chips, or all chips of a smaller topology.
        bounds = (min(2, shape[0]), min(2, shape[1]), 1)
        options = {"platform": "tpu", "topology_name": topology, "chips_per_host_bounds": bounds}
        if chip.name == "v4":  # whose two cores act as one
            options["chip_config_name"] = "megacore"
    try:
        devices = list(topologies.get_topology_desc(**options).devices)
        if isinstance(chip, Gpu):
            _compile_exp(devices[0])
    except jax.errors.JaxRuntimeError as error:
        reason = re.sub(r"^[A-Z_]+: ", "", " ".join(str(error).split()))
        raise ValueError(
            f"the installed {package} does not support topology {topology}: {reason:.200}"
        ) from None
    return chip, devices


def _compile_exp(device: Any) -> None:
    """Compiles the smallest program that needs all parts of the GPU compiler: ptxas, and the library of exp."""
    x = jax.ShapeDtypeStruct((8,), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
    jax.jit(jax.numpy.exp).lower(x).compile()


def gpu_spec(gpu: Gpu) -> str:
    """A GPU for XLA's compiler, as text of its `GpuTargetConfigProto`."""
    units, threads, shared, optin = _MULTIPROCESSORS.get(gpu.capability, _OTHER_MULTIPROCESSORS)
    major, _, minor = f"{gpu.capability:.1f}".partition(".")
    kind = json.dumps(gpu.kind)
    # sm_90a and sm_100a: instructions of these architectures alone.
    features = "feature_extension: ACCELERATED_FEATURES" if gpu.capability in (9.0, 10.0) else ""
    return f"""
gpu_device_info {{
  name: {kind}
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  core_count: {gpu.cores}
  fpus_per_core: {units}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory:.0f}
  memory_bandwidth: {gpu.memory_rate:.0f}
  l2_cache_size: {gpu.cache}
  shared_memory_per_block: {48 << 10}
  shared_memory_per_core: {shared << 10}
  shared_memory_per_block_optin: {optin << 10}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {threads}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 1 }}
device_description_str: {kind}
"""


def _answer_for_targets(gpu: Gpu) -> None:
    """Lets JAX's checks of cuDNN attention ask about the GPU that is compiled for, not about this machine."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    COMPILED_FOR[gpu.kind] = gpu.capability
    for name, check in _CHECKS.items():
        setattr(fused, name, check)


_CHECKS: dict[str, Callable[..., Any]] = {
    "check_cudnn_version": lambda: 91001,
    "check_compute_capability": lambda least: target_capability() >= float(least),
    "is_cuda_compute_capability_equal": lambda same: target_capability() == float(same),
}


def _parse_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
    match = _TOPOLOGY.fullmatch(topology)
    name = topology.partition(":")[0] if match is None else match[1]
    if match is not None and name.endswith((".yaml", ".yml")):
        return _read_gpu(Path(name)), _gpu_shape(topology, name, match[2])
    if name in GPUS:
        return GPUS[name], _gpu_shape(topology, name, "0" if match is None else match[2])
    if match is None or name not in TPUS:
        tpus = [f"{tpu.name}:{'x'.join(['4'] * tpu.dimensions)}" for tpu in TPUS.values()]
        gpus = [f"{name}:8" for name in GPUS]
        raise ValueError(
            f"topology must be GPU:COUNT, GPU:HOSTSxCOUNT or TPU:SHAPE, such as {', '.join([*gpus, *tpus])}; got "
            f"{topology!r}{_suggest(name)}"
        )
    chip, shape = TPUS[name], tuple(int(n) for n in match[2].split("x"))
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


def _suggest(name: str) -> str:
    # By its letters, "a100" is closer to "h100" than to "a100-80".
    known = sorted([*TPUS, *GPUS])
    if name and (begins := [other for other in known if other.startswith(name.lower())]):
        return f"; did you mean {' or '.join(map(repr, begins))}?"
    return suggest(name.lower(), known, fallback=False)


def _gpu_shape(topology: str, name: str, text: str) -> tuple[int, int]:
    shape = tuple(int(n) for n in text.split("x"))
    if len(shape) > 2 or 0 in shape or math.prod(shape) > MAX_GPUS:
        raise ValueError(
            f"topology for a GPU must have the form {name}:COUNT or {name}:HOSTSxCOUNT, with at most {MAX_GPUS:,} "
            f"GPUs, got {topology!r}"
        )
    return (1, *shape) if len(shape) == 1 else shape  # pyright: ignore[reportReturnType]


MAX_GPUS = 4096


def _read_gpu(file: Path) -> Gpu:
    """A GPU from a YAML file with the fields of `Gpu`; raises ValueError for any other content."""
    return check_schema(Gpu, read_yaml(file, links="any"), f"GPU file {file}")


def topology_shapes(chip: Tpu) -> list[tuple[int, ...]]:
    """Available slice shapes of a chip's pods, smallest first.

    >>> topology_shapes(TPUS["v4"])[:6]
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
