"""What a run shows: rows of numbers, TensorBoard events and a picture of the loss."""

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

    Opened on a directory with older rows, it keeps the first `keep`: what was logged after the checkpoint that a
    run goes on from will be logged again. If there are fewer, that is a ValueError and the file stays as it is.
    With `writes=False` it only keeps them in memory: of several processes one writes for all.
    """

    def __init__(self, directory: Path, *, keep: int = 0, writes: bool = True) -> None:
        self.path = directory / METRICS
        self.rows = read_rows(self.path, most=keep)
        if len(self.rows) < keep:
            raise ValueError(
                f"{self.path} has {len(self.rows)} whole rows, and the checkpoint that the run goes on from was "
                f"saved after {keep}: put the file back as the run left it, or start over with --fresh"
            )
        self._writes = writes
        if not writes:
            return
        step = self.rows[-1]["step"] if self.rows else 0
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = self.path.open("a", encoding="utf-8")
        self._events = _events_writer(directory / EVENTS, step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        row = {"step": step, **{name: float(value) for name, value in values.items()}}
        self.rows.append(row)
        if not self._writes:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._events.write_event(_scalars(step, values))
        self._events.flush()

    def sync(self) -> None:
        """Has all rows, and the file's name, on the disk, should the machine be switched off."""
        if not self._writes:
            return
        os.fsync(self._file.fileno())
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def values(self, name: str) -> list[tuple[int, float]]:
        """`(step, value)` of every row that has the name."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def close(self) -> None:
        """Ends the files."""
        if not self._writes:
            return
        self._file.close()
        self._events.close()


def _events_writer(directory: Path, step: int) -> Any:
    """TensorBoard's file, written at once: SummaryWriter's thread dies of a full disk and then blocks for ever.

    A run that goes on from a step tells TensorBoard to forget what came after it.
    """
    from tensorboardX.event_file_writer import EventsWriter

    directory.mkdir(exist_ok=True)
    writer = EventsWriter(str(directory / "events"))
    if step:
        start = {"status": _proto("event").SessionLog.SessionStatus.START}
        writer.write_event(_proto("event").Event(wall_time=time.time(), step=step + 1, session_log=start))
    return writer


def _scalars(step: int, values: Mapping[str, float]) -> Any:
    """One TensorBoard event; names with a slash are grouped by their first part, others under `train`."""
    named = {name if "/" in name else f"train/{name}": float(value) for name, value in values.items()}
    summary = {"value": [{"tag": tag, "simple_value": value} for tag, value in named.items()]}
    return _proto("event").Event(wall_time=time.time(), step=step, summary=summary)


def _proto(name: str) -> Any:
    """A module of generated classes, which type checkers cannot see into."""
    return importlib.import_module(f"tensorboardX.proto.{name}_pb2")


def read_rows(path: Path, most: int | None = None) -> list[LogRow]:
    """The rows of a `metrics.jsonl`, all or the first; a last line cut short by a sudden end is left out.

    Raises:
      ValueError: a line is not JSON, or no row; it is named.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1][:most], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: no row of numbers: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}:{number}: no row of numbers with its step: {line[:40]!r}")
        rows.append(row)
    return rows


def partial_path(path: Path) -> Path:
    """Where a file is written before it is renamed into its place."""
    return path.with_name(f".{path.name}.partial")


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or, if interrupted, none of it."""
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def pyplot() -> Any:
    """matplotlib's, for files alone; imported here since it takes long."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_loss(path: Path, log: RunLog, metric: str, title: str) -> None:
    """A picture of the training loss, raw and smoothed, with the validation loss, and of the validation metric."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps, loss = _columns(log.values("loss"))
    left.plot(steps, loss, color="tab:blue", alpha=0.25, linewidth=1)
    left.plot(steps, smooth(loss), color="tab:blue", linewidth=2, label="training (smoothed)")
    left.plot(*_columns(log.values("validation/loss")), "o-", color="tab:orange", label="validation")
    left.set(xlabel="step", ylabel="loss", title="Loss", ylim=(0, None))
    right.plot(*_columns(log.values(f"validation/{metric}")), "o-", color="tab:orange")
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
    """A running mean in which each older value counts `weight` times the next, without bias at the start.

    >>> smooth([1.0, 1.0, 4.0], weight=0.5)
    [1.0, 1.0, 2.7142857142857144]
    """
    total = norm = 0.0
    result = []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1.0
        result.append(total / norm)
    return result


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in pairs], [value for _, value in pairs]
