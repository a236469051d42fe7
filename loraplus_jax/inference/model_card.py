"""The README.md of an export, a model card: how to load the export, how it was trained, and its evaluation."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .._utils.validation import escape_controls
from ..data.fetch import is_public
from ..interop.adapter_directory import Adapter
from ..interop.peft_files import OWN_TENSORS_FILE
from ..models.checkpoints.gguf.file import GgufFile
from ..models.checkpoints.transformers_class import TransformersClass
from ..settings.schema import DataSettings
from .predict import TunedModel

PAPER = "https://arxiv.org/abs/2402.12354"
TASK_TYPES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "multiple_choice": "multiple-choice",
    "instruction": "text-generation",
    "generation": "text-generation",
}
"""The Hub's names for the kinds of tasks."""


class ExportKind(NamedTuple):
    """A kind of export.

    Attributes:
      title: what it is called.
      library: the Hub's name of the library that loads it, if any.
      use: how to load it; `{cls}` is the transformers class, `{base}` the arguments that load the base, `{labels}`
        the argument with the number of labels, and `{where}` the export.
    """

    title: str
    library: str | None
    use: str


ADAPTER = ExportKind(
    "PEFT adapter",
    "peft",
    """```python
from peft import PeftModel
from transformers import {cls}

model = {cls}.from_pretrained({base}{labels})
model = PeftModel.from_pretrained(model, {where!r})
```""",
)
MERGED = ExportKind(
    "Merged model",
    "transformers",
    """```python
from transformers import {cls}

model = {cls}.from_pretrained({where!r})
```""",
)
GGUF = ExportKind(
    "Merged model",
    None,
    """```bash
llama-cli -m model.gguf
```""",
)

GGUF_ADAPTER = ExportKind(
    "GGUF adapter",
    None,
    """```bash
llama-cli -m BASE.gguf --lora adapter.gguf
```

BASE.gguf is the base model as a GGUF file.""",
)

_POOLED = {
    "mean": "mean of the hidden states where the attention mask is 1",
    "cls": "hidden state of the first token",
}


def model_card(
    kind: ExportKind,
    tuned: TunedModel,
    adapter: Adapter,
    form: TransformersClass,
    summary: Mapping[str, Any],
    *,
    base: str,
    repository: str | None = None,
) -> str:
    """Writes the model card.

    Args:
      kind: what is exported.
      tuned: the run's model.
      adapter: its adapter.
      form: the transformers class that loads the export.
      summary: the contents of the run's `summary.json`; empty if it is not known.
      base: Hub id or path of the base model; with `repository` a Hub id.
      repository: the export's Hub id, if it is pushed.

    Returns:
      Markdown with YAML front matter. Without local paths if `base` is a Hub id.
    """
    sections = [f"# {kind.title}", _usage(kind, tuned, form, base, repository)]
    sections += ["## Training", _table(_training_rows(tuned, adapter, summary, base))]
    if summary:
        held_out = summary["held_out"]
        rows = [
            (escape_markup(name), *(_number(summary[when].get(name)) for when in ("before", "after")))
            for name in summary["after"]
        ]
        sections += [
            "## Evaluation",
            f"On the {escape_markup(held_out['split'])} split ({held_out['examples']:,} examples), before and "
            "after training:",
            _table([("metric", "before", "after"), *rows]),
        ]
    return f"---\n{_metadata(kind, tuned, summary, base, repository)}\n---\n\n" + "\n\n".join(sections) + "\n"


def escape_markup(text: Any) -> str:
    r"""Escapes text of a user or of others, such as labels and file names, for the card's YAML, Markdown and HTML.

    >>> print(escape_markup("my_data.csv | <b>[red](x)\x1b[2J"))
    my_data.csv &#124; &#60;b&#62;&#91;red&#93;(x)&#92;u001b&#91;2J
    """
    # By references of HTML: a viewer that does not know front matter takes its YAML for Markdown.
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", escape_controls(str(text)))


# Of _ and : those that begin or end emphasis or make a link.
_MARKUP = re.compile(r"[]!#$&*<>@[\\`|~]|(?<![^\W_])_|_(?![^\W_])|:(?=//)")


def data_names(data: DataSettings) -> list[str]:
    """The names of the training data, escaped; a local file's is without its directories."""
    return [escape_markup(shown_name(source)) for source in data.sources]


def shown_name(source: str) -> str:
    """A data set's name if others can find it by that, or else the file's name without its directories."""
    is_known = is_public(source, "data") or (source.startswith("glue/") and source.count("/") == 1)
    return source if is_known else Path(source).name


