"""What is trained, whoever describes it: of values and functions alone, without settings, files or texts."""

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
      loss_of_any: the loss of other rows, which may have more positions with one.
      evaluate: the loss and metrics of an evaluation batch.
      specs: the adapters.
      trainable, frozen: the shapes of the variables.
      train_batch, eval_batch: the shapes of a batch by column, with a column `weight`.
      batch: `(seed, step)` to a training batch of a run; the same whenever it is called. None if only programs are
        compiled.
      steps: optimizer steps of a whole run.
      accumulate: micro-batches of a step.
      rules: sharding rules of the variables.
      layers: the number of stacked layers that a program on one CPU device may take one by one, or 0.
    """

    loss: LossFn
    loss_of_any: LossFn
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
