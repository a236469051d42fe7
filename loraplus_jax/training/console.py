"""What a run shows on the screen: what is about to be trained, and how far it is."""

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..tasks.causal_lm import head_is_frozen
from ..tasks.interface import row_count
from ..tree import count
from .setup import Run


def header(run: Run, step: int) -> Iterator[str]:
    """The lines that say what is about to be trained, and from which step."""
    settings, sizes = run.settings, run.data.examples
    trained = count(run.parts.trainable)
    total = trained + count(run.parts.frozen)
    method = settings.method
    if run.config is not None:
        method += f" (rank {run.config.rank}, lr_ratio {run.config.lr_ratio:g})"
    share = f"{100 * trained / total:.2f} %"
    yield f"{method}: training {trained:,} of {total:,} parameters ({share}) for {run.steps} steps"
    if settings.is_language and not head_is_frozen(run.parts):
        yield "the head is trained, so the loss needs all logits: model.loss_chunk is not used"
    unused = {"lora": "lora.lr_ratio (it is 1)", "full": "the section lora"}.get(settings.method)
    if unused:
        yield f"method {settings.method} does not use {unused}"
    yield "data: " + ", ".join(f"{size:,} {name}" for name, size in sizes.items())
    length = settings.data.max_length
    if (rows := row_count(run.data.splits["train"])) != sizes["train"]:
        yield f"packed: {rows:,} rows of {length} tokens to train on"
    if cut := sum(run.data.truncated.values()):
        yield f"{cut:,} of {sum(sizes.values()):,} examples are longer than {length} tokens and are cut"
    if step:
        yield f"going on from step {step} of {run.steps}"


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Metrics in a line.

    >>> format_metrics({"accuracy": 0.75, "loss": 0.5})
    'accuracy 0.7500, loss 0.5000'
    """
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def progress(console: Console) -> Progress:
    """Steps done, loss, step/s and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} step/s"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
