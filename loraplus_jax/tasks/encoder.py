"""Classification and regression of labelled texts, with an encoder and a new head."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from .._utils.validation import check_choice
from ..data.batches import Batch, digest, first_batches, train_batches
from ..data.duplicates import handle_duplicates
from ..data.fetch import resolve
from ..data.glue import find_task, load_glue, read_glue, read_glue_texts
from ..data.labels import class_labels, label_names, label_summary, regression_labels
from ..data.options import DataOptions
from ..data.readers import read_rows
from ..data.splits import LabelledText, limit_splits, load_rows, load_splits
from ..data.text_rows import TextRows, text_lengths
from ..data.tokenize import encode_texts, input_warnings, truncating_tokenizer
from ..models.bert.config import BertConfig
from ..models.checkpoints.model_files import ModelFiles, check_ids
from ..models.checkpoints.quantized import choose_formats
from ..models.families import encoder_of
from ..models.modernbert.config import ModernBertConfig
from ..models.options import ModelOptions
from ..step.sharding import batch_parts
from ..step.train_step import LossFn, Rows
from .interface import (
    ANY_POSITION,
    AdaptedModel,
    BaseModel,
    BatchPlan,
    Losses,
    Scored,
    Split,
    Task,
    TaskData,
    batch_shapes,
    check_max_length,
    eval_shapes,
    full_batches,
    held_out_split,
)
from .metrics import SPLIT_METRICS
from .options import TaskOptions

METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews"),
    "regression": ("mse", "mae", "pearson", "spearman"),
}
"""The metrics of each kind of task; the first is the default."""
SAMPLED_BATCHES = 1000
"""The most batches for which `plan_batches` chooses the rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderTask(Task):
    """Classification or regression, with what inference needs to know about the training labels.

    Attributes:
      kind: `"classification"` or `"regression"`.
      names: class names, in the order of the head's outputs; empty for regression.
      mean, std: statistics of the training labels, by which regression standardizes labels.
      metrics: names of the metrics that matter; the first selects the best evaluation. By default accuracy for
        classification and mse for regression, which are computed in any case.

    Raises:
      ValueError: a metric does not exist or does not fit the task.
    """

    names: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.metrics:
            check_choice(f"data.metrics of task {self.kind}", name, METRICS[self.kind])
        if {"f1", "matthews"} & {*self.metrics} and len(self.names) != 2:
            raise ValueError(
                f"data.metrics f1 and matthews require two classes, got {', '.join(self.names)}; use macro_f1"
            )

    @classmethod
    def from_splits(
        cls, kind: str, splits: Mapping[str, Sequence[LabelledText]], metrics: tuple[str, ...] = ()
    ) -> "EncoderTask":
        """Creates the task from the labels in the splits.

        Raises:
          ValueError: labels do not fit the task (with `file:line`), or are all equal.
        """
        if kind == "classification":
            return cls(kind=kind, names=tuple(label_names(splits)), metrics=metrics)
        values = {name: regression_labels(rows) for name, rows in splits.items()}["train"].astype(np.float64)
        if values.std() == 0:
            raise ValueError(
                f"regression needs different labels, but all labels of the train split are {values[0]:g}"
            )
        return cls(kind=kind, mean=float(values.mean()), std=float(values.std()), metrics=metrics)

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the head."""
        return len(self.names) if self.kind == "classification" else 1

    @property
    def metric(self) -> str:
        return self.metrics[0] if self.metrics else METRICS[self.kind][0]

    def derived(self, values: Mapping[str, Any]) -> dict[str, float]:
        names = [name for name in self.metrics if name in SPLIT_METRICS]
        return {name: SPLIT_METRICS[name](values["predicted"], values["label"]) for name in names}

    def constant(self, train: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Computes the loss and the metrics on `labels` (N,) of one answer for all texts.

        For classification this is the most frequent class, with the shares of the classes as probabilities; for
        regression the mean. Both are those of `train` (M,); the labels are as from `labels`.
        """
        if self.kind == "classification":
            shares = np.bincount(train, minlength=len(self.names)) / len(train)
            predicted = np.full_like(labels, shares.argmax())
            # A class that is in the other splits only has no share.
            values = {"loss": float(-np.log(np.maximum(shares, 1e-7))[labels].mean())}
            values["accuracy"] = float((predicted == labels).mean())
        else:
            error = train.mean(dtype=np.float64) - labels
            predicted = np.zeros_like(labels)
            values = {"loss": float((error**2).mean()), "mse": float(((error * self.std) ** 2).mean())}
            values["mae"] = float((np.abs(error) * self.std).mean())
        return values | self.derived({"predicted": predicted, "label": labels})

    def labels(self, rows: Sequence[LabelledText]) -> np.ndarray:
        """Returns the labels for the loss function: int32 class indices or standardized float32, `(N,)`."""
        if self.kind == "classification":
            return class_labels(rows, self.names)
        return ((regression_labels(rows) - self.mean) / self.std).astype(np.float32)

    def loss_fn(self, model: nn.Module, *, keep_rows: bool = False) -> LossFn:
        """Returns the loss on batches of `input_ids`, `attention_mask`, `token_type_ids`, `label` and `weight`.

        The last two are `(B,)`, or `(B, S)` where a row holds up to S texts, as `data.text_rows` makes them.

        For classification: cross-entropy, with the metric accuracy. For regression: squared error of standardized
        labels, with the metrics mse and mae in the labels' own units.

        Args:
          model: the encoder with a head.
          keep_rows: whether the metrics also hold `Rows` of predictions and labels, for evaluation: indices of
            classes, or standardized numbers.
        """

        def loss_fn(variables: Any, batch: Any, rng: Any) -> Any:
            outputs, labels, weight = (
                apply_model(model, variables, batch, rng),
                batch["label"],
                batch["weight"],
            )
            if self.kind == "classification":
                values = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
                metrics = {"accuracy": (jnp.argmax(outputs, axis=-1) == labels).astype(jnp.float32)}
            else:
                error = outputs[..., 0] - labels
                values = error**2
                metrics = {"mse": (error * self.std) ** 2, "mae": jnp.abs(error) * self.std}
            total = jnp.sum(weight)
            sums = {name: (jnp.sum(v * weight), total) for name, v in metrics.items()}
            if keep_rows:
                predicted = jnp.argmax(outputs, axis=-1) if self.names else outputs[..., 0]
                sums |= {"predicted": Rows(predicted, weight), "label": Rows(labels, weight)}
            return (jnp.sum(values * weight), total), sums

        return loss_fn

    def predictions(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """Converts the head's outputs `(N, num_outputs)` to predictions: label and probabilities, or a number."""
        if self.kind == "regression":
            return [{"prediction": float(value * self.std + self.mean)} for value in outputs[:, 0]]
        probabilities = np.asarray(jax.nn.softmax(outputs, axis=-1), np.float64)
        return [
            {
                "prediction": self.names[int(row.argmax())],
                "probabilities": {name: round(float(p), 6) for name, p in zip(self.names, row, strict=True)},
            }
            for row in probabilities
        ]

    @classmethod
    def from_options(cls, options: TaskOptions, files: ModelFiles) -> "EncoderTask":
        return cls._load_rows(options)[0]

    @classmethod
    def _load_rows(
        cls, options: TaskOptions
    ) -> tuple["EncoderTask", dict[str, list[LabelledText]], list[str]]:
        glue = find_task(options.data, options.kind)
        rows, duplicates = _load_splits(options.data)
        # Of all rows: a trial on a few must have all classes, or its head would have another shape.
        metrics = glue.metrics if glue else options.data.metrics
        return cls.from_splits(options.kind, rows, metrics), rows, duplicates

    @classmethod
    def load(cls, options: TaskOptions, files: ModelFiles) -> TaskData:
        tokenizer = tokenizer_for(options, files)
        task, rows, duplicates = cls._load_rows(options)
        rows, limited = limit_splits(rows, options.data)
        encoded = {
            name: encode_texts([row.texts for row in split], tokenizer, options.data.max_length)
            for name, split in rows.items()
        }
        labels = {name: task.labels(split) for name, split in rows.items()}
        constant = task.constant(labels["train"], labels[held_out_split(rows)])
        splits = {name: arrays | {"label": labels[name]} for name, (arrays, _) in encoded.items()}
        evaluated = {name: columns for name, columns in splits.items() if name != "train"}
        # Of all of them, since one program evaluates every split.
        lengths = np.concatenate([text_lengths(columns) for columns in evaluated.values()])
        most = model_config(options.model, files).max_length
        shape = TextRows.fitting(lengths, most)
        splits |= {name: shape.arrange_all(columns)[0] for name, columns in evaluated.items()}
        sizes = {name: len(split) for name, split in rows.items()}
        truncated = {name: count for name, (_, count) in encoded.items()}
        digests = {name: _digest(split) for name, split in rows.items()}
        classes = label_summary(rows, task.names) if task.names else []
        if options.data.metrics and "f1" in task.metrics:
            classes.append(f"f1 is that of class {task.names[1]}")
        texts = [row for split in rows.values() for row in split]
        inputs = [ids for columns, _ in encoded.values() for ids in columns["input_ids"]]
        summary = (*limited, *classes, *duplicates, *input_warnings(texts, inputs, tokenizer))
        return TaskData(task, splits, sizes, truncated, digests, summary, constant=constant, longest_row=most)

    @classmethod
    def without_data(cls, options: TaskOptions) -> "EncoderTask":
        glue = find_task(options.data, options.kind)
        # The number of classes is unknown, and hardly matters: it is only the width of the head.
        names = glue.names if glue else ("0", "1") if options.kind == "classification" else ()
        return cls(kind=options.kind, names=names)

    def full_batches(self, options: TaskOptions) -> BatchPlan:
        ids = np.zeros((1, options.data.max_length), np.int32)
        columns: Batch = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ids)
        columns["label"] = np.zeros(1, np.int32 if self.kind == "classification" else np.float32)
        return full_batches(columns, options.batch_size, options.eval_batch_size)

    def load_split(
        self, options: TaskOptions, files: ModelFiles, split: str | None, data: str | None
    ) -> Split:
        if data is None:
            splits = limit_splits(_load_splits(options.data)[0], options.data)[0]
            train, rows = splits["train"], splits[split or "test"]
        else:
            glue, path = find_task(options.data), resolve(data, "data")
            train = rows = read_glue(path, glue)[0] if glue else load_rows(path, options.data)
        arrays, truncated = encode_texts(
            [row.texts for row in rows], tokenizer_for(options, files), options.data.max_length
        )
        columns = arrays | {"label": self.labels(rows)}
        constant = self.constant(self.labels(train), columns["label"])
        most = model_config(options.model, files).max_length
        columns, _ = TextRows.fitting(text_lengths(columns), most).arrange_all(columns)
        return Split(columns, len(rows), _digest(rows), truncated=truncated, constant=constant)

    def make_base(self, options: TaskOptions, files: ModelFiles) -> BaseModel:
        model_options = options.model
        config = model_config(model_options, files)
        family, loop = encoder_of(config.model_type), dict[str, Any]()
        if isinstance(config, BertConfig):
            loop["unroll"] = model_options.unroll
            # Unpacked weights of all layers, as XLA on CPU keeps them in an unrolled program, are not small.
            if model_options.unroll is None and model_options.quantize != "none":
                loop["unroll"] = False
        elif model_options.unroll is not None:
            raise ValueError(
                f"model.unroll must be null with {config.model_type}, whose layers are no loop; got "
                f"{model_options.unroll}"
            )
        model = family.model(
            config,
            self.num_outputs,
            model_options.pooling,
            dtype=jnp.dtype(model_options.dtype),
            param_dtype=jnp.dtype(model_options.param_dtype),
            head_dropout=model_options.head_dropout,
            **loop,
        )
        inputs = 3 * (jax.ShapeDtypeStruct((1, options.data.max_length), jnp.int32),)
        table = family.name_table(config, model_options.pooling)
        formats = choose_formats(table, model_options.quantize, model_options.quantize_exclude, files)
        is_unrolled = model_options.quantize == "none" and loop.get("unroll", False) is not False
        layers = config.num_hidden_layers if is_unrolled else 0
        sizes = config.tensor_sizes
        return BaseModel(model, table, ("head",), inputs, family.sharding, sizes, formats, layers=layers)

    def plan_batches(
        self, options: TaskOptions, data: TaskData, steps: int, seeds: Sequence[int], mesh: Mesh
    ) -> BatchPlan:
        columns, parts = data.splits["train"], batch_parts(mesh)
        lengths, size = text_lengths(columns), options.batch_size
        count = min(steps, max(1, SAMPLED_BATCHES // len(seeds)))
        batches = first_batches(len(lengths), batch_size=size, seeds=seeds, count=count, lengths=lengths)
        rows = TextRows.for_batches(lengths, batches, data.longest_row, parts * options.accumulate)
        full = f"{100 * rows.full:.0f} % full"
        return BatchPlan(
            train=batch_shapes(rows.arrange(columns, batches[0]), rows.count),
            evaluate=eval_shapes(data.splits, options.eval_batch_size, parts),
            batch=train_batches(columns, batch_size=size, arrange=rows.arrange, lengths=lengths),
            summary=(f"{size} texts a step in {rows.count} rows of {rows.length} tokens, {full}",),
        )

    def make_losses(
        self,
        options: TaskOptions,
        parts: AdaptedModel,
        mesh: Mesh | None = None,
        scored: Scored = ANY_POSITION,
    ) -> Losses:
        # The one for evaluation keeps the predictions if the task's metrics need them.
        return Losses(self.loss_fn(parts.model), self.loss_fn(parts.model, keep_rows=bool(self.metrics)))


def apply_model(model: nn.Module, variables: Any, batch: Mapping[str, Any], rng: Any = None) -> Any:
    """Returns the head's outputs `(B, num_outputs)` for a batch, with dropout if `rng` is set.

    They are `(B, S, num_outputs)` if its `weight` is `(B, S)`, where a row holds up to S texts.
    """
    rngs = None if rng is None else {"dropout": rng}
    inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    texts = batch["weight"].shape[1] if batch["weight"].ndim == 2 else None
    return model.apply(variables, *inputs, texts, rngs=rngs)


def _digest(rows: Sequence[LabelledText]) -> str:
    # Without a second text the first twice: a change here would change the identity of existing runs.
    return digest((row.prompt, row.texts[-1], row.label) for row in rows)


def _load_splits(options: DataOptions) -> tuple[dict[str, list[LabelledText]], list[str]]:
    if options.glue is not None:
        splits, left_out = load_glue(options)
    else:
        splits, left_out = load_splits(options, functools.partial(resolve, kind="data")), []
    splits, duplicates = handle_duplicates(splits, options)
    return splits, [*left_out, *duplicates]


def has_pairs(options: DataOptions) -> bool:
    """Whether the texts are pairs."""
    glue = find_task(options)
    return len(glue.texts) == 2 if glue else options.text_pair is not None


def read_texts(path: Path, options: DataOptions) -> list[tuple[str, ...]]:
    """Reads the text, or pair of texts, of each row of a file with the run's columns; labels are not needed."""
    if (glue := find_task(options)) is not None:
        return read_glue_texts(path, glue)
    names = [name for name in (options.text, options.text_pair) if name is not None]
    return [texts for _, texts in read_rows(path, names, **options.table_options)]


def tokenizer_for(options: TaskOptions, files: ModelFiles) -> Tokenizer:
    """The model's tokenizer for `data.max_length`; raises a ValueError if they do not fit the model."""
    config = model_config(options.model, files)
    check_max_length(options, config.max_length)
    tokenizer = truncating_tokenizer(files, options.data.max_length)
    check_ids(
        tokenizer,
        files.path,
        config.vocab_size,
        types=config.type_vocab_size,
        pairs=has_pairs(options.data),
    )
    return tokenizer


def model_config(options: ModelOptions, files: ModelFiles) -> BertConfig | ModernBertConfig:
    """Loads the encoder's config; `dropout`, if set, replaces its dropout rates."""
    config = encoder_of(files.config.get("model_type")).config.from_hf(files.config)
    return config if options.dropout is None else config.with_dropout(options.dropout)
