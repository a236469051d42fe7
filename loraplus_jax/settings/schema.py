"""A run's settings: typed sections, all checked before any work; `parsing.py` reads them from files."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PlainValidator
from pydantic.dataclasses import dataclass

from .._validation import check_number
from ..config import LoRAPlusConfig
from ..models.attention import Attention
from ..models.llama import Remat
from ..optim.lora_plus import MIN_EPS
from ..optim.schedules import Schedule
from ..roles import Policy
from .types import SECTION, Count, Decay, Fraction, Index, Int, Number, Rate, Share, Switch, Text

TaskName = Literal["classification", "regression", "instruction", "multiple_choice"]
Method = Literal["lora", "lora_plus", "full"]
Dtype = Literal["float32", "bfloat16"]

QUERIES_AND_VALUES = r"(.*/)?(query|value|q_proj|v_proj)"
DEFAULT_LORA = LoRAPlusConfig(target_modules=QUERIES_AND_VALUES)
LANGUAGE_TASKS = ("instruction", "multiple_choice")
"""The tasks of causal language models; the others are those of encoders."""
MAX_STEPS = 2**31 - 1
"""Steps are counted in int32."""
AUTO = "auto"
MOST_PORT = 65535


@dataclass(frozen=True, kw_only=True, config=SECTION)
class ModelSettings:
    """The pretrained model: an encoder for classification and regression, else a language model.

    Attributes:
      path: a Hugging Face directory or a GGUF file, a fetchable name, or a hub id, tried in this order.
      pooling: how an encoder's hidden states become one vector: their mean, the first token, or BERT's own pooler.
      dtype: what is computed in.
      param_dtype: what the frozen weights are kept in; adapters and whatever else is trained stay float32.
      dropout: replaces an encoder's own hidden and attention dropout rates when given.
      head_dropout: dropout before an encoder's new head.
      unroll: compile the layers as straight code instead of a loop; slower to compile.
      remat: of a language model, what is computed again for the gradient instead of kept: none; dots, all but what
        large matrix products made; or full, all but each layer's input. It takes less memory, and full more time.
      attention: of a language model: xla, blocked (less memory, and on a CPU faster from 256 tokens on), or auto.
      loss_chunk: of a language model whose head is frozen, how many tokens' logits exist at once.
    """

    path: Text
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    dropout: Share | None = None
    head_dropout: Share = 0.1
    unroll: Switch = False
    remat: Remat = "none"
    attention: Attention = "auto"
    loss_chunk: Count = 512


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DataSettings:
    """Where the texts lie, which columns hold what, and how they are split.

    A value is a path, a fetchable name or a hub id; files are .csv, .tsv or .jsonl, for language models .json too.

    Attributes:
      path: one file, split by `split_seed` into train, validation and test. Either this or `train` is required.
      train: the training file, when the splits are separate files.
      validation: the validation file; without it `validation_fraction` of the training file is taken.
      test: the test file, optional; only beside `train`.
      text: the column with the text.
      text_pair: the column with a second text, for tasks on pairs.
      label: the column with the label: a class name, a whole number, or a rating for regression.
      max_length: T, tokens a text (or pair) is truncated and padded to, special tokens included.
      validation_fraction: share of the distinct texts for validation, when no file is given for it.
      test_fraction: share of the distinct texts of `path` for the test split; 0 makes none.
      split_seed: decides which text goes to which split.
      template: the chat template: the model's own, plain (a few headings), or a file.
      answers: whether all turns of the assistant are learned, or the last.
      packing: whether short conversations share a row of max_length tokens; batches are counted in rows.
      column_names: for conversations and questions in columns of other names, ours to the file's.

    Raises:
      ValueError: a field is out of range, or two do not go together; the message names them.
    """

    path: Text | None = None
    train: Text | None = None
    validation: Text | None = None
    test: Text | None = None
    text: Text = "text"
    text_pair: Text | None = None
    label: Text = "label"
    max_length: Annotated[Int, Field(ge=2)] = 128
    validation_fraction: Fraction = 0.1
    test_fraction: Share = 0.2
    split_seed: Index = 0
    template: Text = "model"
    answers: Literal["all", "last"] = "all"
    packing: Switch = False
    column_names: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.train is None):
            given = f"path={self.path!r} and train={self.train!r}"
            raise ValueError(
                f"give either path (one file, split by seed) or train (separate files), got {given}"
            )
        for name in ("validation", "test"):
            if self.path is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} goes with train, not with path, got {getattr(self, name)!r}")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"text, text_pair and label must be different columns, got {self.columns}")
        if self.path is not None and self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction and test_fraction must leave something for training, "
                f"got {self.validation_fraction} + {self.test_fraction}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(c for c in (self.text, self.text_pair, self.label) if c is not None)


@dataclass(frozen=True, kw_only=True, config=SECTION)
class OptimizerSettings:
    """AdamW, its schedule and its groups.

    Attributes:
      learning_rate: eta_A, the peak rate of A and of everything but B; B's is lora.lr_ratio times it.
      head_learning_rate: the peak rate of the head and of other parameters trained in full; eta_A if not given.
      embedding_learning_rate: the peak rate of adapters of embeddings; eta_A if not given, 1e-6 under policy peft.
      policy: lora_plus scales B's rate alone; peft also that of biases and norms, without decay, as PEFT does.
      schedule: shape of the rate after warm-up.
      warmup_steps: steps of linear growth from 0 at the start.
      final_fraction: the share of the peak rate at which linear, cosine and wsd end.
      decay_steps: for wsd (warm-up, stable, decay), the steps of decay at the end; a fifth if not given.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: Adam's epsilon, at least 1e-30.
      weight_decay: a step shrinks a parameter by rate times this.
      decay: whether B's decay is lr_ratio times A's (coupled) or the same (equal).
      max_grad_norm: clips the norm over all gradients together.
    """

    learning_rate: Rate = 1e-4
    head_learning_rate: Rate | None = None
    embedding_learning_rate: Rate | None = None
    policy: Policy = "lora_plus"
    schedule: Schedule = "linear"
    warmup_steps: Index = 0
    final_fraction: Share = 0.0
    decay_steps: Count | None = None
    b1: Share = 0.9
    b2: Share = 0.999
    eps: Annotated[Number, Field(ge=MIN_EPS)] = 1e-8
    weight_decay: Decay = 0.0
    decay: Literal["coupled", "equal"] = "coupled"
    max_grad_norm: Rate | None = None

    def __post_init__(self) -> None:
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"optimizer.decay_steps goes with wsd, and the schedule is {self.schedule}")
        if self.schedule == "constant" and self.final_fraction:
            raise ValueError(
                "optimizer.final_fraction goes with linear, cosine or wsd, and the schedule is constant"
            )


@dataclass(frozen=True, kw_only=True, config=SECTION)
class TrainSettings:
    """How long, in which batches, and what is kept.

    Attributes:
      steps: optimizer steps; either this or epochs.
      epochs: passes over the training data, 3 if neither is given.
      batch_size: examples a step, over all devices and micro-batches.
      accumulate: micro-batches that a batch is cut into.
      eval_batch_size: examples a batch in evaluation.
      eval_every: steps between evaluations on the validation split; each one saves a checkpoint.
      log_every: steps between rows of metrics.jsonl.
      early_stopping: evaluations worse than the best after which training ends; never if not given.
      select: whether the adapter written at the end is the best evaluated one or the last.
      keep: how many of the newest checkpoints to keep, besides the best.
      max_skipped: a step whose loss, gradient or update is not finite is skipped; so many in a row end the run.
      compilation_cache: keep compiled programs in the cache directory, so that a second start is fast.
      theory_every: steps between measurements of what A's and B's steps did to each layer's output (theory/... in
        metrics.jsonl), on a quarter of a batch; none if not given.
      prompt: a question that a language model answers before and after training, printed and kept in summary.json.
      prompt_tokens: tokens of these answers at most.
    """

    steps: Annotated[Count, Field(le=MAX_STEPS)] | None = None
    epochs: Rate | None = None
    batch_size: Count = 32
    accumulate: Count = 1
    eval_batch_size: Count = 64
    eval_every: Count = 100
    log_every: Count = 10
    early_stopping: Count | None = None
    select: Literal["best", "last"] = "best"
    keep: Count = 2
    max_skipped: Count = 5
    compilation_cache: Switch = True
    theory_every: Count | None = None
    prompt: Text | None = None
    prompt_tokens: Count = 64

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"give train.steps or train.epochs, not both: {self.steps} and {self.epochs}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.accumulate must divide train.batch_size, got {self.accumulate} and {self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True, config=SECTION)
class MeshSettings:
    """The devices, as data x fsdp x tensor; one of the three may be -1, for all devices that the others leave.

    Attributes:
      data: how many parts the batch alone is split into.
      fsdp: how many parts batch and weights are split into; a layer's weights are gathered when it is computed.
      tensor: how many parts heads, inner widths and vocabulary are split into.
    """

    data: Int = -1
    fsdp: Int = 1
    tensor: Int = 1


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DistributedSettings:
    """The processes, where there are several; each is started with the same command but for process_id.

    Attributes:
      coordinator: HOST:PORT where process 0 can be reached; or auto, which asks the environment (TPU pods, SLURM,
        MPI, Kubernetes) for this and the next two; one process if not given.
      processes: how many there are.
      process_id: which of them this is, from 0.
      start_timeout: seconds to wait for the others at the start.
      lost_timeout: seconds of silence after which a process counts as lost and the others end.
    """

    coordinator: str | None = None
    processes: Count | None = None
    process_id: Index | None = None
    start_timeout: Count = 300
    lost_timeout: Count = 30

    def __post_init__(self) -> None:
        numbers = {"processes": self.processes, "process_id": self.process_id}
        if self.coordinator in (None, AUTO):
            for name, value in numbers.items():
                if value is not None:
                    raise ValueError(f"distributed.{name} goes with distributed.coordinator HOST:PORT")
            return
        host, _, port = str(self.coordinator).rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= MOST_PORT:
            raise ValueError(
                f"distributed.coordinator must be HOST:PORT, of a port from 1 to {MOST_PORT}, or {AUTO}, "
                f"got {self.coordinator!r}"
            )
        for name, value in numbers.items():
            if value is None:
                raise ValueError(f"distributed.coordinator is set, and distributed.{name} is not")
        if self.process_id >= self.processes:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(
                f"distributed.process_id must be from 0 to {self.processes - 1}, got {self.process_id}"  # pyright: ignore
            )


def _lora_config(value: Any) -> LoRAPlusConfig:
    """The section lora, which checks itself: it is used without settings too."""
    if isinstance(value, LoRAPlusConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping, got {value!r:.80}")
    try:
        # Not the default with changes, whose own lr_ratio would outlive another init.
        return LoRAPlusConfig.from_json({"target_modules": DEFAULT_LORA.target_modules, **value})
    except TypeError as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True, kw_only=True, config=SECTION)
class Settings:
    """A whole run.

    Attributes:
      model: the pretrained model.
      data: the labelled texts, conversations or questions.
      lora: what is adapted and how; an encoder's new head is always trained in full beside it.
      optimizer: rates, schedule, decay, clipping.
      train: length, batches, evaluation.
      mesh: the devices.
      distributed: the processes, where there are several.
      task: classification, or regression, one number a text; instruction, the answers in conversations; or
        multiple_choice, the right one of several answers, evaluated by which of them is the likeliest.
      method: lora_plus; lora, the same with lr_ratio 1; or full, which trains every weight and has no adapters.
      init_adapter: a run or an adapter directory, of this package or PEFT, that training starts from; what it says
        of ranks, scales and layers must be what the section lora says.
      init_adapter_rates: same if lr_ratio, policy and decay must be those that the adapter was trained with, where
        it says so; new if other ones are meant.
      seed: of initial values, shuffling and dropout.
      output_dir: where everything the run makes is written.
    """

    model: ModelSettings
    data: DataSettings
    lora: Annotated[LoRAPlusConfig, PlainValidator(_lora_config)] = DEFAULT_LORA
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    mesh: MeshSettings = MeshSettings()
    distributed: DistributedSettings = DistributedSettings()
    task: TaskName = "classification"
    method: Method = "lora_plus"
    init_adapter: Text | None = None
    init_adapter_rates: Literal["same", "new"] = "same"
    seed: Annotated[Index, Field(lt=2**32)] = 0
    output_dir: Text

    def __post_init__(self) -> None:
        if self.init_adapter is None and self.init_adapter_rates != "same":
            raise ValueError("init_adapter_rates goes with init_adapter, which is not set")
        _check_kind(self)
        if (config := self.applied) is not None:
            rate = self.optimizer.learning_rate * config.lr_ratio
            check_number("lora.lr_ratio times optimizer.learning_rate, B's rate,", rate, above=0.0)

    @property
    def is_language(self) -> bool:
        """Whether the model is a language model, not an encoder."""
        return self.task in LANGUAGE_TASKS

    @property
    def applied(self) -> LoRAPlusConfig | None:
        """What is really applied: None for full, and lr_ratio 1 for lora; the new head among what is trained."""
        if self.method == "full":
            return None
        ratio = 1.0 if self.method == "lora" else self.lora.lr_ratio
        head = () if self.is_language else ("head",)
        saved = tuple(dict.fromkeys((*self.lora.modules_to_save, *head)))
        return dataclasses.replace(self.lora, lr_ratio=ratio, modules_to_save=saved)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values, as written to `config.yaml`."""
        return _plain(dataclasses.asdict(self))


