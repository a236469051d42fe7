"""What is learned from a labelled text: one class of several, or a number."""

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
    """A task, and what of the training data it needs to be used again.

    Attributes:
      kind: which of the two.
      names: the classes, in the order of the head's outputs; empty in regression.
      mean, std: of the training labels in regression, which are standardised by them inside.
    """

    kind: Kind
    names: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def from_splits(cls, kind: Kind, splits: Mapping[str, LabelledTexts]) -> "EncoderTask":
        """The task that the splits pose.

        Raises:
          ValueError: labels do not fit it (with `file:line`), or are all the same.
        """
        if kind == "classification":
            return cls(kind=kind, names=tuple(label_names(splits)))
        values = {name: regression_labels(rows) for name, rows in splits.items()}["train"].astype(np.float64)
        if values.std() == 0:
            raise ValueError(f"regression needs labels that differ, the train split has only {values[0]:g}")
        return cls(kind=kind, mean=float(values.mean()), std=float(values.std()))

    @property
    def num_outputs(self) -> int:
        """The head's width."""
        return len(self.names) if self.kind == "classification" else 1

    @property
    def metric(self) -> str:
        """The metric that selects the best evaluation."""
        return "accuracy" if self.kind == "classification" else "mse"

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether the metric is better when smaller or larger."""
        return "max" if self.kind == "classification" else "min"

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are no means themselves: none."""
        return {}

    def notes(self) -> dict[str, Any]:
        """As JSON."""
        return {**dataclasses.asdict(self), "names": list(self.names)}

    def labels(self, rows: LabelledTexts) -> np.ndarray:
        """Labels as the loss function takes them: int32 classes or standardised float32, `(N,)`."""
        if self.kind == "classification":
            return class_labels(rows, self.names)
        return ((regression_labels(rows) - self.mean) / self.std).astype(np.float32)

    def loss_fn(self, model: nn.Module) -> LossFn:
        """The loss of a batch with `input_ids`, `attention_mask`, `token_type_ids`, `label` and `weight`.

        Cross-entropy with the metric accuracy, or the squared error of standardised labels with the metrics mse and
        mae in the labels' own units.
        """
        pairs = self._class_pairs if self.kind == "classification" else self._number_pairs

        def loss_fn(variables: Any, batch: Any, rng: Any) -> Any:
            values, metrics = pairs(apply_model(model, variables, batch, rng), batch["label"])
            weight = batch["weight"]
            total = jnp.sum(weight)
            sums = {name: (jnp.sum(v * weight), total) for name, v in metrics.items()}
            return (jnp.sum(values * weight), total), sums

        return loss_fn

    def _class_pairs(self, logits: jax.Array, labels: jax.Array) -> Any:
        right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels), {"accuracy": right}

    def _number_pairs(self, predicted: jax.Array, labels: jax.Array) -> Any:
        error = predicted[:, 0] - labels
        return error**2, {"mse": (error * self.std) ** 2, "mae": jnp.abs(error) * self.std}

    def predictions(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """The head's outputs `(N, num_outputs)` as what a user reads: label and probabilities, or a number."""
        if self.kind == "regression":
            return [{"prediction": float(value * self.std + self.mean)} for value in outputs[:, 0]]
        shares = np.asarray(jax.nn.softmax(outputs, axis=-1), np.float64)
        return [
            {
                "prediction": self.names[int(row.argmax())],
                "probabilities": {name: round(float(p), 6) for name, p in zip(self.names, row, strict=True)},
            }
            for row in shares
        ]


def apply_model(model: nn.Module, variables: Any, batch: Mapping[str, Any], rng: Any = None) -> Any:
    """The head's outputs `(B, num_outputs)` for a batch of token arrays; dropout acts when a key is given."""
    rngs = None if rng is None else {"dropout": rng}
    inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    return model.apply(variables, *inputs, rngs=rngs)
