"""Using what a run left: evaluation and predictions from an adapter directory."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..adapter_io import NOTES, adapter_notes, load_adapter
from ..checkpoint import fingerprint
from ..config import nearest
from ..sharding import make_mesh, replicate
from ..train_step import make_eval
from ..tree import combine
from .data import encode, eval_batches
from .encoders import tokenizer_for
from .family import Parts
from .fetch import resolve
from .language_tasks import LanguageTask
from .lifecycle import ADAPTER
from .loop import evaluate, place
from .prepare import build, family_of, load
from .rows import read_rows
from .settings import LANGUAGE, Settings, settings_from_json
from .tasks import Task, outputs

OUTPUT_SUFFIX = ".jsonl"


class Tuned(NamedTuple):
    """A trained model, loaded.

    Attributes:
      settings: those of its run.
      task: what it learned.
      parts: model and variables.
      base: the directory or file of its base.
    """

    settings: Settings
    task: Any
    parts: Parts
    base: Path


def load_tuned(directory: Path) -> Tuned:
    """Loads a run's output directory, or an adapter directory alone, onto its base model.

    Raises:
      ValueError, OSError: it is none, is damaged, or its base is another one now.
    """
    directory = directory / ADAPTER if (directory / ADAPTER).is_dir() else directory
    notes, adapter = adapter_notes(directory), load_adapter(directory)
    if not {"settings", "task", "base"} <= notes.keys():
        raise ValueError(f"{directory} was not written by loraplus train: its settings are not in it")
    try:
        settings = settings_from_json({**notes["settings"], "output_dir": str(directory)})
        task = _task(notes["task"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{directory / NOTES} is damaged: {error}") from None
    base = resolve(settings.model.path, "model")
    parts = load(settings, base, build(settings, base, task, adapter.config), adapter.config)
    if parts.frozen and (found := fingerprint(parts.frozen)) != notes["base"]:
        raise ValueError(
            f"{directory} belongs to a base with fingerprint {notes['base']}, {base} has {found}"
        )
    trainable = ({"lora": adapter.lora} if adapter.lora else {}) | adapter.extras
    if jax.tree.map(np.shape, trainable) != jax.tree.map(np.shape, parts.trainable):
        raise ValueError(f"{directory}: the tensors do not fit the model that its settings describe")
    return Tuned(settings, task, parts._replace(trainable=trainable), base)


def _task(notes: Mapping[str, Any]) -> Any:
    if notes["kind"] in LANGUAGE:
        return LanguageTask(**notes)
    return Task(**{**notes, "names": tuple(notes["names"])})


def evaluate_run(directory: Path, *, split: str | None = None, data: str | None = None) -> dict[str, Any]:
    """Metrics on a split of the run's own data, or on another labelled file with the same columns.

    Raises:
      ValueError, OSError: no such split or file, or labels that the run does not know.
    """
    if split is not None and data is not None:
        raise ValueError(f"eval takes --split or --data, not both: {split} and {data}")
    tuned = load_tuned(directory)
    settings, family = tuned.settings, family_of(tuned.settings)
    splits = ("train", "validation", "test")
    if split is not None and split not in splits:
        raise ValueError(f"the run has no split {split!r}{nearest(split, splits)}")
    try:
        arrays, examples = family.load_split(settings, tuned.base, tuned.task, split, data)
    except KeyError as error:
        raise ValueError(
            f"the run has no split {error.args[0]!r}{nearest(error.args[0], splits[:2])}"
        ) from None
    mesh = make_mesh(1)
    trainable, frozen = replicate(mesh, (tuned.parts.trainable, tuned.parts.frozen))
    eval_fn = make_eval(family.make_losses(settings, tuned.task, tuned.parts).evaluate, mesh=mesh)
    values = evaluate(eval_fn, trainable, frozen, arrays, settings.train.eval_batch_size, mesh)
    return {"data": data or split or "test", "examples": examples, **values, **tuned.task.derived(values)}


def predict_run(
    directory: Path, *, texts: Sequence[str] = (), data: str | None = None
) -> list[dict[str, Any]]:
    """Predictions for texts given one by one, or for a file with the run's text columns (labels not needed).

    Raises:
      ValueError, OSError: nothing is given, or the file cannot be read.
    """
    tuned = load_tuned(directory)
    if tuned.settings.is_language:
        raise ValueError(f"{directory} holds a language model: use generate, or eval")
    pairs: tuple[str, ...] | None = None
    if data is not None:
        columns = [c for c in (tuned.settings.data.text, tuned.settings.data.text_pair) if c is not None]
        rows = read_rows(resolve(data, "data"), columns)
        texts = tuple(row.values[columns[0]] for row in rows)
        pairs = tuple(row.values[columns[1]] for row in rows) if len(columns) == 2 else None
    elif tuned.settings.data.text_pair is not None:
        raise ValueError("the run was trained on pairs of texts: give a file with --data")
    if not texts or any(not text.strip() for text in texts):
        raise ValueError("there is no text to predict for" if not texts else "a text to predict for is empty")
    found = tuned.task.predictions(_outputs(tuned, texts, pairs))
    return [{"text": text, **prediction} for text, prediction in zip(texts, found, strict=True)]


def check_output(path: Path) -> None:
    """Raises ValueError unless predictions can be written to a path."""
    if path.suffix != OUTPUT_SUFFIX:
        raise ValueError(f"predictions are written as {OUTPUT_SUFFIX}, got {path}")
    if path.exists():
        raise ValueError(f"{path} exists already; choose another --output")


def write_predictions(path: Path, predictions: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line. A file that is there already is not overwritten: that is a ValueError."""
    check_output(path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    except FileExistsError:
        raise ValueError(f"{path} exists already; choose another --output") from None


def _outputs(tuned: Tuned, texts: Sequence[str], pairs: Sequence[str] | None) -> np.ndarray:
    arrays, _ = encode(texts, pairs, tokenizer_for(tuned.settings, tuned.base))
    mesh = make_mesh(1)
    variables = combine(tuned.parts.trainable, tuned.parts.frozen)
    apply = jax.jit(functools.partial(outputs, tuned.parts.model))
    batch_size = min(tuned.settings.train.eval_batch_size, len(texts))
    found = [np.asarray(apply(variables, place(batch, mesh))) for batch in eval_batches(arrays, batch_size)]
    return np.concatenate(found)[: len(texts)]
