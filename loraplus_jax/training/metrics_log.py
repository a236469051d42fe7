"""The log of a run: rows in `metrics.jsonl`, TensorBoard events and trackers, and a plot of the loss."""

import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._utils.atomic import atomic_write, sync, to_json, write_text
from .._utils.json_files import check_file
from ..data.fetch import cache_dir

LogRow = dict[str, Any]

METRICS, SUMMARY, PICTURE, EVENTS = "metrics.jsonl", "summary.json", "loss.png", "tensorboard"
TEXTS = {"before": "generated_before.jsonl", "after": "generated.jsonl"}


class RunLog:
    """Appends rows of numbers to `metrics.jsonl`, to TensorBoard events and to trackers.

    A number that is not finite is null in the file and NaN in `rows`. Of existing rows it keeps the first `keep`: a
    resumed run logs the rows after its checkpoint again.

    Attributes:
      path: the file.
      rows: the rows.

    Args:
      directory: where the file is.
      keep: how many existing rows to keep.
      digest: `digest()` of these rows when the checkpoint was saved.
      writes: whether to write files; of several processes only the lead does.
      check: called before every write; raises if the directory is not there any more.
      open_reports: opens what rows are reported to, a `Reports`, from `(step, values)` of the rows in the file
        before it is cut to `keep`; called only if it writes.

    Raises:
      ValueError: the existing rows are not those of `digest`; the file is left as it is.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 0,
        digest: str | None = None,
        writes: bool = True,
        check: Callable[[], None] | None = None,
        open_reports: Callable[[list[tuple[int, dict[str, float]]]], Any] | None = None,
    ) -> None:
        self.path, self._writes, self._check = directory / METRICS, writes, check or (lambda: None)
        lines = []
        if self.path.exists():
            check_file(self.path)
            # A kill may have cut the last line off; what ends in a line break is whole.
            lines = self.path.read_bytes().split(b"\n")[:-1]
        lines, later = lines[:keep], lines[keep:]
        kept = b"".join(line + b"\n" for line in lines)
        self._digest = hashlib.sha256(kept)
        if digest not in (None, self.digest()):
            raise ValueError(
                f"{self.path} was changed: of {len(lines)} complete rows the first {keep} must be those that the "
                "checkpoint was saved with; restore the original file, or start over with --fresh"
            )
        self.rows = [_parse_row(line) for line in lines]
        self._reports, self._finished, self._open = None, False, contextlib.ExitStack()
        if not writes:
            return
        with contextlib.ExitStack() as stack:  # if one cannot be opened, the others are closed
            if open_reports is not None:
                logged = [*self.rows]
                with contextlib.suppress(ValueError):  # the checkpoint's digest is not of these
                    logged += [_parse_row(line) for line in later]
                # Before the file is cut: what it had says what was sent.
                self._reports = reports = open_reports([(row["step"], _tags(row)) for row in logged])
                stack.callback(lambda: reports.close(self._finished))
            write_text(self.path, kept.decode())
            self._file = stack.enter_context(self.path.open("a", encoding="utf-8"))
            writer, self._types = _load_tensorboard()
            (directory / EVENTS).mkdir(exist_ok=True)
            # Writes synchronously. On a full disk, the thread of SummaryWriter blocks forever.
            self._events = writer.EventsWriter(str(directory / EVENTS / "events"))
            stack.callback(self._events.close)
            if self.rows:  # tell TensorBoard to drop the events after the step that the run resumes from
                start = {"status": self._types.SessionLog.SessionStatus.START}
                self._write_event(self.rows[-1]["step"] + 1, session_log=start)
            for row in self.rows:
                self._report(row)
            if self._reports is not None:
                self._reports.catch_up()
            self._open = stack.pop_all()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row."""
        line = to_json({"step": step, **{name: float(value) for name, value in values.items()}}) + "\n"
        self._digest.update(line.encode())
        self.rows.append(_parse_row(line))
        if not self._writes:
            return
        self._check()
        self._file.write(line)
        self._file.flush()
        tags = _tags(self.rows[-1])
        self._write_event(
            step, summary={"value": [{"tag": tag, "simple_value": value} for tag, value in tags.items()]}
        )
        self._events.flush()
        self._report(self.rows[-1])

    def _report(self, row: LogRow) -> None:
        if self._reports is not None:
            self._reports.log(row["step"], _tags(row))

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(self._types.Event(wall_time=time.time(), step=step, **content))

    def digest(self) -> str:
        """A short hex digest of the bytes of all rows."""
        return self._digest.hexdigest()[:16]

    def sync(self) -> None:
        """Flushes all rows and the directory entry to disk, so that they survive a power loss."""
        if not self._writes:
            return
        self._check()
        os.fsync(self._file.fileno())
        # After a power loss a new file is there only if its directory was flushed too.
        sync(self.path.parent)

    def values(self, name: str) -> list[tuple[int, float]]:
        """The `(step, value)` pairs of all rows with this name."""
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def close(self, *, finished: bool = False) -> None:
        """Closes the files, and ends what rows are reported to, as finished or as interrupted."""
        self._finished = finished
        self._open.close()


def _tags(row: LogRow) -> dict[str, float]:
    # TensorBoard groups names by what is before their first slash.
    return {name if "/" in name else f"train/{name}": value for name, value in row.items() if name != "step"}


def _load_tensorboard() -> tuple[Any, Any]:
    # tensorboardX imports torch if it is installed, only to accept its tensors, and that takes seconds.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2
    finally:
        if hidden:
            del sys.modules["torch"]
    return event_file_writer, event_pb2


def _parse_row(line: str | bytes) -> LogRow:
    return {name: math.nan if value is None else value for name, value in json.loads(line).items()}


def pyplot() -> Any:
    """Imports matplotlib.pyplot with a file-only backend."""
    # Here and not at the top: a slow import, which most commands do not need.
    # By default matplotlib writes its font cache to the home directory, and warns if it cannot.
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, atomically, and closes it."""
    with atomic_write(path) as written:
        figure.savefig(written, dpi=120, format="png")
    pyplot().close(figure)


def draw_loss(path: Path, log: RunLog, metric: str, title: str) -> None:
    """Plots the training loss (raw and smoothed), the validation loss and the validation metric."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    curves = [log.values(name) for name in ("loss", "validation/loss", f"validation/{metric}")]
    (steps, loss), validation_loss, validation_metric = (
        [*zip(*curve, strict=True)] or ((), ()) for curve in curves
    )
    left.plot(steps, loss, color="tab:blue", alpha=0.25, linewidth=1)
    left.plot(steps, smooth(loss), color="tab:blue", linewidth=2, label="training (smoothed)")
    left.plot(*validation_loss, "o-", color="tab:orange", label="validation")
    left.set(xlabel="step", ylabel="loss", title="Loss", ylim=(0, None))
    right.plot(*validation_metric, "o-", color="tab:orange")
    right.set(xlabel="step", ylabel=metric, title=f"Validation {metric}")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, parse_math=False)
    save_figure(figure, path)


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
