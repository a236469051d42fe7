"""Evaluates and predicts with a run, an adapter directory or a merged model."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._utils.atomic import to_json, write_text
from .._utils.records import check_files
from .._utils.validation import check_new_file, suggest
from ..adapter.tree import combine, flatten, unflatten
from ..data.batches import eval_batches, even_batch_size
from ..data.fetch import resolve
from ..data.glue import find_file, find_task, submission
from ..data.text_rows import TextRows, text_lengths
from ..data.tokenize import encode_texts
from ..interop.adapter_directory import read_tensors
from ..interop.peft_files import NOTES_FILE, OWN_TENSORS_FILE, peft_notes
from ..models.checkpoints.hf import load_params
from ..settings.parsing import parse_settings, settings_from_json
from ..settings.schema import DEFAULT_LORA, LANGUAGE_TASKS, Settings
from ..step.fingerprints import fingerprint
from ..step.sharding import make_mesh, replicate, shard_batch
from ..step.train_step import make_eval
from ..tasks.causal_lm import LanguageTask, most_scored
from ..tasks.encoder import EncoderTask, apply_model, has_pairs, read_texts, tokenizer_for
from ..tasks.held_out_generation import HeldOutTexts
from ..tasks.interface import AdaptedModel, Scored, Split, row_count
from ..training.evaluation import evaluate, finish_metrics
from ..training.provenance import SPLITS, check_allowed, check_identity, model_identity
from ..training.saved_adapter import (
    adapter_config,
    find_adapter,
    is_peft,
    merged_table,
    notes_path,
    read_adapter,
    read_notes,
    require_adapter,
    saved_config,
)
from ..training.setup import base_parts, build_model, load_model, task_module

OUTPUT_SUFFIX = ".jsonl"


class TunedModel(NamedTuple):
    """A run, adapter or merged model, or a model without any.

    Attributes:
      settings: settings of the run.
      task: task that it was trained for; None if that is unknown.
      parts: model and variables.
      base: directory or file of the base model.
      notes: metadata of the adapter or the merged model.
      identity: identity of the base model.
    """

    settings: Settings
    task: Any
    parts: AdaptedModel
    base: Path
    notes: Mapping[str, Any] = {}
    identity: Mapping[str, Any] = {}

    @property
    def variables(self) -> dict[str, Any]:
        """All variables of the model."""
        return combine(self.parts.trainable, self.parts.frozen)


def load_tuned(place: Path, config: str | None = None, allow_different: Sequence[str] = ()) -> TunedModel:
    """Loads a run's output directory, an adapter of either format, or a merged model that `export_run` wrote.

    Args:
      place: the directory.
      config: a training config, for a PEFT adapter; supplies the model, the data and the task.
      allow_different: parts of the base model that may differ from what the run was trained on, see `PARTS`.

    Raises:
      ValueError, OSError: the directory is none of these or is damaged, or the base model has changed.
    """
    check_allowed(allow_different)
    directory = find_adapter(place)
    if directory is None and (place / NOTES_FILE).is_file():
        return _load_merged(place, config, allow_different)
    directory = require_adapter(place, f", nor a merged model ({NOTES_FILE})")
    return load_weights(directory, describe_adapter(directory, config, allow_different), allow_different)


def describe_adapter(directory: Path, config: str | None, allow: Sequence[str]) -> TunedModel:
    """The model of an adapter, with shapes as variables, after a check of the base's identity; see `load_tuned`."""
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
        advice = (
            "pass --config with a training config for the same data and task"
            if is_peft(directory)
            else "use a run or adapter from loraplus train"
        )
        raise ValueError(f"{directory} has no training settings; {advice}")
    identity = model_identity(settings, base, task)
    check_identity(directory, notes, identity, allow=allow)
    return TunedModel(settings, task, build_model(settings, base, task, lora_config), base, notes, identity)


def load_weights(directory: Path, tuned: TunedModel, allow: Sequence[str] = ()) -> TunedModel:
    """Loads the weights of an adapter and of its base, whose shapes `tuned` has."""
    parts = load_model(tuned.settings, tuned.base, tuned.parts)
    if parts.frozen and "base" in tuned.notes:
        check_identity(directory, tuned.notes, {}, weights=fingerprint(parts.frozen), allow=allow)
    adapter = read_adapter(directory, parts)
    trainable = ({"lora": adapter.lora} if adapter.lora else {}) | adapter.extras
    if jax.tree.map(np.shape, trainable) != jax.tree.map(np.shape, parts.trainable):
        raise ValueError(f"{directory}: tensor shapes do not match the model that its settings describe")
    return tuned._replace(parts=parts._replace(trainable=trainable))


