"""Evaluates and predicts with a run, an adapter directory or a merged model."""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._utils.atomic import to_json
from .._utils.multihost import is_lead
from .._utils.records import check_files
from .._utils.validation import check_new_file, suggest
from ..adapter.adapter_stack import AdapterStack, apply_rows, select_adapters
from ..adapter.tree import combine, flatten, unflatten
from ..data.batches import eval_batches, even_batch_size, round_up
from ..data.fetch import resolve
from ..data.text_rows import TextRows, text_lengths
from ..data.tokenize import encode_texts
from ..interop.adapter_directory import read_tensors
from ..interop.peft_files import NOTES_FILE, OWN_TENSORS_FILE, peft_notes
from ..models.checkpoints.model_files import ModelFiles
from ..models.files import open_files
from ..settings.parsing import parse_settings, settings_from_json
from ..settings.schema import INVARIANT, LANGUAGE_TASKS, Settings
from ..step.checkpoint import leaf_dtypes_and_shapes
from ..step.fingerprints import fingerprint
from ..step.sharding import batch_parts, local_rows, mesh_axes_of_rows, shard_batch, with_mesh
from ..step.train_step import make_eval
from ..tasks.causal_lm import LanguageTask, most_scored
from ..tasks.encoder import EncoderTask, apply_model, has_pairs, read_texts, tokenizer_for
from ..tasks.held_out_generation import HeldOutTexts
from ..tasks.interface import AdaptedModel, Scored, row_count
from ..training.distributed import check_same_everywhere, raise_together
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
from ..training.setup import base_parts, build_model, load_model, read_params, task_class
from .devices import MeshSizes, check_same_rows, choose_mesh, shardings_of, to_mesh, write_once

OUTPUT_SUFFIX = ".jsonl"
NO_DATA = "-"
"""`data.train` of an adapter that was trained elsewhere."""


class TunedModel(NamedTuple):
    """A run, adapter or merged model, or a model without any.

    Attributes:
      settings: settings of the run.
      task: task that it was trained for; None if that is unknown.
      parts: model and variables.
      base: files of the base model.
      notes: metadata of the adapter or the merged model.
      identity: identity of the base model.
      mesh: device mesh of the variables; None if these are shapes.
      directory: the adapter's.
    """

    settings: Settings
    task: Any
    parts: AdaptedModel
    base: ModelFiles
    notes: Mapping[str, Any] = {}
    identity: Mapping[str, Any] = {}
    mesh: Any = None
    directory: Path | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """What an adapter's metadata says of the run: `settings`, `task` and `identity`."""
        settings = {name: value for name, value in self.settings.to_json().items() if name != "output_dir"}
        return {"settings": settings, "task": self.task.notes(), "identity": dict(self.identity)}

    @property
    def variables(self) -> dict[str, Any]:
        """All variables of the model."""
        return combine(self.parts.trainable, self.parts.frozen)


def load_tuned(
    place: Path,
    config: str | None = None,
    allow_different: Sequence[str] = (),
    mesh: MeshSizes = None,
    base: str | None = None,
) -> TunedModel:
    """Loads a run's output directory, an adapter of either format, or a merged model that `export_run` wrote.

    Loads it onto the mesh of the run, see `choose_mesh`; of several processes, each reads only its own parts.

    Args:
      place: the directory.
      config: a training config, for a PEFT adapter; supplies the model, the data and the task.
      allow_different: parts of the base model that may differ from what the run was trained on, see `PARTS`.
      mesh: sizes that replace those of the run's mesh.
      base: where the base of an adapter is now, instead of `model.path` in its settings.

    Raises:
      ValueError, OSError: the directory is none of these or is damaged, or the base model has changed.
    """
    with raise_together():
        check_allowed(allow_different)
        directory = find_adapter(place)
        if directory is None and (place / NOTES_FILE).is_file():
            tuned = _load_merged(place, config, allow_different, mesh)
        else:
            directory = require_adapter(place, f", nor a merged model ({NOTES_FILE})")
            tuned = load_weights(directory, describe_adapter(directory, config, allow_different, base), mesh)
    check_weights(directory or place, tuned, allow_different)
    return tuned


