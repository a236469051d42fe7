"""Checks before loading any weights that the compiled programs of a run fit into free memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def check_memory(programs: Sequence[Any], device: Any, local_devices: int) -> None:
    """Raises ValueError if one of the programs needs more memory than is free.

    Args:
      programs: the `jax.stages.Compiled` programs. They run one at a time, but the arguments of all stay in memory.
      device: one of the `jax.Device`s that they run on.
      local_devices: the number of devices of this process; on a CPU they share the host's memory.
    """
    on_host = device.platform == "cpu"
    resident, temporary = map(max, zip(*map(_program_bytes, programs), strict=True))
    copies = local_devices if on_host else 1
    resident, temporary, free = resident * copies, temporary * copies, free_bytes(device)
    if resident + temporary > free:
        raise ValueError(
            f"not enough memory on {device.device_kind}: the run needs about {_format_gb(resident + temporary)} "
            f"(weights, optimizer state and batch {_format_gb(resident)}, activations and gradients "
            f"{_format_gb(temporary)}), {_format_gb(free)} are free; {MEMORY_ADVICE}"
        )


MEMORY_ADVICE = (
    "to save memory, raise train.accumulate; lower train.batch_size, train.eval_batch_size or data.max_length; "
    "set model.param_dtype bfloat16; for language models also set model.remat or lower model.loss_chunk"
)


def free_bytes(device: Any) -> int:
    """Free memory in bytes: as an accelerator reports it, or on a CPU within the machine and cgroup limits."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return min([psutil.virtual_memory().available, *_cgroup_free_bytes()])


def _program_bytes(program: Any) -> tuple[int, int]:
    """Bytes of a program's arguments, which stay in memory, and bytes that it needs only while it runs."""
    sizes = program.memory_analysis()
    fresh = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes, sizes.temp_size_in_bytes + fresh


def _cgroup_free_bytes() -> Iterator[int]:
    """Yields the free bytes of this process's cgroups (v2); containers and job schedulers set their limits."""
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else ():
        if not line.startswith("0::"):
            continue  # a hierarchy of v1
        group = CGROUPS / line.removeprefix("0::").removeprefix("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(CGROUPS):
                yield from _free_bytes_of_cgroup(directory)


def _free_bytes_of_cgroup(directory: Path) -> Iterator[int]:
    """Yields limit minus usage, if there is a limit; reclaimable file pages do not count as used."""
    try:
        limit, used = ((directory / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except OSError:
        return  # some cgroups lack these files, and the path may belong to another container
    if limit != "max":
        yield int(limit) - int(used) + int(stat.get("inactive_file", 0))


def _format_gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