def settings_and_task(
    directory: Path, notes: Mapping[str, Any], config: str | None = None
) -> tuple[Settings, Any]:
    """Settings and task from the metadata of an adapter or a merged model."""
    if config is not None:
        raise ValueError(f"--config requires a PEFT adapter; {directory} has its own training settings")
    try:
        settings = settings_from_json({**notes["settings"], "output_dir": str(directory)})
        fields = notes["task"]
        if fields["kind"] in LANGUAGE_TASKS:
            return settings, LanguageTask(**fields)
        if not all(isinstance(name, str) for name in fields["names"]):
            raise ValueError(f"task.names must be a list of texts, got {fields['names']!r:.80}")
        metrics = tuple(fields.get("metrics", ()))
        return settings, EncoderTask(**{**fields, "names": tuple(fields["names"]), "metrics": metrics})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{notes_path(directory)} is damaged: {error}") from None


def settings_with_adapter(directory: Path, settings: Settings, base: Path, task: Any) -> Settings:
    """Settings with the lora section of a PEFT adapter."""
    parts = base_parts(settings, base, task)
    return dataclasses.replace(settings, method="lora_plus", lora=adapter_config(directory, parts))


def _load_merged(directory: Path, config: str | None, allow_different: Sequence[str]) -> TunedModel:
    """Loads a merged model, which has no adapters."""
    notes = peft_notes(directory) or {}
    if not {"merged", "settings", "task"} <= notes.keys():
        raise ValueError(
            f"{directory / NOTES_FILE} must have merged, settings and task; export the model again "
            "with --merged"
        )
    settings, task = settings_and_task(directory, notes, config)
    # A merged model is used as it is, without an adapter, also one of a run on a packed base.
    model = dataclasses.replace(settings.model, path=str(directory), quantize="none", quantize_exclude=None)
    settings = dataclasses.replace(settings, model=model, lora=DEFAULT_LORA)
    check_identity(directory, notes, model_identity(settings, directory, task), allow=allow_different)
    parts = base_parts(settings, directory, task)
    check_files(directory / NOTES_FILE, notes)
    own_file = directory / OWN_TENSORS_FILE
    own_tensors = flatten(read_tensors(own_file)) if own_file.is_file() else {}
    table = parts.base.table if own_tensors else merged_table(parts)
    shapes = jax.eval_shape(parts.model.init, jax.random.key(0), *parts.base.inputs)["params"]
    params = load_params(directory, table, shapes, new=parts.base.new if own_tensors else ())
    variables = combine({"params": params}, unflatten(own_tensors))
    return TunedModel(settings, task, parts._replace(frozen=variables), directory, notes)


def evaluate_run(
    directory: Path,
    *,
    split: str | None = None,
    data: str | None = None,
    config: str | None = None,
    output: Path | None = None,
    allow_different: Sequence[str] = (),
) -> dict[str, Any]:
    """Metrics on a split of the run's data, by default test, or on another labelled file with the same columns.

    A run of task generation also generates texts, which go to the new .jsonl file `output`.
    """
    if split is not None and data is not None:
        raise ValueError(f"eval takes --split or --data, not both, got --split {split} and --data {data}")
    if output is not None:
        check_output(output)
    if split is not None and split not in SPLITS:
        raise ValueError(f"--split: unknown split {split!r}{suggest(split, SPLITS)}")
    tuned = load_tuned(directory, config, allow_different)
    settings, module = tuned.settings, task_module(tuned.settings)
    try:
        evaluated: Split = module.load_split(settings, tuned.base, tuned.task, split, data)
    except KeyError as error:
        raise ValueError(
            f"the run's data has no split {error.args[0]!r}{suggest(error.args[0], SPLITS[:2])}"
        ) from None
    if data is None:
        check_identity(
            directory, tuned.notes, {"data": {split or "test": evaluated.digest}}, allow=allow_different
        )
    texts = None
    if settings.task == "generation":
        texts = HeldOutTexts.from_settings(
            settings, tuned.base, tuned.task, tuned.parts.model, evaluated.inputs
        )
    elif output is not None:
        raise ValueError(f"--output requires a run of task generation, got one of task {settings.task}")
    mesh = make_mesh(1)
    trainable, frozen = replicate(mesh, (tuned.parts.trainable, tuned.parts.frozen))
    size = even_batch_size(row_count(evaluated.columns), settings.train.eval_batch_size, 1)
    scored = Scored(evaluate=most_scored([evaluated.columns], size) if settings.is_language else None)
    losses = module.make_losses(settings, tuned.task, tuned.parts, scored=scored)
    eval_fn = make_eval(losses.evaluate, mesh=mesh)
    values = evaluate(eval_fn, trainable, frozen, evaluated.columns, size, mesh)
    results = {"data": data or split or "test", "examples": evaluated.examples}
    results |= finish_metrics(tuned.task, values)
    if texts is not None:
        rows, scores = texts.generate(combine(trainable, frozen))
        results |= {"inputs": len(rows), **scores}
        if output is not None:
            write_predictions(output, rows)
    return results


