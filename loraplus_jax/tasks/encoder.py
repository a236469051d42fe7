"""Classification and regression with an encoder and a new head."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from ..data.batches import Batch, digest
from ..data.duplicates import handle_duplicates
from ..data.fetch import resolve
from ..data.glue import find_task, load_glue, read_glue, read_glue_texts
from ..data.labels import label_summary
from ..data.readers import read_rows
from ..data.splits import LabelledTexts, limit_splits, load_rows, load_splits
from ..data.tokenize import encode_texts, load_tokenizer
from ..models.bert.config import BertConfig
from ..models.bert.model import SHARDING, BertForSequence, name_table, tensor_sizes
from ..models.checkpoints.hf import load_config
from ..models.checkpoints.quantized import choose_formats
from ..models.tokenizer import check_ids
from ..settings.schema import DataSettings, ModelSettings, Settings
from .classification import EncoderTask
from .interface import AdaptedModel, BaseModel, Losses, Split, TaskData


def load_data(settings: Settings, directory: Path) -> TaskData:
    """Reads, checks and tokenizes the splits with the tokenizer of a model directory."""
    tokenizer = tokenizer_for(settings, directory)
    glue = find_task(settings.data, settings.task)
    rows, duplicates = _load_splits(settings.data)
    task = EncoderTask.from_splits(settings.task, rows, glue.metrics if glue else ())  # pyright: ignore[reportArgumentType]
    rows, limited = limit_splits(rows, settings.data)
    encoded = {name: encode_texts(split.texts, split.pairs, tokenizer) for name, split in rows.items()}
    splits = {name: arrays | {"label": task.labels(rows[name])} for name, (arrays, _) in encoded.items()}
    sizes = {name: len(split) for name, split in rows.items()}
    truncated = {name: count for name, (_, count) in encoded.items()}
    digests = {name: _digest(split) for name, split in rows.items()}
    classes = label_summary(rows, task.names) if task.names else ()
    return TaskData(task, splits, sizes, truncated, digests, (*limited, *classes, *duplicates))


def placeholder_data(settings: Settings) -> TaskData:
    """Returns the task and one row of training columns, for settings whose data is not available.

    The number of classes depends on the data, so two are assumed, except for GLUE.
    """
    ids = np.zeros((1, settings.data.max_length), np.int32)
    columns: Batch = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ids)
    classes, glue = settings.task == "classification", find_task(settings.data, settings.task)
    names = glue.names if glue else ("0", "1") if classes else ()
    task = EncoderTask(kind=settings.task, names=names)  # pyright: ignore[reportArgumentType]
    columns["label"] = np.zeros(1, np.int32 if classes else np.float32)
    return TaskData(task, {"train": columns}, {"train": 1}, {"train": 0}, {})


def _digest(rows: LabelledTexts) -> str:
    return digest(zip(rows.texts, rows.pairs or rows.texts, rows.labels, strict=True))


def load_split(
    settings: Settings, directory: Path, task: EncoderTask, split: str | None, data: str | None
) -> Split:
    """Loads a split of the run's data, or another labelled file, for evaluation.

    Raises:
      KeyError: there is no such split.
    """
    if data is None:
        rows = limit_splits(_load_splits(settings.data)[0], settings.data)[0][split or "test"]
    else:
        glue, path = find_task(settings.data), resolve(data, "data")
        rows = read_glue(path, glue)[0] if glue else load_rows(path, settings.data)
    arrays, _ = encode_texts(rows.texts, rows.pairs, tokenizer_for(settings, directory))
    return Split(arrays | {"label": task.labels(rows)}, len(rows), _digest(rows))


def _load_splits(settings: DataSettings) -> tuple[dict[str, LabelledTexts], list[str]]:
    if settings.glue is not None:
        splits, left_out = load_glue(settings)
    else:
        splits, left_out = load_splits(settings, functools.partial(resolve, kind="data")), []
    splits, duplicates = handle_duplicates(splits, settings)
    return splits, [*left_out, *duplicates]


def has_pairs(settings: DataSettings) -> bool:
    """Whether the texts are pairs."""
    glue = find_task(settings)
    return len(glue.texts) == 2 if glue else settings.text_pair is not None


def read_texts(path: Path, settings: DataSettings) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Reads the texts and, for pairs, the second texts of a file with the run's columns; labels are not needed."""
    if (glue := find_task(settings)) is not None:
        texts = read_glue_texts(path, glue)
    else:
        names = [name for name in (settings.text, settings.text_pair) if name is not None]
        texts = [tuple(row.values.values()) for row in read_rows(path, names, **settings.table_options)]
    first, *second = zip(*texts, strict=True)
    return first, second[0] if second else None


def tokenizer_for(settings: Settings, directory: Path) -> Tokenizer:
    """Loads the directory's tokenizer for `data.max_length`; raises a ValueError if they do not fit the model."""
    config = model_config(settings.model, directory)
    if settings.data.max_length > config.max_length:
        raise ValueError(
            f"data.max_length must be at most {config.max_length} tokens for this model, "
            f"got {settings.data.max_length}"
        )
    tokenizer = load_tokenizer(directory, settings.data.max_length)
    check_ids(
        tokenizer,
        directory,
        config.vocab_size,
        types=config.type_vocab_size,
        pairs=has_pairs(settings.data),
    )
    return tokenizer


def model_config(settings: ModelSettings, directory: Path) -> BertConfig:
    """Loads the encoder's config; `dropout`, if set, replaces its dropout rates."""
    config = BertConfig.from_hf(load_config(directory))
    if settings.dropout is None:
        return config
    return dataclasses.replace(
        config, hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout
    )


def make_base(settings: Settings, directory: Path, task: EncoderTask) -> BaseModel:
    """Creates the encoder with a new head; its inputs are `input_ids`, `attention_mask` and `token_type_ids`."""
    model_settings = settings.model
    config = model_config(model_settings, directory)
    model = BertForSequence(
        config,
        task.num_outputs,
        model_settings.pooling,
        jnp.dtype(model_settings.dtype),
        jnp.dtype(model_settings.param_dtype),
        model_settings.unroll,
        model_settings.head_dropout,
    )
    inputs = 3 * (jax.ShapeDtypeStruct((1, settings.data.max_length), jnp.int32),)
    table = name_table(model_settings.pooling)
    formats = choose_formats(table, model_settings.quantize, model_settings.quantize_exclude, directory)
    return BaseModel(model, table, ("head",), inputs, SHARDING, tensor_sizes(config), formats)


def make_losses(settings: Settings, task: Any, parts: AdaptedModel, mesh: Mesh | None = None) -> Losses:
    """Returns the loss functions; the one for evaluation keeps the predictions if the task's metrics need them."""
    return Losses(task.loss_fn(parts.model), task.loss_fn(parts.model, keep_rows=bool(task.metrics)))
