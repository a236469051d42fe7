"""Where the time of a traced step goes, by component, from JAX's profiler and the compiled program's text."""

import collections
import re
from collections.abc import Iterator
from pathlib import Path

# The first pattern that an operation's name matches decides; names end in the module's path and the primitive.
COMPONENTS = {
    "adapters": r"/lora/",
    "products with the layers' weights": r"_proj/dot_general",
    "rotary positions": r"/rope/",
    "attention: products": r"self_attn/.*dot_general",
    "norms": r"norm/",
    "attention: softmax and layouts": r"self_attn/",
    "SiLU and its product": r"mlp/",
    "residual sums": r"layers/",
    "loop: saved activations": r"dynamic_update",
    "head: products": r"(vd->|dv->|->btv|->btd).*dot_general",
    "loss": r"while/body/closed_call/(?!layers)|take|gather",
    "embedding and rest of the model": r"LoRAPlusModel|Llama|jvp\(",
    "optimizer": r".",
}
SLICES, REST, IDLE = (
    "loop: slices of stacked weights",
    "zeros and copies around the loops",
    "no operation running",
)


def components(directory: Path, hlo: str, rows: tuple[int, int]) -> dict[str, float]:
    """Seconds by component; together, the time from the first operation to the last.

    An instant belongs to the operations that run in it, in equal parts: XLA runs independent ones at once, and
    helpers of a parallel one leave no trace of their own.

    Args:
      directory: of `jax.profiler.trace` around a step.
      hlo: text of the compiled program.
      rows: batch size and tokens, which tell saved activations from slices of weights.
    """
    seconds = collections.Counter()
    lines = {match[1]: match[0] for match in re.finditer(r"%([\w.\-]+) = .*", hlo)}
    for name, value in _shares(_intervals(directory, lines)).items():
        seconds[_component(lines.get(name), rows)] += value
    return dict(seconds.most_common())


def _component(line: str | None, rows: tuple[int, int]) -> str:
    """The component of an operation by its line of the program; None for no operation."""
    if line is None:
        return IDLE
    name = re.search(r'op_name="([^"]*)"', line)
    if name is None:
        return REST
    if name[1].endswith("dynamic_slice"):
        shape, (batch, tokens) = line.split(" = ")[1], rows
        is_saved = re.match(rf"\w+\[({batch * tokens}|{batch},{tokens})\b", shape)
        return "loop: saved activations" if is_saved else SLICES
    return next(component for component, pattern in COMPONENTS.items() if re.search(pattern, name[1]))


def _intervals(directory: Path, lines: dict[str, str]) -> Iterator[tuple[float, float, str]]:
    """(start, end, operation) of every moment on every thread, by the innermost operation then running, in ns."""
    from jax.profiler import ProfileData

    (path,) = directory.rglob("*.xplane.pb")
    for plane in ProfileData.from_file(str(path)).planes:
        for thread in plane.lines:
            found = [e for e in thread.events if e.name in lines and not _is_loop(lines[e.name])]
            edges = sorted(
                edge
                for e in found
                for edge in ((e.start_ns, 1, e.name), (e.start_ns + e.duration_ns, 0, e.name))
            )
            running: list[str] = []
            before = 0.0
            for at, begins, name in edges:
                if running and at > before:
                    yield before, at, running[-1]
                if begins:
                    running.append(name)
                elif name in running:
                    running.remove(name)
                before = at


def _is_loop(line: str) -> bool:
    return re.search(r"[\])}] (while|call|conditional)\(", line) is not None


def _shares(intervals: Iterator[tuple[float, float, str]]) -> dict[str, float]:
    """Seconds by operation; `""` for moments without any."""
    edges = sorted(edge for start, end, name in intervals for edge in ((start, 1, name), (end, -1, name)))
    running, seconds, before = collections.Counter(), collections.Counter(), edges[0][0] if edges else 0.0
    for at, change, name in edges:
        total = running.total()
        for other, count in running.items() if total else (("", 1),):
            seconds[other] += 1e-9 * (at - before) * count / max(total, 1)
        running[name] += change
        running += collections.Counter()  # drops zeros
        before = at
    return seconds
