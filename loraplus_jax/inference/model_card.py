"""The README.md of an export, a model card: how to load the export, how it was trained, and its evaluation."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from .._utils.validation import escape_controls
from ..data.fetch import is_public
from ..data.options import DataOptions
from ..interop.adapter_directory import Adapter
from ..interop.peft_files import OWN_TENSORS_FILE
from ..models.checkpoints.gguf.file import GgufFile
from ..models.checkpoints.transformers_class import TransformersClass
from .tuned_model import TunedModel

TEMPLATE = Path(__file__).with_suffix(".md.jinja")
PAPER = "https://arxiv.org/abs/2402.12354"
TASK_TYPES = {
    "classification": "text-classification",
    "regression": "text-classification",
    "multiple_choice": "multiple-choice",
    "instruction": "text-generation",
    "generation": "text-generation",
}
"""The Hub's names for the kinds of tasks."""


KINDS = {
    "adapter": ("PEFT adapter", "peft"),
    "merged": ("Merged model", "transformers"),
    "gguf": ("Merged model", None),
    "gguf_adapter": ("GGUF adapter", None),
}
"""What each kind of export is called, and the Hub's name of the library that loads it, if any."""
_POOLED = {
    "mean": "mean of the hidden states where the attention mask is 1",
    "cls": "hidden state of the first token",
}


def model_card(
    kind: str,
    tuned: TunedModel,
    adapter: Adapter,
    form: TransformersClass,
    summary: Mapping[str, Any],
    *,
    base: str,
    repository: str | None = None,
) -> str:
    """Renders the model card.

    Args:
      kind: what is exported, one of `KINDS`.
      tuned: the run's model.
      adapter: its adapter.
      form: the transformers class that loads the export.
      summary: the contents of the run's `summary.json`; empty if it is not known.
      base: Hub id or path of the base model; with `repository` a Hub id.
      repository: the export's Hub id, if it is pushed.

    Returns:
      Markdown with YAML front matter. Without local paths if `base` is a Hub id.
    """
    settings, config, optimizer = tuned.settings, adapter.config, tuned.settings.optimizer
    loads_base = repr(base)
    if isinstance(tuned.base, GgufFile) and repository is None and os.path.exists(base):
        file = tuned.base.header.path
        loads_base = f"{str(file.parent)!r}, gguf_file={file.name!r}"
    rates = {"all parameters": optimizer.learning_rate}
    if config is not None:
        rates = {"A": optimizer.learning_rate, "B": optimizer.learning_rate * config.lr_ratio}
        if adapter.extras:
            rates["parameters trained in full"] = optimizer.head_learning_rate or optimizer.learning_rate
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"repr": repr, "escape_markup": escape_markup}
    environment.filters |= {"g": "{:g}".format, "thousands": "{:,}".format, "number": _number}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        kind=kind,
        title=KINDS[kind][0],
        metadata=_metadata(kind, tuned, summary, base, repository),
        form=form,
        loads_base=loads_base,
        where=repository or "this directory",
        task=tuned.task,
        names=getattr(tuned.task, "names", ()),
        has_new_head=bool(tuned.parts.base.new),
        pooled=_POOLED.get(settings.model.pooling),
        own_tensors=OWN_TENSORS_FILE,
        settings=settings,
        config=config,
        base=base,
        data=", ".join(data_names(settings.data)) or "-",
        rates=rates,
        paper=PAPER,
        combination=_combination(tuned.place.notes),
        versions=tuned.place.notes["versions"],
        summary={"examples": {}, "after": {}, "constant": {}, **summary},
    )


def escape_markup(text: Any) -> str:
    r"""Escapes text of a user or of others, such as labels and file names, for the card's YAML, Markdown and HTML.

    >>> print(escape_markup("my_data.csv | <b>[red](x)\x1b[2J"))
    my_data.csv &#124; &#60;b&#62;&#91;red&#93;(x)&#92;u001b&#91;2J
    """
    # By references of HTML: a viewer that does not know front matter takes its YAML for Markdown.
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", escape_controls(str(text)))


# Of _ and : those that begin or end emphasis or make a link.
_MARKUP = re.compile(r"[]!#$&*<>@[\\`|~]|(?<![^\W_])_|_(?![^\W_])|:(?=//)")


def data_names(data: DataOptions) -> list[str]:
    """The names of the training data, escaped; a local file's is without its directories."""
    return [escape_markup(shown_name(source)) for source in data.sources]


def shown_name(source: str) -> str:
    """A data set's name if others can find it by that, or else the file's name without its directories."""
    is_known = is_public(source, "data") or (source.startswith("glue/") and source.count("/") == 1)
    return source if is_known else Path(source).name


def _metadata(
    kind: str, tuned: TunedModel, summary: Mapping[str, Any], base: str, repository: str | None
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
        library_name=KINDS[kind][1],
        tags=["loraplus_jax", "lora"],
        eval_results=results or None,
        model_name=(repository or KINDS[kind][0]) if results else None,
    ).to_yaml()


def _combination(notes: Mapping[str, Any]) -> str | None:
    """How `loraplus combine` made the adapter; None if it did not, also where the user has a note of that name."""
    try:
        combined = notes["combined"]
        parts = " + ".join(f"{source['weight']:g} {source['name']}" for source in combined["adapters"])
        return escape_markup(f"{combined['how']} of {parts}")
    except (KeyError, TypeError, ValueError):
        return None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
