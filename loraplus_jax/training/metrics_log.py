"""The log of a run: rows in `metrics.jsonl`, TensorBoard events, and a plot of the loss."""

import importlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.fetch import cache_dir

LogRow = dict[str, Any]

METRICS, SUMMARY, PICTURE, EVENTS = "metrics.jsonl", "summary.json", "loss.png", "tensorboard"


class RunLog:
    """Appends rows of numbers to `metrics.jsonl` and to TensorBoard events.

    In a directory with existing rows it keeps the first `keep`; a resumed run logs the rows after its checkpoint
    again. With fewer rows than `keep` it raises ValueError and leaves the file unchanged. With `writes=False` rows
    stay in memory; of several processes only the lead writes.
    """

    def __init__(self, directory: Path, *, keep: int = 0, writes: bool = True) -> None:
        self.path = directory / METRICS
        self.rows = read_rows(self.path, most=keep)
        if len(self.rows) < keep:
            raise ValueError(
                f"{self.path} has {len(self.rows)} complete rows, but the checkpoint to resume from was saved "
                f"after {keep}: restore the original file, or start over with --fresh"
            )
        self._writes = writes
        if not writes:
            return
        step = self.rows[-1]["step"] if self.rows else 0
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = self.path.open("a", encoding="utf-8")
        self._events = _events_writer(directory / EVENTS, step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row."""
        row = {"step": step, **{name: float(value) for name, value in values.items()}}
        self.rows.append(row)
        if not self._writes:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._events.write_event(_scalars(step, values))
        self._events.flush()

    def sync(self) -> None:
        """Flushes all rows and the directory entry to disk, so that they survive a power loss."""
        if not self._writes:
            return
        os.fsync(self._file.fileno())
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def values(self, name: str) -> list[tuple[int, float]]:
        """The `(step, value)` pairs of all rows with this name."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def close(self) -> None:
        """Closes the files."""
        if not self._writes:
            return
        self._file.close()
        self._events.close()


def _events_writer(directory: Path, step: int) -> Any:
    """Opens a TensorBoard event file with synchronous writes; on a full disk, SummaryWriter blocks forever.

    A run that resumes from a step tells TensorBoard to drop all later events.
    """
    from tensorboardX.event_file_writer import EventsWriter

    directory.mkdir(exist_ok=True)
    writer = EventsWriter(str(directory / "events"))
    if step:
        start = {"status": _proto("event").SessionLog.SessionStatus.START}
        writer.write_event(_proto("event").Event(wall_time=time.time(), step=step + 1, session_log=start))
    return writer


def _scalars(step: int, values: Mapping[str, float]) -> Any:
    """Makes a TensorBoard event; names with a slash are grouped by their first part, others under `train`."""
    named = {name if "/" in name else f"train/{name}": float(value) for name, value in values.items()}
    summary = {"value": [{"tag": tag, "simple_value": value} for tag, value in named.items()]}
    return _proto("event").Event(wall_time=time.time(), step=step, summary=summary)


def _proto(name: str) -> Any:
    """Imports a module of generated protobuf classes, which type checkers cannot analyze."""
    return importlib.import_module(f"tensorboardX.proto.{name}_pb2")


def read_rows(path: Path, most: int | None = None) -> list[LogRow]:
    """Reads the rows of a `metrics.jsonl`, at most the first `most`; an incomplete last line is ignored.

    Raises:
      ValueError: a line is not JSON or not a row; the message names it.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1][:most], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not a row of numbers: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}:{number}: expected a row of numbers with a step, got {line[:40]!r}")
        rows.append(row)
    return rows


def partial_path(path: Path) -> Path:
    """The temporary path for writing a file before it is renamed to `path`."""
    return path.with_name(f".{path.name}.partial")


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def pyplot() -> Any:
    """Imports matplotlib.pyplot with a file-only backend; a late import, because it is slow."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_loss(path: Path, log: RunLog, metric: str, title: str) -> None:
    """Plots the training loss (raw and smoothed), the validation loss and the validation metric."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps, loss = _split_pairs(log.values("loss"))
    left.plot(steps, loss, color="tab:blue", alpha=0.25, linewidth=1)
    left.plot(steps, smooth(loss), color="tab:blue", linewidth=2, label="training (smoothed)")
    left.plot(*_split_pairs(log.values("validation/loss")), "o-", color="tab:orange", label="validation")
    left.set(xlabel="step", ylabel="loss", title="Loss", ylim=(0, None))
    right.plot(*_split_pairs(log.values(f"validation/{metric}")), "o-", color="tab:orange")
    right.set(xlabel="step", ylabel=metric, title=f"Validation {metric}")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    partial = partial_path(path)
    figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
    os.replace(partial, path)


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average with decay `weight` and bias correction.

    >>> smooth([1.0, 1.0, 4.0], weight=0.5)
    [1.0, 1.0, 2.7142857142857144]
    """
    total = norm = 0.0
    result = []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1.0
        result.append(total / norm)
    return result


def _split_pairs(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in pairs], [value for _, value in pairs]
