"""What training needs to know about a kind of model: an encoder with a head, or a language model."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from .._utils.validation import to_plain
from ..adapter.spec import Specs
from ..adapter.tree import combine
from ..data.batches import Batch, even_batch_size
from ..data.data_to_text import Input
from ..models.checkpoints.model_files import ModelFiles
from ..models.checkpoints.name_table import NameTable
from ..quantization.formats import FormatName
from ..step.problem import Shapes
from ..step.sharding import Rules
from ..step.train_step import LossFn
from .options import TaskOptions


class Split(NamedTuple):
    """A split to evaluate; its fields are those of `TaskData` for it.

    For a file of your own, it is the best constant for that file.
    """

    columns: Batch
    examples: int
    digest: str
    inputs: tuple[Input, ...] = ()
    truncated: int = 0
    constant: Mapping[str, float] = {}


class TaskData(NamedTuple):
    """A task and its data, split and tokenized.

    Attributes:
      task: the task.
      splits: columns of equal length, by split; all but `train` have the columns for evaluation.
      examples: number of texts, conversations or questions, by split.
      truncated: number of truncated examples, by split.
      digests: digest of the texts and labels, by split.
      summary: lines about the data to print before training.
      inputs: the distinct inputs of the held-out split with their references (task generation).
      constant: the metrics on the held-out split of the constant answer that is best on the train split; empty for
        tasks without one.
      longest_row: the most tokens in an encoder's row of packed texts.
      unrelated: a text unlike the data, whose loss a sweep of methods measures (`sweep.unrelated_text`); its digest
        is among the others.
    """

    task: "Task"
    splits: dict[str, Batch]
    examples: dict[str, int]
    truncated: dict[str, int]
    digests: dict[str, str]
    summary: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()
    constant: Mapping[str, float] = {}
    longest_row: int = 0
    unrelated: Split | None = None


def held_out_split(splits: Mapping[str, Any]) -> str:
    """Name of the split on which a run is evaluated before and after training."""
    return "test" if "test" in splits else "validation"


def check_max_length(options: TaskOptions, longest: int) -> None:
    """Raises ValueError if the settings ask for more tokens than a model can read."""
    if (length := options.data.max_length) > longest:
        raise ValueError(f"data.max_length must be at most {longest} tokens for this model, got {length}")


class BaseModel(NamedTuple):
    """A model without adapters.

    Attributes:
      model: the module.
      table: maps tensors in checkpoint files to parameters.
      new: prefixes of parameters that no checkpoint has.
      inputs: shapes and dtypes of the inputs.
      rules: sharding rules of the parameters.
      tensor_sizes: sizes that the mesh's tensor axis must divide, by name.
      formats: format of each packed weight, by path.
      hint: what to know about the names of its layers if `lora` does not fit them.
      layers: the number of an encoder's stacked layers, if on a CPU a program computes them without a loop.
    """

    model: nn.Module
    table: NameTable
    new: tuple[str, ...]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    rules: Rules
    tensor_sizes: Mapping[str, int]
    formats: Mapping[str, FormatName] = {}
    hint: str = ""
    layers: int = 0


class AdaptedModel(NamedTuple):
    """A model ready for training or inference.

    Attributes:
      base: the model without adapters.
      model: the module, with adapters if any.
      specs: adapter specs by path.
      trainable, frozen: trainable and frozen variables.
      draw: makes the factors from a key; None without adapters.
    """

    base: BaseModel
    model: nn.Module
    specs: Specs
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    draw: Callable[[jax.Array], dict[str, Any]] | None = None


def params_of(parts: AdaptedModel) -> dict[str, Any]:
    """All parameters of the model, without adapters."""
    return combine(parts.trainable, parts.frozen)["params"]


class Scored(NamedTuple):
    """The most positions with a loss in a device's part of a micro-batch; None if any position may have one.

    Attributes:
      train, evaluate: in training and in evaluation.
    """

    train: int | None = None
    evaluate: int | None = None


ANY_POSITION = Scored()


class BatchPlan(NamedTuple):
    """The static shapes of a run's batches.

    Attributes:
      train: shapes of a training batch, with a column `weight`.
      evaluate: shapes of an evaluation batch.
      batch: `batch(seed, step)`, the training batches; see `train_batches`. None if only shapes are planned.
      scored: positions of language models that have a loss.
      summary: lines about how full the rows are, to print before training.
    """

    train: Shapes
    evaluate: Shapes
    batch: Any = None
    scored: Scored = ANY_POSITION
    summary: tuple[str, ...] = ()

    @property
    def train_rows(self) -> int:
        """Rows of a training batch."""
        return self.train["weight"].shape[0]

    @property
    def eval_rows(self) -> int:
        """Rows of an evaluation batch."""
        return self.evaluate["weight"].shape[0]


def batch_shapes(columns: Mapping[str, np.ndarray], rows: int) -> Shapes:
    """The shapes of a batch of these columns, with a weight per row if they have none."""
    weighted = {"weight": np.ones(1, np.float32)} | dict(columns)
    return {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in weighted.items()}


def full_batches(columns: Mapping[str, np.ndarray], batch_size: int, eval_batch_size: int) -> BatchPlan:
    """Batches of so many full rows, each an example: the most that data of such columns may need."""
    return BatchPlan(batch_shapes(columns, batch_size), batch_shapes(columns, eval_batch_size))


def eval_shapes(splits: Mapping[str, Mapping[str, np.ndarray]], at_most: int, parts: int) -> Shapes:
    """The shapes of an evaluation batch of at most so many rows, a multiple of the parts of a mesh.

    Its rows are for the largest split, as one program evaluates all of them.
    """
    columns = max((columns for name, columns in splits.items() if name != "train"), key=row_count)
    return batch_shapes(columns, even_batch_size(row_count(columns), at_most, parts))


class Losses(NamedTuple):
    """Loss functions for training and evaluation."""

    train: LossFn
    evaluate: LossFn


def row_count(columns: Mapping[str, Any]) -> int:
    """Returns the number of rows of columns of equal length."""
    return len(next(iter(columns.values())))


LOWER_IS_BETTER = ("perplexity", "mse", "mae")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A task, with what inference needs to know about the training data.

    Attributes:
      kind: its name in the options.
    """

    kind: str

    @property
    @abc.abstractmethod
    def metric(self) -> str:
        """The metric that selects the best evaluation."""

    @property
    def mode(self) -> Literal["min", "max"]:
        """`"min"` if a lower metric is better, `"max"` if a higher one is."""
        return "min" if self.metric in LOWER_IS_BETTER else "max"

    @abc.abstractmethod
    def derived(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Computes the metrics that are not means over the data, from the means and rows of an evaluation."""

    def notes(self) -> dict[str, Any]:
        """Returns the task as JSON values."""
        return to_plain(dataclasses.asdict(self))

    @classmethod
    @abc.abstractmethod
    def from_options(cls, options: TaskOptions, files: ModelFiles) -> "Task":
        """Returns the task alone; reads the splits if it follows from their labels, and tokenizes nothing."""

    @classmethod
    @abc.abstractmethod
    def load(cls, options: TaskOptions, files: ModelFiles) -> TaskData:
        """Reads, checks and tokenizes the splits with the tokenizer of a model."""

    @classmethod
    @abc.abstractmethod
    def without_data(cls, options: TaskOptions) -> "Task":
        """Returns the task for a plan, which has no data."""

    @abc.abstractmethod
    def full_batches(self, options: TaskOptions) -> BatchPlan:
        """Returns the shapes of batches of full rows, each an example: the most that data may need."""

    @abc.abstractmethod
    def load_split(
        self, options: TaskOptions, files: ModelFiles, split: str | None, data: str | None
    ) -> Split:
        """Loads a split of the run's data, or another file of the same kind, for evaluation.

        Raises:
          KeyError: there is no such split.
        """

    @abc.abstractmethod
    def make_base(self, options: TaskOptions, files: ModelFiles) -> BaseModel:
        """Creates the model without adapters."""

    @abc.abstractmethod
    def plan_batches(
        self, options: TaskOptions, data: TaskData, steps: int, seeds: Sequence[int], mesh: Mesh
    ) -> BatchPlan:
        """Chooses the shapes of the batches of a run of so many steps, or of several runs with these seeds."""

    @abc.abstractmethod
    def make_losses(
        self,
        options: TaskOptions,
        parts: AdaptedModel,
        mesh: Mesh | None = None,
        scored: Scored = ANY_POSITION,
    ) -> Losses:
        """Returns the loss functions for training and evaluation."""
