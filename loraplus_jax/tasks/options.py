"""What a task is made from."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .._utils.field_types import SECTION, Count, Index, Number
from ..data.options import DataOptions
from ..models.choices import MOST_PENALTY, EarlyStopping, NoRepeatIn
from ..models.options import ModelOptions

TaskName = Literal["classification", "regression", "instruction", "multiple_choice", "generation"]
ENCODER_TASKS = ("classification", "regression")
LANGUAGE_TASKS = ("instruction", "multiple_choice", "generation")
"""The tasks for causal language models."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class GenerationOptions:
    """How texts are generated and scored before and after training, and by eval and generate (task generation).

    Attributes:
      beams: beams of the beam search; 1 is greedy decoding.
      length_penalty: power of the length by which a text's log-probability is divided to compare texts; above 0
        favours longer ones.
      no_repeat_ngram: no sequence of this many tokens appears twice; 0 allows all.
      no_repeat_in: where these sequences are counted: new, in the text alone, which may then copy from its input;
        all, in input and text, as transformers does.
      early_stopping: when the search for a text ends: complete, once as many texts as beams have ended; heuristic,
        once no open one would beat these if it ended now; never, once none can beat them at any length.
      max_new_tokens: maximum tokens of a text.
      inputs: distinct inputs to keep of the held-out split (test, or validation if there is none), evenly spaced,
        with all their texts; null keeps all.
      batch_size: inputs per batch, each with all its beams.
    """

    beams: Count = 4
    length_penalty: Annotated[Number, Field(ge=-MOST_PENALTY, le=MOST_PENALTY)] = 1.0
    no_repeat_ngram: Index = 0
    no_repeat_in: NoRepeatIn = "new"
    early_stopping: EarlyStopping = "heuristic"
    max_new_tokens: Count = 64
    inputs: Count | None = None
    batch_size: Count = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What a task is made from.

    Attributes:
      kind: its name.
      model, data: the pretrained model, and the data.
      generation: how texts are generated and scored (task generation).
      batch_size, accumulate: examples per optimizer step, and micro-batches that they are computed in.
      eval_batch_size: maximum rows per evaluation batch.
      label_smoothing: share of every target that is spread evenly over the vocabulary (language models).
    """

    kind: TaskName
    model: ModelOptions
    data: DataOptions
    generation: GenerationOptions
    batch_size: int
    accumulate: int
    eval_batch_size: int
    label_smoothing: float
