"""The settings of a run: typed sections, validated before any work starts. `parsing.py` reads them from files."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator
from pydantic.dataclasses import dataclass

from .._utils.field_types import (
    SECTION,
    Count,
    Decay,
    Distinct,
    Index,
    Int,
    Number,
    Rate,
    Requirement,
    Share,
    Switch,
    Text,
    check_requirements,
)
from .._utils.records import PATHS
from .._utils.validation import check_number, to_plain
from ..adapter.config import BASE_INITS, LoRAPlusConfig
from ..data.options import DataOptions
from ..models.options import ModelOptions
from ..optim.lora_plus import MIN_EPS
from ..optim.roles import Policy
from ..optim.schedules import Schedule
from ..tasks.options import ENCODER_TASKS, LANGUAGE_TASKS, GenerationOptions, TaskName, TaskOptions

Method = Literal["lora", "lora_plus", "full"]
TrackerName = Literal["wandb", "mlflow", "trackio"]
OptimizerName = Literal["adamw", "riemannian", "lora_rite", "lora_muon"]
INVARIANT = ("lora_rite", "lora_muon")
"""The optimizers for which lambda has no meaning."""

QUERIES_AND_VALUES = r"(.*/)?(query|value|q_proj|v_proj)"
DEFAULT_LORA = LoRAPlusConfig(target_modules=QUERIES_AND_VALUES)
# optax counts steps in int32.
MAX_STEPS = 2**31 - 1
AUTO = "auto"
MOST_PORT = 65535
IGNORED: Mapping[Method, tuple[str, ...]] = {
    "lora": ("lora.lr_ratio", "optimizer.decay"),
    "full": ("lora.*", "optimizer.decay"),
}
"""Settings that a method ignores and names at the start of a run: rejecting them would need a file per method."""


OPTIMIZER_REQUIREMENTS: tuple[Requirement, ...] = (
    (("optimizer.decay_steps",), "optimizer.schedule", ("wsd",)),
    (("optimizer.final_fraction",), "optimizer.schedule", ("linear", "cosine", "wsd")),
    (("optimizer.decay",), "optimizer.weight_decay", ()),
    (("optimizer.reg",), "optimizer.name", ("riemannian",)),
    (("optimizer.target_rank",), "optimizer.name", ("adamw",)),
    (("optimizer.b2", "optimizer.eps"), "optimizer.name", ("adamw", "riemannian", "lora_rite")),
)


@dataclass(frozen=True, kw_only=True, config=SECTION)
class OptimizerSettings:
    """The optimizer, its learning rate schedule and its parameter groups.

    Attributes:
      name: adamw; riemannian, AdamW on gradients that each factor preconditions for the other (arXiv 2402.02347);
        lora_rite (arXiv 2410.20625) and lora_muon (arXiv 2606.12921), whose steps do not depend on how A B is split
        and which need lora.lr_ratio 1, as method lora has.
      reg: what riemannian adds to the diagonal of A'A and BB'.
      learning_rate: eta_A, peak learning rate of A and all else except B; B's is lora.lr_ratio times it.
      head_learning_rate: peak learning rate of the head and other fully trained parameters; null uses eta_A.
      embedding_learning_rate: peak learning rate of embedding adapters; null uses eta_A, or 1e-6 with policy peft.
      magnitude_learning_rate: peak learning rate of the magnitudes of lora.variant dora; null uses eta_A.
      policy: parameter groups: lora_plus gives only B lora.lr_ratio x learning_rate; peft, as PEFT does, also
        biases and norms, which then get no weight decay, and magnitudes.
      schedule: learning rate schedule after warmup.
      warmup_steps: steps of linear warmup from 0.
      final_fraction: final learning rate as a fraction of the peak (linear, cosine and wsd).
      decay_steps: steps of decay at the end of wsd (warmup, stable, decay); null uses a fifth of all steps.
      b1: decay rate of Adam's first moment, and of the momentum of lora_rite and lora_muon.
      b2: decay rate of Adam's second moment.
      eps: Adam's epsilon, at least 1e-30.
      weight_decay: weight decay; a step shrinks a parameter by its learning rate times this.
      decay: weight decay of B: coupled is lora.lr_ratio times A's; equal is the same as A's.
      max_grad_norm: maximum global gradient norm; null disables clipping.
      target_rank: mean rank to which AdaLoRA (arXiv 2303.10512) lowers lora.rank, giving the rank to the modules
        that need it; ranks fall from the first tenth of the steps on and are fixed in the last three; null keeps
        all ranks.
    """

    name: OptimizerName = "adamw"
    reg: Rate = 1e-2
    learning_rate: Rate = 1e-4
    head_learning_rate: Rate | None = None
    embedding_learning_rate: Rate | None = None
    magnitude_learning_rate: Rate | None = None
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
    target_rank: Rate | None = None

    def __post_init__(self) -> None:
        check_requirements(self, OPTIMIZER_REQUIREMENTS, "optimizer.")


@dataclass(frozen=True, kw_only=True, config=SECTION)
class TrainSettings:
    """Training length, batch sizes, evaluation, logging and checkpoints.

    Attributes:
      steps: optimizer steps; set this or epochs.
      epochs: passes over the training data; 3 if steps is not set either.
      batch_size: examples per optimizer step, over all devices and micro-batches; of packed conversations, rows.
      accumulate: gradient accumulation, micro-batches per step; must divide batch_size.
      eval_batch_size: maximum rows per evaluation batch; texts of encoders share rows, and choices do.
      eval_every: steps between evaluations on the validation split; each evaluation saves a checkpoint.
      log_every: steps between rows of metrics.jsonl.
      early_stopping: stop after this many consecutive evaluations worse than the best; null never stops early.
      select: state to write as the final adapter: best (by the validation metric) or last.
      keep: number of newest checkpoints to keep, in addition to the best.
      max_skipped: abort after this many consecutive non-finite steps; a step whose loss, gradient or update is not
        finite is skipped.
      compilation_cache: cache compiled programs on disk, so that later starts are faster; in
        JAX_COMPILATION_CACHE_DIR if that is set, with JAX's own options.
      theory_every: steps between measurements of how A's and B's updates change each layer's output (theory/... in
        metrics.jsonl), on a quarter of a batch's rows; null disables them.
      prompt: prompt that a language model answers before and after training; printed and saved in summary.json.
      prompt_tokens: maximum tokens of each of these answers.
      report_to: services that get the rows of metrics.jsonl and the config, beside TensorBoard's files: a list of
        wandb, mlflow and trackio, each an extra of its name (pip install 'loraplus_jax[wandb]').
      label_smoothing: share of every training target that is spread evenly over the vocabulary (language models);
        evaluations are without it.
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
    report_to: Annotated[tuple[TrackerName, ...], Distinct] = ()
    label_smoothing: Share = 0.0

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"set only one of train.steps and train.epochs, got {self.steps} and {self.epochs}; add "
                "--train.epochs null to train by steps, or --train.steps null to train by epochs"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.accumulate must divide train.batch_size, got {self.accumulate} and {self.batch_size}"
            )


