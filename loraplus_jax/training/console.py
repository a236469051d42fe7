"""Console output of a run: the header, metrics, the progress bar and, without one, lines of progress."""

import datetime
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .._utils.validation import escape_controls
from ..adapter.tree import count
from ..settings.schema import IGNORED, Settings
from ..tasks.causal_lm import head_is_frozen
from ..tasks.interface import AdaptedModel, TaskData
from .setup import Run

SECONDS_PER_LINE = 30.0
"""`ProgressLines` prints after the first unit that ends later than this after the line before."""


class LineConsole(Console):
    """A rich console that prints strings as they are: no markup or emoji codes, control characters escaped."""

    def __init__(self, **options: Any) -> None:
        # rich would read [q_proj] as a style tag, wrap lines in a log file, and display each as HTML in a notebook.
        plain = {"soft_wrap": True, "markup": False, "emoji": False, "force_jupyter": False}
        super().__init__(**{**plain, **options})

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints strings and other objects; several lines are several strings, with a line break as `sep`."""
        super().print(*(escape_controls(x) if isinstance(x, str) else x for x in objects), **options)


def lines_only(console: Console | None) -> LineConsole:
    """The console of a run, by default a new one; raises TypeError for one that interprets a user's strings."""
    if console is not None and not isinstance(console, LineConsole):
        raise TypeError(f"console must be a LineConsole, got {type(console).__name__}")
    return console or LineConsole()


def header(run: Run, step: int) -> Iterator[str]:
    """Yields the lines printed before training: model, method, data and starting step."""
    settings, sizes = run.settings, run.data.examples
    trained = count(run.parts.trainable)
    total = trained + count(run.parts.frozen)
    method = settings.method
    if (config := settings.applied) is not None:
        method += f" (rank {config.rank}, lr_ratio {config.lr_ratio:g})"
    share = f"{100 * trained / total:.2f} %"
    yield f"{method}: training {trained:,} of {total:,} parameters ({share}) for {run.steps} steps"
    yield from ignored_lines(settings, run.parts)
    yield from data_lines(run.data)
    length = settings.data.max_length
    yield from run.batches.summary
    if truncated := sum(run.data.truncated.values()):
        yield f"truncated {truncated:,} of {sum(sizes.values()):,} examples to data.max_length {length}"
    if step:
        yield f"resuming from step {step} of {run.steps}"


def ignored_lines(settings: Settings, parts: AdaptedModel) -> Iterator[str]:
    """Yields which settings have no effect with the method, or because the LM head is trained."""
    if settings.is_language and not head_is_frozen(parts):
        yield "the LM head is trained, so the loss needs the full logits: model.loss_chunk is ignored"
    if settings.method in IGNORED:
        yield f"method {settings.method} ignores {' and '.join(IGNORED[settings.method])}"


def data_lines(data: TaskData) -> Iterator[str]:
    """Yields the sizes of the splits, and what else to know about the data before training."""
    yield "data: " + ", ".join(f"{size:,} {name}" for name, size in data.examples.items())
    yield from data.summary


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Formats metrics as one line.

    >>> format_metrics({"accuracy": 0.75, "loss": 0.5})
    'accuracy 0.7500, loss 0.5000'
    """
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def progress(console: Console) -> Progress:
    """A progress bar with steps done, loss, steps per second and remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} step/s"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not shows_bar(console),
    )


def shows_bar(console: Console) -> bool:
    """Whether a progress bar can redraw itself: on a terminal, but in no notebook, nor in what its cells start."""
    # Not `console.is_terminal`: a notebook's kernel sets FORCE_COLOR.
    return console.file.isatty() and "JPY_PARENT_PID" not in os.environ


class ProgressLines:
    """Prints a line with speed and remaining time about every half minute, where no progress bar is shown."""

    def __init__(self, console: Console, unit: str, total: int, done: int = 0) -> None:
        self.console, self.unit, self.total = console, unit, total
        self.restart(done)

    def restart(self, done: int) -> None:
        """Measures speed and time from now, after work that is not counted in units."""
        self.done, self.clock = done, time.perf_counter()

    def update(self, done: int, *, loss: Any = None) -> None:
        """Prints a line if it is time."""
        seconds = time.perf_counter() - self.clock
        if done == self.done or seconds < SECONDS_PER_LINE:
            return
        # Only now the loss is read: that waits for the step.
        detail = "" if loss is None else f"loss {float(loss):.4f}, "
        rate = (done - self.done) / seconds
        left = datetime.timedelta(seconds=round((self.total - done) / rate))
        self.console.print(
            f"{self.unit} {done} of {self.total}: {detail}{rate:.3g} {self.unit.split()[-1]}/s, {left} left"
        )
        self.restart(done)
