"""Settings of a sweep, and the trials they expand to."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from .._utils.field_types import SECTION, Count, Distinct, Fraction, Index, Int, Rate, Switch
from ..adapter.config import BASE_INITS
from ..settings.schema import INVARIANT, OptimizerSettings, Settings
from .trial import ARM_LABELS, METHODS, ArmName, Trial

MethodName = Literal[
    "lora",
    "lora_plus",
    "lora_b",
    "rslora",
    "dora",
    "adalora",
    "orthogonal",
    "pissa",
    "olora",
    "riemannian",
    "lora_rite",
    "lora_muon",
    "full",
]
RATE_MULTIPLES = (0.25, 0.5, 1.0, 2.0)
"""Default learning rates of LoRA+, as multiples of optimizer.learning_rate."""
MOST_REPORT_SEEDS, MOST_MEMBERS = 1000, 10_000
"""Upper limits: all members of a stage are in memory at the same time."""


def _round_digits(value: float) -> float:
    """Rounds to three significant digits, so that reports print exactly the value tried."""
    return float(f"{value:.3g}")


Rates = Annotated[tuple[Rate, ...], Field(min_length=1), Distinct]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SweepSettings:
    """Search space of a sweep, and how settings are compared.

    LoRA+ tries every combination of learning_rates and lr_ratios; plain LoRA (lr_ratio 1) has rates of its own.

    Attributes:
      method: search method: halving drops settings at each rung; grid trains every setting to the end.
      learning_rates: peak learning rates of A (eta_A) for LoRA+; null tries 1/4, 1/2, 1 and 2 times
        optimizer.learning_rate.
      lr_ratios: learning rate ratios lambda = eta_B / eta_A for LoRA+; 1 (plain LoRA) is not allowed.
      lora_learning_rates: peak learning rates for plain LoRA; null tries one per LoRA+ pair of rate and ratio,
        log-spaced from the smallest to the largest rate of LoRA+ (eta_A or eta_B).
      alphas: alphas to try with both methods; null uses lora.alpha.
      ranks: ranks to try with both methods; null uses lora.rank.
      widen: most further learning rates that a method tries, one after another, while its best rate is the smallest
        or largest tried; each is away by the mean factor between the rates listed, at least 2.
      seeds: random seeds of the search; null uses the run's seed.
      report_seeds: number of new seeds for the final comparison, counting up from the largest search seed + 1; use
        8 for a publishable result.
      curve_points: test evaluations of each report run after the one before its first step: one at a quarter of the
        steps, the others spread over the second half; steps to the target are interpolated linearly between them.
      control: also compare a control, plain LoRA with alpha x lambda at the selected LoRA+ learning rate; not with
        methods.
      rungs: fractions of the training steps after which halving drops settings, in increasing order.
      keep: fraction of each method's settings that halving keeps at a rung, at least one; if only one remains, it
        is selected without further training.
      target: test loss for counting steps to target; null uses, for each seed, the worse of the final LoRA and
        LoRA+ losses.
      members_at_once: runs that a device trains in parallel; null uses 1 on a CPU and measures elsewhere.
      methods: compare these methods, each tuned on as many settings as LoRA+ has, instead of LoRA and LoRA+ alone:
        lora (always among them), lora_plus, lora_b, rslora, dora, adalora, orthogonal, pissa, olora, riemannian,
        lora_rite, lora_muon, full.
      method_learning_rates: learning rates of single methods, with methods: a mapping from a method to a list as
        long as the settings of LoRA+; by default those of plain LoRA, a tenth of them for pissa, olora and full.
      unrelated_text: with methods, of a language model: a file of texts unlike the training data, on which each
        method's loss is measured before and after training, to see how much it forgets; in the formats of
        data.train for task instruction.
      ray: run the sweep on Ray: auto (the cluster of this node), the HOST:PORT of a cluster, or local (starts Ray
        on this machine alone); null runs it in this process.
      worker: resources of a worker with ray, by Ray's names, such as {GPU: 1}, {TPU: 4} or {CPU: 8}; null takes a
        GPU, else the TPU chips of a host, else a CPU core.
      group_size: most runs that one worker trains at a time; null takes as many as its devices train in parallel,
        and without ray, where runs follow one after another, all of a stage. The report depends on it, but not on
        the number of workers.
    """

    method: Literal["halving", "grid"] = "halving"
    learning_rates: Rates | None = None
    lr_ratios: Rates = (2.0, 4.0, 8.0, 16.0)
    lora_learning_rates: Rates | None = None
    alphas: Rates | None = None
    ranks: Annotated[tuple[Count, ...], Field(min_length=1), Distinct] | None = None
    widen: Annotated[Int, Field(ge=0, le=10)] = 0
    seeds: Annotated[tuple[Index, ...], Field(min_length=1), Distinct] | None = None
    report_seeds: Annotated[Int, Field(ge=2, le=MOST_REPORT_SEEDS)] = 3
    curve_points: Count = 7
    control: Switch = True
    rungs: Annotated[tuple[Fraction, ...], Field(min_length=1), Distinct] = (0.125,)
    keep: Fraction = 0.125
    target: Rate | None = None
    members_at_once: Annotated[Count, Field(le=MOST_MEMBERS)] | None = None
    methods: Annotated[tuple[MethodName, ...], Field(min_length=1), Distinct] | None = None
    method_learning_rates: dict[MethodName, Rates] = dataclasses.field(default_factory=dict)
    unrelated_text: str | None = None
    ray: str | None = None
    worker: dict[str, Rate] | None = None
    group_size: Annotated[Count, Field(le=MOST_MEMBERS)] | None = None

    def __post_init__(self) -> None:
        if 1.0 in self.lr_ratios:
            raise ValueError(
                f"lr_ratios must not contain 1, got {list(self.lr_ratios)}; that is plain LoRA, set its rates with "
                "sweep.lora_learning_rates"
            )
        if self.method == "grid":
            for name in ("rungs", "keep"):
                if getattr(self, name) != getattr(SweepSettings, name):
                    raise ValueError(f"{name} applies only to method halving, got method grid; remove {name}")
        if self.worker is not None and self.ray is None:
            raise ValueError(f"worker must be null without ray, got {dict(self.worker)}; set sweep.ray")
        for name in self.method_learning_rates:
            if self.methods is None or name not in ("lora", *self.methods):
                raise ValueError(f"method_learning_rates must be of sweep.methods, got {name}; add it there")
        if self.unrelated_text is not None and self.methods is None:
            raise ValueError(
                f"unrelated_text must be null without methods, got {self.unrelated_text}; set sweep.methods"
            )
        for name in ("alphas", "ranks", "lora_learning_rates") if self.methods else ():
            if getattr(self, name) is not None:
                where = "; use method_learning_rates" if name == "lora_learning_rates" else ""
                raise ValueError(f"{name} must be null with methods, got {getattr(self, name)}{where}")
        if list(self.rungs) != sorted(self.rungs):
            raise ValueError(f"rungs must be in increasing order, got {list(self.rungs)}")


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SweepRun(Settings):
    """Settings of a sweep: those of a run, and the section `sweep`.

    Attributes:
      sweep: search space, and how settings are compared.
    """

    sweep: SweepSettings = SweepSettings()
    resumable_fields: ClassVar = (
        *("train.keep", "train.compilation_cache", "mesh.data", "output_dir", "sweep.ray", "sweep.worker"),
    )

    def __post_init__(self) -> None:
        if self.optimizer.name in INVARIANT:
            raise ValueError(
                f"optimizer.name {self.optimizer.name} is unsupported in a sweep over lambda, which has no meaning "
                "for it; use adamw or riemannian"
            )
        super().__post_init__()
        if self.method != "lora_plus":
            raise ValueError(f"method must be lora_plus for a sweep, got {self.method}")
        if self.init_adapter is not None:
            raise ValueError(
                f"init_adapter is unsupported in a sweep, got {self.init_adapter}; remove it, as each "
                "setting initializes its own adapter"
            )
        if self.sweep.unrelated_text is not None and not self.is_language:
            raise ValueError(f"sweep.unrelated_text needs a language model, got task {self.task}; remove it")
        self._check_one_process()
        if max(self.seeds) + self.sweep.report_seeds >= 2**32:
            raise ValueError(
                f"sweep.report_seeds {self.sweep.report_seeds}: report seeds continue from search seed "
                f"{max(self.seeds)} and must be below 2**32; use a smaller seed"
            )
        # A pattern would fix for some modules what the list varies.
        for name, pattern in (("alphas", "alpha_pattern"), ("ranks", "rank_pattern")):
            if getattr(self.sweep, name) is not None and (fixed := getattr(self.lora, pattern)):
                raise ValueError(
                    f"sweep.{name} cannot vary modules that lora.{pattern} fixes, got {dict(fixed)}; remove "
                    "one of the two settings"
                )
        if self.lora.init in BASE_INITS:
            self._check_start()
        self._check_size()
        if self.sweep.methods is None:  # else of each method
            for arm in METHODS:
                check_widen(self.sweep, ARM_LABELS[arm], [trial for trial in self.trials if trial.arm == arm])
        for trial in self.trials:
            self.settings_of(trial, self.seed)
            if self.sweep.control:
                self.settings_of(trial.control, self.seed)

    def _check_size(self) -> None:
        # Before the lists are expanded, whose product may be of any size.
        sweep, seeds = self.sweep, len(self.seeds)
        pairs = len(_rates(self)) * len(sweep.lr_ratios)
        lora_rates = len(sweep.lora_learning_rates or ()) or pairs
        count = (pairs + lora_rates) * len(sweep.alphas or (self.lora.alpha,)) * len(self.ranks)
        if (members := count * seeds) > MOST_MEMBERS:
            raise ValueError(
                f"a sweep trains at most {MOST_MEMBERS:,} runs, got {members:,} ({count:,} settings x {seeds:,} of "
                "sweep.seeds); shorten the lists"
            )

    def _check_one_process(self) -> None:
        if (self.mesh.fsdp, self.mesh.tensor) != (1, 1) or self.distributed.coordinator is not None:
            raise ValueError(
                f"a sweep runs in one process and shards no member: mesh.fsdp and mesh.tensor must be 1, got "
                f"{self.mesh.fsdp} and {self.mesh.tensor}, and distributed.coordinator null, got "
                f"{self.distributed.coordinator or 'null'}"
            )

    def _check_start(self) -> None:
        """Rejects what would give members different bases: the start is taken from the base."""
        if BASE_INITS[init := self.lora.init].source == "gradients":
            raise ValueError(
                f"lora.init {init} is unsupported in a sweep, since its start depends on the seed; got {init}"
            )
        for name, value in (("alphas", self.sweep.alphas), ("ranks", self.sweep.ranks)):
            if value is not None:
                raise ValueError(
                    f"sweep.{name} must be null with lora.init {init}, since all members share one start; got "
                    f"{list(value)}"
                )
        if self.sweep.control:
            raise ValueError(
                f"sweep.control must be false with lora.init {init}: it has another scale, got true"
            )

    @property
    def seeds(self) -> tuple[int, ...]:
        """Search seeds."""
        return (self.seed,) if self.sweep.seeds is None else self.sweep.seeds

    @property
    def report_seeds(self) -> tuple[int, ...]:
        """Report seeds; none of them is a search seed."""
        first = max(self.seeds) + 1
        return tuple(range(first, first + self.sweep.report_seeds))

    @property
    def arms(self) -> tuple[ArmName, ...]:
        """Arms that the report compares."""
        return ("lora", "lora_plus", "control") if self.sweep.control else METHODS

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks to try."""
        return self.sweep.ranks or (self.lora.rank,)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every setting of the search, plain LoRA first."""
        pairs, lora_rates = grid_rates(self)
        shared = list(itertools.product(self.sweep.alphas or (self.lora.alpha,), self.ranks))
        return tuple(
            Trial(*pair, *rest) for pair in [*((r, 1.0) for r in lora_rates), *pairs] for rest in shared
        )

    @property
    def shared_optimizer(self) -> OptimizerSettings:
        """Optimizer settings that all members share.

        An encoder's new head trains at the recipe's learning rate, for every eta_A that members try. For the same
        eta_B, eta_A is larger for LoRA than for LoRA+; a head at eta_A would confound its own rate with the method.
        Full fine-tuning has one rate for all weights.
        """
        if self.is_language or self.optimizer.head_learning_rate is not None or self.method == "full":
            return self.optimizer
        return dataclasses.replace(self.optimizer, head_learning_rate=self.optimizer.learning_rate)

    def settings_of(self, trial: Trial, seed: int, output_dir: str | None = None) -> Settings:
        """Settings of the single run that equals a trial with a seed.

        lora.alpha_pattern scales with the trial's alpha, so a control has lambda times the scale in every module.
        """
        # Not dataclasses.replace or asdict: the class changes from SweepRun to Settings, and sections stay objects.
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}
        growth = trial.alpha / self.lora.alpha
        values["lora"] = dataclasses.replace(
            self.lora,
            rank=trial.rank,
            alpha=trial.alpha,
            alpha_pattern={name: growth * alpha for name, alpha in self.lora.alpha_pattern.items()},
            lr_ratio=trial.lr_ratio,
        )
        values["optimizer"] = dataclasses.replace(self.shared_optimizer, learning_rate=trial.learning_rate)
        return Settings(**{**values, "seed": seed, "output_dir": output_dir or self.output_dir})


def check_widen(sweep: SweepSettings, label: str, trials: Sequence[Trial]) -> None:
    """Rejects `sweep.widen` where an arm has no spacing that could continue."""
    rates = {trial.learning_rate for trial in trials}
    if sweep.widen and len(rates) == 1:
        raise ValueError(
            f"sweep.widen continues the spacing of at least two learning rates, got {sweep.widen} and only "
            f"{rates.pop():g} for {label}; try more rates or set it to 0"
        )


def _rates(run: SweepRun) -> tuple[float, ...]:
    """eta_A values of LoRA+; default ones are rounded, except optimizer.learning_rate itself."""
    base_rate = run.optimizer.learning_rate
    return run.sweep.learning_rates or tuple(
        base_rate if f == 1.0 else _round_digits(f * base_rate) for f in RATE_MULTIPLES
    )


def _lora_rates(run: SweepRun) -> tuple[float, ...]:
    """Learning rates of plain LoRA: by default as many as LoRA+ has pairs, if so many differ in three digits."""
    if run.sweep.lora_learning_rates:
        return run.sweep.lora_learning_rates
    rates, ratios = _rates(run), run.sweep.lr_ratios
    low, high = min(rates) * min(1.0, *ratios), max(rates) * max(1.0, *ratios)
    return tuple(dict.fromkeys(map(_round_digits, np.geomspace(low, high, len(rates) * len(ratios)))))


def grid_rates(run: SweepRun) -> tuple[list[tuple[float, float]], tuple[float, ...]]:
    """The pairs of rate and ratio that LoRA+ tries, and as many log-spaced rates for a method without a ratio."""
    return list(itertools.product(_rates(run), run.sweep.lr_ratios)), _lora_rates(run)