def describe_adapter(
    directory: Path, config: str | None, allow: Sequence[str], base_path: str | None = None
) -> TunedModel:
    """The model of an adapter, with shapes as variables, after a check of the base's identity; see `load_tuned`."""
    notes = read_notes(directory)
    if {"settings", "task", "base"} <= notes.keys():
        settings, task = settings_and_task(directory, notes, config)
        if base_path is not None:
            settings = dataclasses.replace(
                settings, model=dataclasses.replace(settings.model, path=base_path)
            )
            moved = {**notes["settings"], "model": {**notes["settings"]["model"], "path": base_path}}
            notes = {**notes, "settings": moved}
        lora_config = saved_config(directory)
        base = open_files(resolve(settings.model.path, "model"))
    elif is_peft(directory) and config is not None:
        settings = parse_settings(config)
        base = open_files(resolve(settings.model.path, "model"))
        task = task_class(settings).load(settings, base).task
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
    parts = build_model(settings, base, task, lora_config)
    return TunedModel(settings, task, parts, base, notes, identity, directory=directory)


def load_weights(directory: Path, tuned: TunedModel, mesh: MeshSizes) -> TunedModel:
    """Loads the weights of an adapter and of its base, whose shapes `tuned` has, onto the mesh."""
    chosen = choose_mesh(tuned.settings.mesh, mesh)
    parts = load_model(tuned.settings, tuned.base, tuned.parts, chosen)
    adapter = read_adapter(directory, parts)
    trainable = ({"lora": adapter.lora} if adapter.lora else {}) | adapter.extras
    if jax.tree.map(np.shape, trainable) != jax.tree.map(np.shape, parts.trainable):
        raise ValueError(f"{directory}: tensor shapes do not match the model that its settings describe")
    return tuned._replace(parts=to_mesh(parts._replace(trainable=trainable), chosen), mesh=chosen)


def check_weights(directory: Path, tuned: TunedModel, allow: Sequence[str] = ()) -> None:
    """Raises ValueError if processes loaded other weights, or weights that the adapter was not trained on."""
    parts, is_distributed = tuned.parts, jax.process_count() > 1
    if is_distributed:
        shapes = leaf_dtypes_and_shapes({"trained": parts.trainable, "weights": parts.frozen})
        values = {"model": tuned.settings.to_json()["model"], "mesh": dict(tuned.mesh.shape)}
        check_same_everywhere({**values, **shapes})
    # From here on, computations run on all processes together.
    has_base = tuned.notes.get("base") is not None
    weights = fingerprint(parts.frozen) if parts.frozen and (has_base or is_distributed) else None
    if is_distributed:
        check_same_everywhere({"base": weights, "trained": fingerprint(parts.trainable)})
    if has_base and weights is not None:
        check_identity(directory, tuned.notes, {}, weights=weights, allow=allow)


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


def settings_with_adapter(directory: Path, settings: Settings, base: ModelFiles, task: Any) -> Settings:
    """Settings with the lora section of a PEFT adapter."""
    parts = base_parts(settings, base, task)
    lora, optimizer, train = adapter_config(directory, parts), settings.optimizer, settings.train
    # Settings of training that may not suit this adapter.
    if optimizer.name in INVARIANT:
        lora = dataclasses.replace(lora, lr_ratio=1.0)
    if lora.variant == "lora":
        optimizer = dataclasses.replace(optimizer, magnitude_learning_rate=None)
    else:
        train = dataclasses.replace(train, theory_every=None)
    return dataclasses.replace(settings, method="lora_plus", lora=lora, optimizer=optimizer, train=train)