_OF_ENCODERS = {
    "model": ("pooling", "dropout", "head_dropout"),
    "data": ("text", "text_pair", "label"),
}
_OF_LANGUAGE_MODELS = {
    "model": ("remat", "attention", "loss_chunk"),
    "data": ("template", "answers", "packing", "column_names"),
    "train": ("prompt", "prompt_tokens"),
}


def _check_kind(settings: Settings) -> None:
    """Nothing is set that the task's kind of model has no use for."""
    odd = _OF_ENCODERS if settings.is_language else _OF_LANGUAGE_MODELS
    fits = [t for t in get_args(TaskName) if (t in LANGUAGE_TASKS) != settings.is_language]
    for section, names in odd.items():
        values = getattr(settings, section)
        defaults = {f.name: f.default for f in dataclasses.fields(values)}
        for name in names:
            if getattr(values, name) != defaults[name]:
                raise ValueError(
                    f"{section}.{name} goes with the tasks {' and '.join(fits)}, and the task is {settings.task}"
                )
    if settings.data.answers != "all" and settings.task != "instruction":
        raise ValueError(f"data.answers goes with the task instruction, and the task is {settings.task}")
    if settings.train.theory_every is not None and settings.method == "full":
        raise ValueError("train.theory_every measures adapters, and method full has none")
    if settings.train.prompt is None and settings.train.prompt_tokens != TrainSettings.prompt_tokens:
        raise ValueError("train.prompt_tokens goes with train.prompt, which is not set")