def predict_run(
    directory: Path,
    *,
    texts: Sequence[str] = (),
    data: str | None = None,
    config: str | None = None,
    allow_different: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Predictions for `texts`, or for a file with the run's text columns (labels not needed)."""
    tuned = load_tuned(directory, config, allow_different)
    if tuned.settings.is_language:
        raise ValueError(f"{directory} is a language model; use loraplus generate or loraplus eval")
    pairs: tuple[str, ...] | None = None
    if data is not None:
        texts, pairs = read_texts(resolve(data, "data"), tuned.settings.data)
    elif has_pairs(tuned.settings.data):
        raise ValueError("the run was trained on text pairs; pass a file with --data")
    if not texts:
        raise ValueError("no text to predict for; pass --text or --data")
    if any(not text.strip() for text in texts):
        raise ValueError("every text to predict for must have content, got an empty text")
    predictions = tuned.task.predictions(_compute_outputs(tuned, texts, pairs))
    return [{"text": text, **prediction} for text, prediction in zip(texts, predictions, strict=True)]


def write_submissions(
    directory: Path, to: Path, *, config: str | None = None, allow_different: Sequence[str] = ()
) -> list[Path]:
    """Writes the predictions of a run for the test split of its GLUE task, as GLUE's server takes them.

    Returns the new files in `to`, such as CoLA.tsv; MNLI has two.
    """
    tuned = load_tuned(directory, config, allow_different)
    data = tuned.settings.data
    if (task := find_task(data)) is None:
        raise ValueError(
            f"--glue requires a run with data.path glue/TASK, such as glue/sst2; {directory} has "
            f"{', '.join(data.sources)}"
        )
    sources = {to / name: find_file(data, split) for name, split in task.submissions.items()}
    to.mkdir(parents=True, exist_ok=True)
    for file in sources:
        check_new_file("--glue", file)
    for file, source in sources.items():
        rows = tuned.task.predictions(_compute_outputs(tuned, *read_texts(source, data)))
        write_text(file, submission(task, [row["prediction"] for row in rows]), new=True)
    return list(sources)


def check_output(path: Path) -> None:
    """Raises ValueError unless the path is that of a new .jsonl file."""
    if path.suffix != OUTPUT_SUFFIX:
        raise ValueError(f"--output must be a {OUTPUT_SUFFIX} file, got {path}")
    check_new_file("--output", path)


def write_predictions(path: Path, predictions: Sequence[dict[str, Any]]) -> None:
    """Writes one JSON object per line to a new file; raises ValueError if the file exists."""
    write_text(path, "".join(to_json(row, ensure_ascii=False) + "\n" for row in predictions), new=True)


def _compute_outputs(tuned: TunedModel, texts: Sequence[str], pairs: Sequence[str] | None) -> np.ndarray:
    arrays, _ = encode_texts(texts, pairs, tokenizer_for(tuned.settings, tuned.base))
    rows, slots = TextRows.fitting(text_lengths(arrays)).arrange_all(arrays)
    mesh, variables = make_mesh(1), tuned.variables
    apply = jax.jit(functools.partial(apply_model, tuned.parts.model))
    size = even_batch_size(row_count(rows), tuned.settings.train.eval_batch_size, 1)
    # eval_batches pads the last batch to the shape of the others, so one program serves all.
    outputs = [np.asarray(apply(variables, shard_batch(batch, mesh))) for batch in eval_batches(rows, size)]
    return np.concatenate(outputs)[slots[:, 0], slots[:, 1]]