def _load_merged(
    directory: Path, config: str | None, allow_different: Sequence[str], mesh: MeshSizes
) -> TunedModel:
    """Loads a merged model, which has no adapters."""
    notes = peft_notes(directory) or {}
    if not {"merged", "settings", "task"} <= notes.keys():
        raise ValueError(
            f"{directory / NOTES_FILE} must have merged, settings and task; export the model again "
            "with --merged"
        )
    settings, task = settings_and_task(directory, notes, config)
    # A merged model is used as it is, without an adapter, also one of a run on a quantized base.
    model = dataclasses.replace(settings.model, path=str(directory), quantize="none", quantize_exclude=None)
    lora = dataclasses.replace(settings.lora, init="lora", init_iterations=None)
    settings = dataclasses.replace(settings, model=model, lora=lora)
    files = open_files(directory)
    check_identity(directory, notes, model_identity(settings, files, task), allow=allow_different)
    parts = base_parts(settings, files, task)
    check_files(directory / NOTES_FILE, notes)
    own_file = directory / OWN_TENSORS_FILE
    own_tensors = flatten(read_tensors(own_file)) if own_file.is_file() else {}
    base = parts.base if own_tensors else parts.base._replace(table=merged_table(parts), new=())
    tuned = TunedModel(settings, task, parts._replace(base=base), files, notes)
    return load_whole(tuned, mesh, unflatten(own_tensors))


def load_whole(tuned: TunedModel, mesh: MeshSizes, new: Mapping[str, Any] | None = None) -> TunedModel:
    """Loads the weights of a model without adapters onto the mesh; `new` are the variables that its files lack."""
    parts, chosen = tuned.parts, choose_mesh(tuned.settings.mesh, mesh)
    shapes = jax.eval_shape(parts.model.init, jax.random.key(0), *parts.base.inputs)["params"]
    params = read_params(tuned.base, parts.base, shapes, chosen)
    variables = combine({"params": params}, new or {})
    return tuned._replace(parts=to_mesh(parts._replace(frozen=variables), chosen), mesh=chosen)


def evaluate_run(
    directory: Path,
    *,
    split: str | None = None,
    data: str | None = None,
    config: str | None = None,
    output: Path | None = None,
    allow_different: Sequence[str] = (),
    mesh: MeshSizes = None,
) -> dict[str, Any]:
    """Metrics on a split of the run's data, by default test, or on another labelled file with the same columns.

    A run of task generation also generates texts, which go to the new .jsonl file `output`. For `mesh` see
    `load_tuned`.
    """
    if output is not None:
        with raise_together():
            check_output(output)
    if split is not None and split not in SPLITS:
        raise ValueError(f"--split: unknown split {split!r}{suggest(split, SPLITS)}")
    tuned = load_tuned(directory, config, allow_different, mesh)
    settings, on = tuned.settings, tuned.mesh
    with raise_together():
        if data is None and settings.data.train == NO_DATA:
            raise ValueError(f"{directory} has no data of its own; pass --data FILE or --tasks")
        try:
            evaluated = tuned.task.load_split(settings, tuned.base, split, data)
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
                settings, tuned.base, tuned.task, tuned.parts.model, evaluated.inputs, on
            )
        elif output is not None:
            raise ValueError(f"--output requires a run of task generation, got one of task {settings.task}")
    check_same_rows([evaluated.digest])
    size, parts = _eval_rows(row_count(evaluated.columns), settings, on), batch_parts(on)
    scored = Scored(
        evaluate=most_scored([evaluated.columns], size // parts) if settings.is_language else None
    )
    losses = tuned.task.make_losses(settings, tuned.parts, on, scored)
    trainable, frozen = tuned.parts.trainable, tuned.parts.frozen
    eval_fn = make_eval(losses.evaluate, mesh=on, shardings=shardings_of(tuned.parts, on))
    values = evaluate(eval_fn, trainable, frozen, evaluated.columns, size, on)
    results: dict[str, Any] = {"data": data or split or "test", "examples": evaluated.examples}
    if evaluated.truncated:  # to data.max_length of the run
        results["truncated"] = evaluated.truncated
    results |= finish_metrics(tuned.task, values)
    if texts is not None:
        rows, scores = texts.generate(tuned.variables)
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
    mesh: MeshSizes = None,
) -> list[dict[str, Any]]:
    """Predictions for `texts`, or for a file with the run's text columns (labels not needed); `mesh` as above."""
    tuned = load_tuned(directory, config, allow_different, mesh)
    with raise_together():
        if tuned.settings.is_language:
            raise ValueError(f"{directory} is a language model; use loraplus generate or loraplus eval")
        rows = texts_to_predict(texts, data, tuned.settings)
    predictions = tuned.task.predictions(compute_outputs(tuned, rows))
    return [{"text": text, **prediction} for (text, *_), prediction in zip(rows, predictions, strict=True)]


