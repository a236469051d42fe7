"""What the application needs to know of a kind of model: an encoder with a head, or a language model."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax

from ..data.batches import Batch
from ..models.name_table import NameTable
from ..sharding import Rules
from ..spec import Specs
from ..train_step import LossFn


class TaskProtocol(Protocol):
    """What is learned, and what of the training data is needed to use it again."""

    @property
    def kind(self) -> str:
        """The task's name in the settings."""
        ...

    @property
    def metric(self) -> str:
        """The metric that selects the best evaluation."""
        ...

    @property
    def mode(self) -> Any:
        """`"min"` or `"max"`: which of two values of the metric is better."""
        ...

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are no means themselves, from those that are."""
        ...

    def notes(self) -> dict[str, Any]:
        """The task as JSON."""
        ...


class TaskData(NamedTuple):
    """The task that the data poses, and its splits as arrays.

    Attributes:
      task: what is learned.
      splits: split name to columns of one length; all but `train` have the columns that evaluation takes.
      examples: split name to how many texts, conversations or questions it has.
      truncated: split name to how many of them were too long and cut.
    """

    task: TaskProtocol
    splits: dict[str, Batch]
    examples: dict[str, int]
    truncated: dict[str, int]


class BaseModel(NamedTuple):
    """A model before adapters.

    Attributes:
      model: the module.
      table: where the tensors of its files go.
      new: prefixes of parameters that no file has.
      inputs: shapes of what it is called with.
      rules: where its parameters lie on a mesh.
      tensor_sizes: what the mesh's tensor axis must divide, by name.
    """

    model: nn.Module
    table: NameTable
    new: tuple[str, ...]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    rules: Rules
    tensor_sizes: Mapping[str, int]


class AdaptedModel(NamedTuple):
    """A model ready to train or to use.

    Attributes:
      base: the model without adapters.
      model: with its adapters on.
      specs: what is adapted.
      trainable, frozen: its variables, apart.
    """

    base: BaseModel
    model: nn.Module
    specs: Specs
    trainable: dict[str, Any]
    frozen: dict[str, Any]


class Losses(NamedTuple):
    """Loss functions of training and of evaluation."""

    train: LossFn
    evaluate: LossFn


def row_count(columns: Mapping[str, Any]) -> int:
    """How many rows columns of one length have."""
    return len(next(iter(columns.values())))