def _metadata(
    kind: ExportKind, tuned: TunedModel, summary: Mapping[str, Any], base: str, repository: str | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task, data = TASK_TYPES[tuned.task.kind], ", ".join(data_names(tuned.settings.data))
    results = [
        EvalResult(
            task,
            data,
            data,
            escape_markup(name),
            value,
            dataset_split=escape_markup(summary["held_out"]["split"]),
        )
        for name, value in summary.get("after", {}).items()
        if value is not None
    ]
    return ModelCardData(
        base_model=base if repository or is_public(base, "model") else None,
        library_name=kind.library,
        tags=["loraplus_jax", "lora"],
        eval_results=results or None,
        model_name=(repository or kind.title) if results else None,
    ).to_yaml()


def _usage(
    kind: ExportKind, tuned: TunedModel, form: TransformersClass, base: str, repository: str | None
) -> str:
    task, names = tuned.task, getattr(tuned.task, "names", ())
    loads_base = repr(base)
    if isinstance(tuned.base, GgufFile) and repository is None and os.path.exists(base):
        file = tuned.base.header.path
        loads_base = f"{str(file.parent)!r}, gguf_file={file.name!r}"
    labels = f", num_labels={len(names) or 1}" if form.heads else ""
    where = repository or "this directory"
    lines = [kind.use.format(cls=form.architecture, base=loads_base, labels=labels, where=where), ""]
    if tuned.parts.base.new and not form.heads:
        pooling = tuned.settings.model.pooling
        lines.append(
            f"transformers has no class with a head on {pooling!r} pooling, so it loads only the encoder. "
            f"The head is in {OWN_TENSORS_FILE}: multiply the {_POOLED[pooling]} by params/head/kernel and add "
            "params/head/bias."
        )
    if names:
        lines.append(f"Classes, in the order of the outputs: {', '.join(map(escape_markup, names))}.")
    if task.kind == "regression":
        lines.append(f"Predicted value: the head's output * {task.std:g} + {task.mean:g}.")
    return "\n".join(lines).rstrip()


def _training_rows(
    tuned: TunedModel, adapter: Adapter, summary: Mapping[str, Any], base: str
) -> list[tuple[str, str]]:
    settings, config, optimizer = tuned.settings, adapter.config, tuned.settings.optimizer
    counts = [f"{count:,} {escape_markup(split)}" for split, count in summary.get("examples", {}).items()]
    rates = {"all parameters": optimizer.learning_rate}
    if config is not None:
        rates = {"A": optimizer.learning_rate, "B": optimizer.learning_rate * config.lr_ratio}
        if adapter.extras:
            rates["parameters trained in full"] = optimizer.head_learning_rate or optimizer.learning_rate
    rows = [
        ("setting", "value"),
        ("base model", escape_markup(base)),
        ("task", tuned.task.kind),
        ("data", ": ".join(filter(None, [", ".join(data_names(settings.data)), ", ".join(counts)]))),
    ]
    versions = (
        "versions",
        ", ".join(escape_markup(f"{name} {version}") for name, version in tuned.notes["versions"].items()),
    )
    if combination := _combination(tuned.notes):  # of adapters with settings of their own
        return [*rows, ("combined", combination), versions]
    rows.append(
        ("method", settings.method + (f" ([LoRA+]({PAPER}))" if settings.method == "lora_plus" else ""))
    )
    if config is not None:
        rows += [
            ("rank, alpha", f"{config.rank}, {config.alpha:g}"),
            ("λ (`lr_ratio`: B's learning rate / A's)", f"{config.lr_ratio:g}"),
        ]
    rows += [
        ("learning rates", ", ".join(f"{name} {rate:g}" for name, rate in rates.items())),
        ("optimizer, schedule", f"{optimizer.name}, {optimizer.schedule}"),
    ]
    if summary:
        rows.append(("steps, batch size", f"{summary['selected_step']:,}, {settings.train.batch_size}"))
    return [*rows, versions]


def _combination(notes: Mapping[str, Any]) -> str | None:
    """How `loraplus combine` made the adapter; None if it did not, also where the user has a note of that name."""
    try:
        combined = notes["combined"]
        parts = " + ".join(f"{source['weight']:g} {source['name']}" for source in combined["adapters"])
        return escape_markup(f"{combined['how']} of {parts}")
    except (KeyError, TypeError, ValueError):
        return None


def _table(rows: list[tuple[str, ...]]) -> str:
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "| --- " * len(rows[0]) + "|", *body])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
