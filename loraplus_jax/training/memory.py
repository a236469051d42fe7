"""Checks before loading any weights that the compiled programs of a run fit into free memory."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


MEMORY_ADVICE = (
    "to save memory, raise train.accumulate; lower train.batch_size, train.eval_batch_size or data.max_length; "
    "set model.param_dtype bfloat16; for language models also set model.remat or lower model.loss_chunk"
)


def check_memory(programs: Sequence[Any], devices: Sequence[Any]) -> None:
    """Raises ValueError if one of the programs needs more memory than is free.

    Args:
      programs: the `jax.stages.Compiled` programs. They run one at a time, but the arguments of all stay in memory.
      devices: the `jax.Device`s of this process that they run on; on a CPU these share the host's memory.
    """
    device = devices[0]
    (resident, temporary), free = needed_bytes(programs, devices), free_bytes(device)
    if resident + temporary > free:
        needed, weights, passing, free = (
            f"{size / 1e9:.2f} GB" for size in (resident + temporary, resident, temporary, free)
        )
        raise ValueError(
            f"not enough memory on {device.device_kind}: the run needs about {needed} (weights, optimizer state "
            f"and batch {weights}, activations and gradients {passing}), {free} are free; {MEMORY_ADVICE}"
        )


def needed_bytes(programs: Sequence[Any], devices: Sequence[Any]) -> tuple[int, int]:
    """Bytes that the programs' arguments take, and that a program takes while it runs; as for `check_memory`."""
    sizes = [program.memory_analysis() for program in programs]
    resident = max(size.argument_size_in_bytes for size in sizes)
    # A donated argument's memory is an output's: it counts once.
    temporary = max(
        size.temp_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes for size in sizes
    )
    copies = len(devices) if devices[0].platform == "cpu" else 1
    return resident * copies, temporary * copies


def expected_peak(programs: Sequence[Any], devices: Sequence[Any]) -> int:
    """Peak memory in bytes of the programs, once their arguments are loaded: on a CPU that of the process."""
    resident, temporary = needed_bytes(programs, devices)
    if devices[0].platform == "cpu":
        resident = psutil.Process().memory_info().rss
    return resident + temporary


def free_bytes(device: Any) -> int:
    """Free memory in bytes: as an accelerator reports it, or on a CPU within the machine and cgroup limits."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return free_host_bytes()


def free_host_bytes() -> int:
    """Free memory in bytes within the machine and cgroup limits."""
    return min([psutil.virtual_memory().available, *_cgroup_free_bytes()])


def _cgroup_free_bytes() -> Iterator[int]:
    """Yields limit minus usage of this process's cgroups (v2); containers and job schedulers set limits."""
    lines = MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else []
    for line in lines:
        if not line.startswith("0::"):
            continue  # a hierarchy of v1
        group = CGROUPS / line.removeprefix("0::").removeprefix("/")
        for directory in (group, *group.parents):
            # Some cgroups lack these files, and the path may belong to another container.
            with contextlib.suppress(OSError):
                limit, used = (
                    (directory / name).read_text().strip() for name in ("memory.max", "memory.current")
                )
                stat = dict(x.split() for x in (directory / "memory.stat").read_text().splitlines())
                if limit != "max":  # file pages that the system can reclaim do not count as used
                    yield int(limit) - int(used) + int(stat.get("inactive_file", 0))
