"""Tasks on labelled texts: classification and regression."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..data.labels import class_labels, label_names, regression_labels
from ..data.splits import LabelledTexts
from ..train_step import LossFn

Kind = Literal["classification", "regression"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderTask:
    """Classification or regression, with what inference needs to know about the training labels.

    Attributes:
      kind: `"classification"` or `"regression"`.
      names: class names, in the order of the head's outputs; empty for regression.
      mean, std: statistics of the training labels, by which regression standardizes labels.
    """

    kind: Kind
    names: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def from_splits(cls, kind: Kind, splits: Mapping[str, LabelledTexts]) -> "EncoderTask":
        """Creates the task from the labels in the splits.

        Raises:
          ValueError: labels do not fit the task (with `file:line`), or are all equal.
        """
        if kind == "classification":
            return cls(kind=kind, names=tuple(label_names(splits)))
        values = {name: regression_labels(rows) for name, rows in splits.items()}["train"].astype(np.float64)
        if values.std() == 0:
            raise ValueError(
                f"regression needs different labels, but all labels of the train split are {values[0]:g}"
            )
        return cls(kind=kind, mean=float(values.mean()), std=float(values.std()))

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the head."""
        return len(self.names) if self.kind == "classification" else 1

    @property
    def metric(self) -> str:
        """The metric that selects the best evaluation."""
        return "accuracy" if self.kind == "classification" else "mse"

    @property
    def mode(self) -> Literal["min", "max"]:
        """`"max"` for accuracy, `"min"` for mse."""
        return "max" if self.kind == "classification" else "min"

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Computes no metrics: all are means over the data."""
        return {}

    def notes(self) -> dict[str, Any]:
        """Returns the task as JSON values."""
        return {**dataclasses.asdict(self), "names": list(self.names)}

    def labels(self, rows: LabelledTexts) -> np.ndarray:
        """Returns the labels for the loss function: int32 class indices or standardized float32, `(N,)`."""
        if self.kind == "classification":
            return class_labels(rows, self.names)
        return ((regression_labels(rows) - self.mean) / self.std).astype(np.float32)

    def loss_fn(self, model: nn.Module) -> LossFn:
        """Returns the loss on batches of `input_ids`, `attention_mask`, `token_type_ids`, `label` and `weight`.

        For classification: cross-entropy, with the metric accuracy. For regression: squared error of standardized
        labels, with the metrics mse and mae in the labels' own units.
        """
        row_losses = self._class_losses if self.kind == "classification" else self._number_losses

        def loss_fn(variables: Any, batch: Any, rng: Any) -> Any:
            values, metrics = row_losses(apply_model(model, variables, batch, rng), batch["label"])
            weight = batch["weight"]
            total = jnp.sum(weight)
            sums = {name: (jnp.sum(v * weight), total) for name, v in metrics.items()}
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