def texts_to_predict(texts: Sequence[str], data: str | None, settings: Settings) -> list[tuple[str, ...]]:
    """The texts given as `texts` or in the file `data`, in which they may be pairs; checks them."""
    if data is not None:
        return read_texts(resolve(data, "data"), settings.data)
    if has_pairs(settings.data):
        raise ValueError("the run was trained on text pairs; pass a file with --data")
    if any(not text.strip() for text in texts):
        raise ValueError("every text to predict for must have content, got an empty text")
    return [(text,) for text in texts]


def check_output(path: Path) -> None:
    """Raises ValueError unless the path is that of a new .jsonl file."""
    if path.suffix != OUTPUT_SUFFIX:
        raise ValueError(f"--output must be a {OUTPUT_SUFFIX} file, got {path}")
    if is_lead():  # on a shared disk all processes would collide
        check_new_file("--output", path)


def write_predictions(path: Path, predictions: Sequence[dict[str, Any]]) -> None:
    """Writes one JSON object per line to a new file; raises ValueError if the file exists."""
    write_once(path, "".join(to_json(row, ensure_ascii=False) + "\n" for row in predictions))


def compute_outputs(
    tuned: TunedModel,
    texts: Sequence[tuple[str, ...]],
    adapters: tuple[AdapterStack, Sequence[int]] | None = None,
) -> np.ndarray:
    """The head's outputs for each text or pair; with `adapters`, each has the adapter in its slot of the stack."""
    with raise_together():
        longest = tuned.settings.data.max_length
        arrays, truncated = encode_texts(texts, tokenizer_for(tuned.settings, tuned.base), longest)
        if truncated and is_lead():
            message = (
                f"truncated {truncated:,} of {len(texts):,} texts to data.max_length {longest} of the run"
            )
            print(message, file=sys.stderr)
        # Texts of one row share their adapter.
        slots = np.zeros(len(texts), np.int32) if adapters is None else np.array(adapters[1], np.int32)
        shape, groups = TextRows.fitting(text_lengths(arrays)), []
        places, count = np.zeros((len(texts), 2), np.int64), 0
        for slot in np.unique(slots):
            members = np.flatnonzero(slots == slot)
            group, own = shape.arrange_all({name: column[members] for name, column in arrays.items()})
            places[members] = own + np.array([count, 0])
            count += row_count(group)
            groups.append({**group, "slot": np.full(row_count(group), slot, np.int32)})
        rows = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    check_same_rows(array.tolist() for array in (*rows.values(), slots))
    mesh, variables = tuned.mesh, tuned.variables
    model = functools.partial(apply_model, tuned.parts.model)

    def compute(variables: Any, stack: AdapterStack | None, batch: dict[str, Any]) -> Any:
        slot = batch.pop("slot")
        if stack is None:
            return model(variables, batch)
        own = select_adapters(stack, slot)
        return apply_rows(model, variables, own, batch, mesh_axes=mesh_axes_of_rows())

    # Of a split array a process could read only its own part.
    replicated = NamedSharding(mesh, PartitionSpec())
    apply = jax.jit(with_mesh(compute, mesh), out_shardings=replicated)
    stack = None if adapters is None else adapters[0]
    size = _eval_rows(row_count(rows), tuned.settings, mesh)
    # eval_batches pads the last batch to the shape of the others, so one program serves all.
    batches = eval_batches(rows, size, local_rows(mesh, size))
    outputs = [np.asarray(apply(variables, stack, shard_batch(batch, mesh))) for batch in batches]
    return np.concatenate(outputs)[places[:, 0], places[:, 1]]


def _eval_rows(rows: int, settings: Settings, mesh: Mesh) -> int:
    """The rows of an evaluation batch, a multiple of the mesh's parts, which another mesh may have fitted."""
    parts = batch_parts(mesh)
    return even_batch_size(rows, round_up(settings.train.eval_batch_size, parts), parts)
