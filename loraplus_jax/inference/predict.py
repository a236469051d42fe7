"""Evaluates and predicts with a run, an adapter directory or a merged model."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._utils.atomic import to_json
from .._utils.multihost import is_lead
from .._utils.validation import check_new_file, suggest
from ..adapter.adapter_stack import AdapterStack, apply_rows, select_adapters
from ..data.batches import eval_batches, even_batch_size, round_up
from ..data.fetch import resolve
from ..data.text_rows import TextRows, text_lengths
from ..data.tokenize import encode_texts
from ..settings.schema import Settings
from ..step.sharding import batch_parts, local_rows, mesh_axes_of_rows, shard_batch, with_mesh
from ..step.train_step import make_eval
from ..tasks.causal_lm import most_scored
from ..tasks.encoder import apply_model, has_pairs, model_config, read_texts, tokenizer_for
from ..tasks.held_out_generation import HeldOutTexts
from ..tasks.interface import Scored, row_count
from ..training.distributed import raise_together
from ..training.evaluation import evaluate, finish_metrics
from ..training.place import look
from ..training.provenance import MODEL_PARTS, PARTS, SPLITS
from .devices import MeshSizes, check_same_rows, choose_mesh, shardings_of, write_once
from .tuned_model import TunedModel, describe, load

OUTPUT_SUFFIX = ".jsonl"


def describe_task(path: Path, config: str | None, **options: Any) -> TunedModel:
    """Describes what is at a path and has a task: a run, an adapter with a training config, or a merged model."""
    place = look(path)
    if place.kind == "peft" and config is None:
        raise ValueError(
            f"{place.directory} has no training settings; pass --config with a training config for the same data "
            "and task"
        )
    place.require("run", "merged", "peft")
    return describe(place, config=config, **options)


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

    A run of task generation also generates texts, which go to the new .jsonl file `output`. `mesh` has sizes that
    replace those of the run's mesh, see `choose_mesh`.
    """
    if output is not None:
        with raise_together():
            check_output(output)
    if split is not None and split not in SPLITS:
        raise ValueError(f"--split: unknown split {split!r}{suggest(split, SPLITS)}")
    with raise_together():
        # Another file is compared with nothing.
        compared = PARTS if data is None else MODEL_PARTS
        described = describe_task(directory, config, allow_different=allow_different, compared=compared)
        settings = described.settings
        on = choose_mesh(settings.mesh, mesh)
        if data is None and not settings.data.files:
            raise ValueError(f"{directory} has no data of its own; pass --data FILE or --tasks")
        try:
            evaluated = described.task.load_split(settings.task_options, described.base, split, data)
        except KeyError as error:
            raise ValueError(
                f"the run's data has no split {error.args[0]!r}{suggest(error.args[0], SPLITS[:2])}"
            ) from None
        if data is None:
            described.check_identity({"data": {split or "test": evaluated.digest}})
        texts = None
        if settings.task == "generation":
            texts = HeldOutTexts.from_options(
                settings.task_options,
                described.base,
                described.task,
                described.parts.model,
                evaluated.inputs,
                on,
            )
        elif output is not None:
            raise ValueError(f"--output requires a run of task generation, got one of task {settings.task}")
    check_same_rows([evaluated.digest])
    tuned = load(described, on)
    size, parts = _eval_rows(row_count(evaluated.columns), settings, on), batch_parts(on)
    scored = Scored(
        evaluate=most_scored([evaluated.columns], size // parts) if settings.is_language else None
    )
    losses = tuned.task.make_losses(settings.task_options, tuned.parts, on, scored)
    trainable, frozen = tuned.parts.trainable, tuned.parts.frozen
    eval_fn = make_eval(losses.evaluate, mesh=on, shardings=shardings_of(tuned.parts, on))
    values = evaluate(eval_fn, trainable, frozen, evaluated.columns, size, on)
    results: dict[str, Any] = {"data": data or split or "test", "examples": evaluated.examples}
    if evaluated.truncated:  # to data.max_length of the run
        results["truncated"] = evaluated.truncated
    results |= finish_metrics(tuned.task, values)
    if evaluated.constant:
        results["constant"] = evaluated.constant
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
    with raise_together():
        described = describe_task(directory, config, allow_different=allow_different)
        settings = described.settings
        if settings.is_language:
            raise ValueError(f"{directory} is a language model; use loraplus generate or loraplus eval")
        rows, on = texts_to_predict(texts, data, settings), choose_mesh(settings.mesh, mesh)
    tuned = load(described, on)
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
        arrays, truncated = encode_texts(
            texts, tokenizer_for(tuned.settings.task_options, tuned.base), longest
        )
        if truncated and is_lead():
            message = (
                f"truncated {truncated:,} of {len(texts):,} texts to data.max_length {longest} of the run"
            )
            print(message, file=sys.stderr)
        # Texts of one row share their adapter.
        slots = np.zeros(len(texts), np.int32) if adapters is None else np.array(adapters[1], np.int32)
        most = model_config(tuned.settings.model, tuned.base).max_length
        shape, groups = TextRows.fitting(text_lengths(arrays), most), []
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
