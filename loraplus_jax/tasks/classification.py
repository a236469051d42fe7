"""Tasks on labelled texts: classification and regression."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._utils.validation import check_choice, to_plain
from ..data.labels import class_labels, label_names, regression_labels
from ..data.splits import LabelledTexts
from ..step.train_step import LossFn, Rows
from .metrics import SPLIT_METRICS

Kind = Literal["classification", "regression"]
METRICS = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("mse", "mae", "pearson", "spearman"),
}
"""The metrics of each kind of task; the first is the default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderTask:
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

    kind: Kind
    names: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.metrics:
            check_choice(f"a metric of task {self.kind}", name, METRICS[self.kind])
        if {"f1", "matthews"} & {*self.metrics} and len(self.names) != 2:
            raise ValueError(f"f1 and matthews require two classes, got {', '.join(self.names)}")

    @classmethod
    def from_splits(
        cls, kind: Kind, splits: Mapping[str, LabelledTexts], metrics: tuple[str, ...] = ()
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
        """The metric that selects the best evaluation."""
        return self.metrics[0] if self.metrics else METRICS[self.kind][0]

    @property
    def mode(self) -> Literal["min", "max"]:
        """`"min"` for the errors mse and mae, otherwise `"max"`."""
        return "min" if self.metric in ("mse", "mae") else "max"

    def derived(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Computes the metrics that need all predictions."""
        names = [name for name in self.metrics if name in SPLIT_METRICS]
        return {name: SPLIT_METRICS[name](values["predicted"], values["label"]) for name in names}

    def notes(self) -> dict[str, Any]:
        """Returns the task as JSON values."""
        return to_plain(dataclasses.asdict(self))

    def labels(self, rows: LabelledTexts) -> np.ndarray:
        """Returns the labels for the loss function: int32 class indices or standardized float32, `(N,)`."""
        if self.kind == "classification":
            return class_labels(rows, self.names)
        return ((regression_labels(rows) - self.mean) / self.std).astype(np.float32)

    def loss_fn(self, model: nn.Module, *, keep_rows: bool = False) -> LossFn:
        """Returns the loss on batches of `input_ids`, `attention_mask`, `token_type_ids`, `label` and `weight`.

        For classification: cross-entropy, with the metric accuracy. For regression: squared error of standardized
        labels, with the metrics mse and mae in the labels' own units.

        Args:
          model: the encoder with a head.
          keep_rows: whether the metrics also hold `Rows` of predictions and labels, for evaluation: indices of
            classes, or standardized numbers.
        """
        row_losses = self._class_losses if self.kind == "classification" else self._number_losses

        def loss_fn(variables: Any, batch: Any, rng: Any) -> Any:
            outputs = apply_model(model, variables, batch, rng)
            values, metrics = row_losses(outputs, batch["label"])
            weight = batch["weight"]
            total = jnp.sum(weight)
            sums = {name: (jnp.sum(v * weight), total) for name, v in metrics.items()}
            if keep_rows:
                predicted = jnp.argmax(outputs, axis=-1) if self.names else outputs[:, 0]
                sums |= {"predicted": Rows(predicted, weight), "label": Rows(batch["label"], weight)}
            return (jnp.sum(values * weight), total), sums

        return loss_fn

    def _class_losses(self, logits: jax.Array, labels: jax.Array) -> Any:
        correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels), {"accuracy": correct}

    def _number_losses(self, predicted: jax.Array, labels: jax.Array) -> Any:
        error = predicted[:, 0] - labels
        return error**2, {"mse": (error * self.std) ** 2, "mae": jnp.abs(error) * self.std}

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


def apply_model(model: nn.Module, variables: Any, batch: Mapping[str, Any], rng: Any = None) -> Any:
    """Returns the head's outputs `(B, num_outputs)` for a batch of token arrays, with dropout if `rng` is set."""
    rngs = None if rng is None else {"dropout": rng}
    inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    return model.apply(variables, *inputs, rngs=rngs)
