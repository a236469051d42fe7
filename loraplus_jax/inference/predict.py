"""Evaluation and predictions from a run, an adapter directory or a merged model."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._validation import suggest
from ..checkpoint import fingerprint
from ..data.batches import eval_batches
from ..data.fetch import resolve
from ..data.readers import read_rows
from ..data.tokenize import encode_texts
from ..interop import adapter_files
from ..interop.adapter_files import read_tensors
from ..interop.peft_files import NOTES_FILE, OWN_TENSORS_FILE, peft_notes
from ..models.hf import load_params
from ..settings.parsing import parse_settings, settings_from_json
from ..settings.schema import LANGUAGE_TASKS, Settings
from ..sharding import make_mesh, replicate, shard_batch
from ..tasks.classification import EncoderTask, apply_model
from ..tasks.encoder import tokenizer_for
from ..tasks.interface import AdaptedModel
from ..tasks.language_losses import LanguageTask
from ..train_step import make_eval
from ..training.evaluation import evaluate
from ..training.init_adapter import (
    adapter_config,
    check_base,
    find_adapter,
    is_peft,
    merged_table,
    notes_path,
    read_adapter,
    read_notes,
    saved_config,
)
from ..training.run_directory import ADAPTER
from ..training.setup import base_parts, build_model, load_model, params_of, task_module
from ..tree import combine, flatten, unflatten

OUTPUT_SUFFIX = ".jsonl"


class TunedModel(NamedTuple):
    """A trained model, loaded.

    Attributes:
      settings: those of its run.
      task: what it learned.
      parts: model and variables.
      base: the directory or file of its base.
    """

    settings: Settings
    task: Any
    parts: AdaptedModel
    base: Path


def load_tuned(place: Path, config: str | None = None) -> TunedModel:
    """Loads a run's output directory, an adapter of either format, or a merged model that was exported here.

    Args:
      place: the directory.
      config: of a training run, for an adapter that PEFT made: the model, the data and the task are taken from it.

    Raises:
      ValueError, OSError: it is none, is damaged, or its base is another one now.
    """
    directory = find_adapter(place)
    if directory is None and (place / NOTES_FILE).is_file():
        return _load_merged(place, config)
    if directory is None:
        inner = place / ADAPTER if (place / ADAPTER).is_dir() else place
        missing = [
            name
            for name in (adapter_files.TENSORS_FILE, adapter_files.DESCRIPTION_FILE)
            if not (inner / name).is_file()
        ]
        raise FileNotFoundError(
            f"{inner} is no adapter directory: it lacks {' and '.join(missing)}; nor is it a run, PEFT's adapter "
            "or a model exported with --merged"
        )
    notes = read_notes(directory)
    if {"settings", "task", "base"} <= notes.keys():
        settings, task = settings_and_task(directory, notes, config)
        lora_config = saved_config(directory)
        base = resolve(settings.model.path, "model")
    elif is_peft(directory) and config is not None:
        settings = parse_settings(config)
        base = resolve(settings.model.path, "model")
        task = task_module(settings).load_data(settings, base).task
        settings = settings_with_adapter(directory, settings, base, task)
        lora_config = settings.applied
    else:
        hint = ": give the config of a run with --config" if is_peft(directory) else ""
        raise ValueError(f"{directory} was not written by loraplus train: its settings are not in it{hint}")
    parts = load_model(settings, base, build_model(settings, base, task, lora_config), lora_config)
    check_base(directory, fingerprint(parts.frozen) if parts.frozen else None, base)
    adapter = read_adapter(directory, parts, params_of(parts))
    trainable = ({"lora": adapter.lora} if adapter.lora else {}) | adapter.extras
    if jax.tree.map(np.shape, trainable) != jax.tree.map(np.shape, parts.trainable):
        raise ValueError(f"{directory}: the tensors do not fit the model that its settings describe")
    return TunedModel(settings, task, parts._replace(trainable=trainable), base)


def settings_and_task(
    directory: Path, notes: Mapping[str, Any], config: str | None = None
) -> tuple[Settings, Any]:
    """The settings and the task in the notes of an adapter or a merged model."""
    if config is not None:
        raise ValueError(f"--config is for adapters that PEFT made; {directory} has settings of its own")
    try:
        settings = settings_from_json({**notes["settings"], "output_dir": str(directory)})
        fields = notes["task"]
        if fields["kind"] in LANGUAGE_TASKS:
            return settings, LanguageTask(**fields)
        return settings, EncoderTask(**{**fields, "names": tuple(fields["names"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{notes_path(directory)} is damaged: {error}") from None


def settings_with_adapter(directory: Path, settings: Settings, base: Path, task: Any) -> Settings:
    """Settings whose section lora comes from a PEFT adapter."""
    bare = base_parts(settings, base, task)
    return dataclasses.replace(settings, method="lora_plus", lora=adapter_config(directory, bare))


def _load_merged(place: Path, config: str | None) -> TunedModel:
    """Loads a merged model, which has no adapters."""
    notes = peft_notes(place) or {}
    if not {"merged", "settings", "task"} <= notes.keys():
        raise ValueError(f"{place / NOTES_FILE} does not say what the model was trained for")
    settings, task = settings_and_task(place, notes, config)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, path=str(place)))
    bare = base_parts(settings, place, task)
    own = flatten(read_tensors(place / OWN_TENSORS_FILE)) if (place / OWN_TENSORS_FILE).is_file() else {}
    table = bare.base.table if own else merged_table(bare)
    shapes = jax.eval_shape(bare.model.init, jax.random.key(0), *bare.base.inputs)["params"]
    params = load_params(place, table, shapes, new=bare.base.new if own else ())
    variables = combine({"params": params}, unflatten(own)) if own else {"params": params}
    return TunedModel(settings, task, bare._replace(frozen=variables), place)


def evaluate_run(
    directory: Path, *, split: str | None = None, data: str | None = None, config: str | None = None
) -> dict[str, Any]:
    """Metrics on a split of the run's own data, or on another labelled file with the same columns.

    Raises:
      ValueError, OSError: no such split or file, or labels that the run does not know.
    """
    if split is not None and data is not None:
        raise ValueError(f"eval takes --split or --data, not both: {split} and {data}")
    tuned = load_tuned(directory, config)
    settings, module = tuned.settings, task_module(tuned.settings)
    splits = ("train", "validation", "test")
    if split is not None and split not in splits:
        raise ValueError(f"the run has no split {split!r}{suggest(split, splits)}")
    try:
        arrays, examples = module.load_split(settings, tuned.base, tuned.task, split, data)
    except KeyError as error:
        raise ValueError(
            f"the run has no split {error.args[0]!r}{suggest(error.args[0], splits[:2])}"
        ) from None
    mesh = make_mesh(1)
    trainable, frozen = replicate(mesh, (tuned.parts.trainable, tuned.parts.frozen))
    eval_fn = make_eval(module.make_losses(settings, tuned.task, tuned.parts).evaluate, mesh=mesh)
    values = evaluate(eval_fn, trainable, frozen, arrays, settings.train.eval_batch_size, mesh)
    return {"data": data or split or "test", "examples": examples, **values, **tuned.task.derived(values)}


def predict_run(
    directory: Path, *, texts: Sequence[str] = (), data: str | None = None, config: str | None = None
) -> list[dict[str, Any]]:
    """Predictions for texts given one by one, or for a file with the run's text columns (labels not needed).

    Raises:
      ValueError, OSError: nothing is given, or the file cannot be read.
    """
    tuned = load_tuned(directory, config)
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
    predictions = tuned.task.predictions(_compute_outputs(tuned, texts, pairs))
    return [{"text": text, **prediction} for text, prediction in zip(texts, predictions, strict=True)]


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


def _compute_outputs(tuned: TunedModel, texts: Sequence[str], pairs: Sequence[str] | None) -> np.ndarray:
    arrays, _ = encode_texts(texts, pairs, tokenizer_for(tuned.settings, tuned.base))
    mesh = make_mesh(1)
    variables = combine(tuned.parts.trainable, tuned.parts.frozen)
    apply = jax.jit(functools.partial(apply_model, tuned.parts.model))
    batch_size = min(tuned.settings.train.eval_batch_size, len(texts))
    batch_outputs = [
        np.asarray(apply(variables, shard_batch(batch, mesh))) for batch in eval_batches(arrays, batch_size)
    ]
    return np.concatenate(batch_outputs)[: len(texts)]
