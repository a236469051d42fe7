"""A training problem as functions, shapes and numbers, independent of settings, files and text."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..adapter.spec import Specs
from .sharding import Rules
from .train_step import LossFn

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A model with adapters, its losses and its batches, from which the programs of a run or a sweep are compiled.

    Attributes:
      loss: the loss of a micro-batch, see `LossFn`.
      unbounded_loss: the same without a bound on the scored positions of a batch, for rows that are no micro-batch.
      evaluate: the loss and metrics of an evaluation batch.
      specs: the adapters.
      trainable, frozen: the shapes of the variables.
      train_batch, eval_batch: the shapes of a batch by column, with a column `weight`.
      batch: `batch(seed, step)`, the training batch of a run's step, a pure function; None if only programs are
        compiled.
      steps: optimizer steps of a whole run.
      accumulate: micro-batches of a step.
      rules: sharding rules of the variables.
      layers: the number of stacked layers that a program on one CPU device may take one by one, or 0.
    """

    loss: LossFn
    unbounded_loss: LossFn
    evaluate: LossFn
    specs: Specs
    trainable: Any
    frozen: Any
    train_batch: Shapes
    eval_batch: Shapes
    batch: Callable[[int, int], dict[str, np.ndarray]] | None
    steps: int
    accumulate: int = 1
    rules: Rules = ()
    layers: int = 0
