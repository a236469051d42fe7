"""Whether a run will fit: what its compiled programs need against what is free, before any weight is loaded."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FILES = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def check_memory(programs: Sequence[Any], device: Any, local_devices: int) -> None:
    """Raises ValueError if one of the programs needs more memory than is free.

    Args:
      programs: compiled, `jax.stages.Compiled`; they run one at a time, and what one holds stays there meanwhile.
      device: a `jax.Device`, one of those that they run on.
      local_devices: how many of them this process has; on a CPU they share the host's memory.
    """
    on_host = device.platform == "cpu"
    held, passing = map(max, zip(*map(_needed, programs), strict=True))
    times = local_devices if on_host else 1
    held, passing, free = held * times, passing * times, free_bytes(device)
    if held + passing > free:
        raise ValueError(
            f"the run needs about {_gb(held + passing)} of memory (weights, optimizer and batch {_gb(held)}, "
            f"activations and gradients {_gb(passing)}), and {_gb(free)} are free on {device.device_kind}; "
            f"{MEMORY_ADVICE}"
        )


MEMORY_ADVICE = (
    "what makes it smaller: more train.accumulate, a smaller train.batch_size, train.eval_batch_size or "
    "data.max_length, model.param_dtype bfloat16; for language models also model.remat, model.loss_chunk"
)


def free_bytes(device: Any) -> int:
    """What an accelerator says is free in its memory; for a CPU, what the machine and its control groups leave."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return min([psutil.virtual_memory().available, *_group_limits()])


def _needed(program: Any) -> tuple[int, int]:
    """Bytes that a program holds from step to step, and those it takes for the length of one."""
    sizes = program.memory_analysis()
    fresh = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes, sizes.temp_size_in_bytes + fresh


def _group_limits() -> Iterator[int]:
    """What every control group that this process is in leaves, as containers and job schedulers set them."""
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else ():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", _FILES["v1"]
        elif not controllers:
            root, names = CGROUPS, _FILES["v2"]
        else:
            continue
        group = root / path.removeprefix("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(root):
                yield from _left(directory, *names)


def _left(directory: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    """Limit less use; file pages that can be dropped do not count as used."""
    try:
        most, now = ((directory / name).read_text().strip() for name in (limit, used))
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except OSError:
        return  # not in every group, and not where the path is another container's
    if most != "max":
        yield int(most) - int(now) + int(stat.get(cached, 0))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