RESUMABLE_FIELDS = (
    *("train.steps", "train.epochs", "train.early_stopping", "train.select"),
    *("train.eval_every", "train.eval_batch_size", "train.log_every", "train.keep", "train.max_skipped"),
    *("train.compilation_cache", "train.theory_every", "mesh.data", "mesh.fsdp", "mesh.tensor", "output_dir"),
    *(f"distributed.{field.name}" for field in dataclasses.fields(DistributedSettings)),
)
"""What may differ when a run goes on. The first line decides when it ends: by these a finished run goes on too."""
STOP_FIELDS = RESUMABLE_FIELDS[:4]


def split_settings(
    values: Mapping[str, Any], prefix: str = "", may_change: Sequence[str] = RESUMABLE_FIELDS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plain settings as two trees: what must stay as it was when a run goes on, and what may change.

    >>> split_settings({"seed": 1, "train": {"steps": 5, "accumulate": 2}})
    ({'seed': 1, 'train': {'accumulate': 2}}, {'train': {'steps': 5}})
    """
    same: dict[str, Any] = {}
    free: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            for tree, part in zip(
                (same, free), split_settings(value, f"{prefix}{name}.", may_change), strict=True
            ):
                tree |= {name: part} if part else {}
        else:
            (free if f"{prefix}{name}" in may_change else same)[name] = value
    return same, free


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