GENERATION = tuple(f"generation.{field.name}" for field in dataclasses.fields(GenerationOptions))
REQUIREMENTS: tuple[Requirement, ...] = (
    (("model.pooling", "model.dropout", "model.head_dropout"), "task", ENCODER_TASKS),
    (("data.text", "data.text_pair", "data.label", "data.metrics"), "task", ENCODER_TASKS),
    (("data.delimiter", "data.quoting", "data.header", "data.root"), "task", ENCODER_TASKS),
    (("model.quantize",), "method", ("lora_plus", "lora")),
    (("model.quantize_exclude",), "model.quantize", ("int8", "nf4", "file")),
    (("model.split_fused", "model.remat", "model.attention", "model.loss_chunk"), "task", LANGUAGE_TASKS),
    (("data.template", "data.packing", "data.column_names"), "task", LANGUAGE_TASKS),
    (("train.prompt", "train.prompt_tokens", "train.label_smoothing"), "task", LANGUAGE_TASKS),
    (("data.answers",), "task", ("instruction",)),
    (GENERATION, "task", ("generation",)),
    (("generation.no_repeat_in",), "generation.no_repeat_ngram", ()),
    (("optimizer.name",), "method", ("lora_plus", "lora")),
    (("optimizer.target_rank",), "method", ("lora_plus", "lora")),
    (("optimizer.target_rank",), "train.select", ("last",)),
    (("optimizer.target_rank",), "train.early_stopping", (None,)),
    (("optimizer.magnitude_learning_rate",), "lora.variant", ("dora",)),
    (("train.prompt_tokens",), "train.prompt", ()),
    (("train.theory_every",), "method", ("lora_plus", "lora")),
    (("train.theory_every",), "lora.variant", ("lora",)),
    (("distributed.start_timeout", "distributed.lost_timeout"), "distributed.coordinator", ()),
    (("init_adapter_rates",), "init_adapter", ()),
)
"""What no section checks itself: most of these fields require one of another section."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class MeshSettings:
    """The device mesh, data x fsdp x tensor; one of the three sizes may be -1, for the remaining devices.

    Attributes:
      data: data-parallel size, which splits only the batch; -1 uses the remaining devices.
      fsdp: FSDP size, which splits batch and weights and all-gathers a layer's weights when it runs; -1 uses the
        remaining devices.
      tensor: tensor-parallel size, which splits heads, MLP widths and vocabulary; -1 uses the remaining devices.
    """

    data: Int = -1
    fsdp: Int = 1
    tensor: Int = 1


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DistributedSettings:
    """Several processes; start every one with the same command except for process_id.

    Attributes:
      coordinator: HOST:PORT of process 0, where it listens; auto detects it, processes and process_id from the
        environment (TPU pods, SLURM, MPI, Kubernetes); null runs a single process.
      processes: number of processes.
      process_id: index of this process, from 0.
      start_timeout: seconds to wait for the other processes at startup.
      lost_timeout: seconds without a heartbeat after which a process counts as lost and the others exit.
    """

    coordinator: str | None = None
    processes: Count | None = None
    process_id: Index | None = None
    start_timeout: Count = 300
    lost_timeout: Count = 30

    def __post_init__(self) -> None:
        has_address = self.coordinator not in (None, AUTO)
        for name in ("processes", "process_id"):
            if (getattr(self, name) is not None) != has_address:
                given = ("null" if x is None else x for x in (self.coordinator, getattr(self, name)))
                raise ValueError(
                    f"distributed.coordinator HOST:PORT (not auto) and distributed.{name} require each other, got "
                    f"{' and '.join(map(str, given))}"
                )
        if not has_address:
            return
        host, _, port = str(self.coordinator).rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= MOST_PORT:
            raise ValueError(
                f"distributed.coordinator must be HOST:PORT (port 1 to {MOST_PORT}) or {AUTO}, "
                f"got {self.coordinator!r}"
            )
        if self.process_id >= self.processes:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(
                f"distributed.process_id must be from 0 to {self.processes - 1}, got {self.process_id}"  # pyright: ignore
            )


@dataclass(frozen=True, kw_only=True, config=SECTION)
class MeshChanges:
    """Sizes that replace those of a run's mesh.

    Attributes:
      data: data-parallel size, which splits only the batch; null is that of the run, or -1 for a model without one.
      fsdp: FSDP size, which splits batch and weights; null is that of the run, or 1.
      tensor: tensor-parallel size, which splits heads, MLP widths and vocabulary; null is that of the run, or 1.
    """

    data: Int | None = None
    fsdp: Int | None = None
    tensor: Int | None = None


@dataclass(frozen=True, kw_only=True, config=SECTION)
class DeviceSettings:
    """The devices of a command that uses a run.

    Attributes:
      mesh: changes to the device mesh of the run.
      distributed: the processes, which are not those of the run.
    """

    mesh: MeshChanges = MeshChanges()
    distributed: DistributedSettings = DistributedSettings()


def _lora_config(value: Any) -> LoRAPlusConfig:
    """Validates the section lora by `LoRAPlusConfig`, which is also used without settings."""
    if isinstance(value, LoRAPlusConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping, got {value!r:.80}")
    try:
        # Not dataclasses.replace of the default: it would keep the lr_ratio of the default init.
        return LoRAPlusConfig.from_json({"target_modules": DEFAULT_LORA.target_modules, **value})
    except TypeError as error:
        raise ValueError(str(error)) from None


RESUMABLE_FIELDS = (
    *("train.steps", "train.epochs", "train.early_stopping", "train.select"),
    *("train.eval_every", "train.eval_batch_size", "train.log_every", "train.keep", "train.max_skipped"),
    *("train.compilation_cache", "train.theory_every", "train.report_to", "generation.batch_size"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "output_dir"),
    *(f"distributed.{field.name}" for field in dataclasses.fields(DistributedSettings)),
)
"""Settings that may change when a run resumes."""
PATH_FIELDS = (*PATHS, "data.template", "sweep.unrelated_text")
"""Settings that name files, which may move: when a run resumes, only their content is compared, by digests."""
STOP_FIELDS = RESUMABLE_FIELDS[:4]
"""Settings that decide when a run ends; changing one also resumes a finished run."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class Settings:
    """The settings of a run.

    Attributes:
      model: the pretrained model.
      data: the labelled texts, conversations or questions.
      lora: which layers are adapted and how; an encoder's new head is always fully trained as well.
      optimizer: learning rates, schedule, weight decay and clipping.
      train: training length, batch sizes and evaluation.
      generation: how texts are generated and scored (task generation).
      mesh: the device mesh.
      distributed: the processes.
      task: classification; regression (one number per text); instruction (trains on the assistant's answers);
        multiple_choice (scored by the most likely choice); generation (texts for structured inputs, scored against
        references).
      method: lora_plus; lora (the same with lr_ratio 1; ignores lora.lr_ratio and optimizer.decay); full (trains
        every weight, without adapters; ignores lora.* and optimizer.decay).
      init_adapter: start from this run, or adapter saved by loraplus or PEFT; its rank, alpha and layers must match
        lora.*.
      init_adapter_rates: same requires the lr_ratio, policy and weight decay that init_adapter was trained with, if
        recorded; new allows different ones.
      seed: random seed for initialization, shuffling and dropout.
      output_dir: output directory for checkpoints, logs and results.
    """

    model: ModelOptions
    data: DataOptions
    lora: Annotated[LoRAPlusConfig, PlainValidator(_lora_config)] = DEFAULT_LORA
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    generation: GenerationOptions = GenerationOptions()
    mesh: MeshSettings = MeshSettings()
    distributed: DistributedSettings = DistributedSettings()
    task: TaskName = "classification"
    method: Method = "lora_plus"
    init_adapter: Text | None = None
    init_adapter_rates: Literal["same", "new"] = "same"
    seed: Annotated[Index, Field(lt=2**32)] = 0
    output_dir: Text
    # A class variable, since a sweep, whose settings extend these, may change fewer.
    resumable_fields: ClassVar[tuple[str, ...]] = RESUMABLE_FIELDS

    def __post_init__(self) -> None:
        check_requirements(self, REQUIREMENTS)
        self._check_search()
        if (config := self.applied) is not None:
            self._check_init(config)
            if self.optimizer.name in INVARIANT and config.lr_ratio != 1:
                raise ValueError(
                    f"lora.lr_ratio must be 1 with optimizer.name {self.optimizer.name}, got {config.lr_ratio:g}: "
                    "its steps do not depend on how A B is split, so a faster B has no meaning; set method lora"
                )
            rate = self.optimizer.learning_rate * config.lr_ratio
            check_number("B's learning rate, lora.lr_ratio x optimizer.learning_rate,", rate, above=0.0)

    def _check_search(self) -> None:
        search, default = self.generation, GenerationOptions()
        for name in ("length_penalty", "early_stopping"):
            if search.beams == 1 and getattr(search, name) != getattr(default, name):
                raise ValueError(
                    f"generation.{name} requires generation.beams above 1; it has no effect with 1"
                )

    def _check_init(self, config: LoRAPlusConfig) -> None:
        if config.init not in BASE_INITS:
            return
        if config.variant != "lora":
            raise ValueError(
                f"lora.init {config.init} requires lora.variant lora, got {config.variant}; set lora.init lora"
            )
        if self.init_adapter is not None:
            raise ValueError(
                f"lora.init {config.init} and init_adapter both set the start; remove init_adapter, or set "
                "lora.init lora"
            )
        allowed = ("nf4", "int8") if config.init == "loftq" else ("none",)
        if self.model.quantize not in allowed:
            other = "" if config.init == "loftq" else "; for a quantized base use lora.init loftq"
            raise ValueError(
                f"lora.init {config.init} requires model.quantize {' or '.join(allowed)}, got "
                f"{self.model.quantize}{other}"
            )

    @property
    def is_language(self) -> bool:
        """Whether the model is a causal language model, not an encoder."""
        return self.task in LANGUAGE_TASKS

    @property
    def task_options(self) -> TaskOptions:
        """What the task is made from."""
        names = ("batch_size", "accumulate", "eval_batch_size", "label_smoothing")
        of_training: Any = {name: getattr(self.train, name) for name in names}
        return TaskOptions(
            kind=self.task, model=self.model, data=self.data, generation=self.generation, **of_training
        )

    @property
    def lr_ratio(self) -> float:
        """The effective lambda: 1 except for method lora_plus."""
        return self.lora.lr_ratio if self.method == "lora_plus" else 1.0

    @property
    def applied(self) -> LoRAPlusConfig | None:
        """The effective config: None for full; an encoder's head is in `modules_to_save`."""
        if self.method == "full":
            return None
        head = () if self.is_language else ("head",)
        saved = tuple(dict.fromkeys((*self.lora.modules_to_save, *head)))
        return dataclasses.replace(self.lora, lr_ratio=self.lr_ratio, modules_to_save=saved)

    def to_json(self) -> dict[str, Any]:
        """Returns all fields as plain values, as written to `config.yaml`."""
        return to_plain(dataclasses.asdict(self))


def hide_paths(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Plain settings that say of `PATH_FIELDS` only whether they are given.

    >>> hide_paths({"seed": 1, "data": {"train": "a.csv", "test": None}})
    {'seed': 1, 'data': {'train': 'given', 'test': None}}
    """
    hidden: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            hidden[name] = hide_paths(value, f"{prefix}{name}.")
        else:
            hidden[name] = "given" if f"{prefix}{name}" in PATH_FIELDS and value is not None else value
    return hidden


def split_settings(
    values: Mapping[str, Any], prefix: str = "", may_change: Sequence[str] = RESUMABLE_FIELDS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits plain settings into two trees: those that must not change when a run resumes, and those that may.

    >>> split_settings({"seed": 1, "train": {"steps": 5, "accumulate": 2}})
    ({'seed': 1, 'train': {'accumulate': 2}}, {'train': {'steps': 5}})
    """
    fixed: dict[str, Any] = {}
    free: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" not in may_change:
            for tree, part in zip(
                (fixed, free), split_settings(value, f"{prefix}{name}.", may_change), strict=True
            ):
                tree |= {name: part} if part else {}
        else:
            (free if f"{prefix}{name}" in may_change else fixed)[name] = value
    return fixed, free
