"""What a sweep tries: the settings of its own, and the trials that follow from them."""

import dataclasses
import itertools
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from ..settings.schema import OptimizerSettings, Settings
from ..settings.types import SECTION, Count, Distinct, Fraction, Index, Int, Number, Rate, Switch

MAY_CHANGE = ("train.keep", "train.compilation_cache", "mesh.data", "output_dir")
"""What may differ when a sweep goes on."""
Arm = Literal["lora", "lora_plus", "control"]
METHODS = ("lora", "lora_plus")
ARM_LABELS: dict[str, str] = {"lora": "LoRA", "lora_plus": "LoRA+", "control": "LoRA(alpha x lambda)"}
"""How the arms are called on paper."""
RATE_MULTIPLES = (0.25, 0.5, 1.0, 2.0)
"""The default learning rates, as multiples of the run's own."""
MAX_SAMPLES, MOST_REPORT_SEEDS, MOST_MEMBERS = 1000, 1000, 10_000
"""All members of a stage are held side by side."""
MAX_DRAWS_PER_SAMPLE = 100
"""So many times the samples are drawn at most, until enough of them differ."""


def _short(value: float) -> float:
    """To three digits: what is tried is what is written."""
    return float(f"{value:.3g}")


def _check_digits(values: tuple[float, ...]) -> tuple[float, ...]:
    """Values that differ in the fourth digit alone are the same setting, tried twice."""
    first: dict[float, float] = {}
    for value in values:
        if (earlier := first.setdefault(_short(value), value)) != value:
            raise ValueError(f"holds {earlier!r} and {value!r}, which are the same to three digits")
    return values


Rates = Annotated[tuple[Rate, ...], Field(min_length=1), Distinct, AfterValidator(_check_digits)]


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SweepSettings:
    """Which settings are tried, and how they are compared.

    LoRA+ is tried at every learning rate with every lr_ratio; plain LoRA, whose lr_ratio is 1, at rates of its own.

    Attributes:
      method: halving drops settings at the rungs and chooses among the others at the end; grid trains all to it.
      learning_rates: eta_A of LoRA+, peak rates; 1/4, 1/2, 1 and 2 times optimizer.learning_rate if not given.
      lr_ratios: lambda of LoRA+, other than 1.
      lora_learning_rates: the peak rates of plain LoRA; if not given, as many as LoRA+ has pairs of rate and ratio,
        evenly spaced on a log scale from the least eta_A to the largest eta_B of LoRA+.
      alphas: the alphas that both are tried with; lora.alpha if not given.
      ranks: the ranks that both are tried with; lora.rank if not given.
      samples: draw so many settings for each of LoRA+ and LoRA instead of trying all: rates and ratios between the
        least and the largest given, evenly on a log scale, alphas and ranks from the lists.
      seeds: the seeds of the search; the run's own if not given.
      report_seeds: how many other seeds, counted up from the largest of the search, the chosen settings are
        compared on.
      control: whether LoRA with alpha times lambda, at the rate of the LoRA+ that was chosen, is compared too.
      rungs: for halving, the shares of the steps after which settings are dropped.
      keep: for halving, the share of LoRA+'s and of LoRA's settings that goes on after a rung, at least one each;
        one that is alone is chosen without being trained on.
      target: the test loss to count steps to; if not given, on each seed the worse of LoRA's and LoRA+'s last ones.
      members_at_once: how many runs a device computes side by side; 1 on a CPU, else measured if not given.
    """

    method: Literal["halving", "grid"] = "halving"
    learning_rates: Rates | None = None
    lr_ratios: Rates = (2.0, 4.0, 8.0, 16.0)
    lora_learning_rates: Rates | None = None
    alphas: Rates | None = None
    ranks: Annotated[tuple[Count, ...], Field(min_length=1), Distinct] | None = None
    samples: Annotated[Count, Field(le=MAX_SAMPLES)] | None = None
    seeds: Annotated[tuple[Index, ...], Field(min_length=1), Distinct] | None = None
    report_seeds: Annotated[Int, Field(ge=2, le=MOST_REPORT_SEEDS)] = 3
    control: Switch = True
    rungs: Annotated[tuple[Fraction, ...], Field(min_length=1), Distinct] = (0.125,)
    keep: Fraction = 0.125
    target: Number | None = None
    members_at_once: Annotated[Count, Field(le=MOST_MEMBERS)] | None = None

    def __post_init__(self) -> None:
        if ones := [ratio for ratio in self.lr_ratios if _short(ratio) == 1.0]:
            digits = "" if ones[0] == 1.0 else " to three digits"
            raise ValueError(
                f"lr_ratios holds {ones[0]:.9g}, which is plain LoRA{digits}: its rates are "
                "sweep.lora_learning_rates"
            )
        if self.method == "grid":
            for name in ("rungs", "keep"):
                if getattr(self, name) != getattr(SweepSettings, name):
                    raise ValueError(f"{name} goes with the method halving, and the method is grid")
        if list(self.rungs) != sorted(self.rungs):
            raise ValueError(f"rungs must grow, got {list(self.rungs)}")


class Trial(NamedTuple):
    """One setting.

    Attributes:
      learning_rate: eta_A, the peak.
      lr_ratio: lambda.
      alpha: of the adapters.
      rank: of the adapters.
    """

    learning_rate: float
    lr_ratio: float
    alpha: float
    rank: int

    @property
    def arm(self) -> Arm:
        """What it is a setting of: with lr_ratio 1, of plain LoRA."""
        return "lora" if self.lr_ratio == 1.0 else "lora_plus"

    @property
    def control(self) -> "Trial":
        """Plain LoRA with alpha times lambda: by theory the same under Adam without decay and clipping."""
        return self._replace(lr_ratio=1.0, alpha=self.alpha * self.lr_ratio)

    def __str__(self) -> str:
        ratio = "" if self.lr_ratio == 1.0 else f", lambda {self.lr_ratio:g}"
        return f"eta_A {self.learning_rate:g}{ratio}, alpha {self.alpha:g}, rank {self.rank}"


@dataclass(frozen=True, kw_only=True, config=SECTION)
class SweepRun(Settings):
    """A sweep: a whole run, and which of its settings are varied.

    Attributes:
      sweep: which settings are tried, and how they are compared.
    """

    sweep: SweepSettings = SweepSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "lora_plus":
            raise ValueError(f"a sweep compares LoRA+ with LoRA: method must be lora_plus, got {self.method}")
        if self.init_adapter is not None:
            raise ValueError("a sweep gives every setting first values of its own: leave init_adapter out")
        if (self.mesh.fsdp, self.mesh.tensor) != (1, 1) or self.distributed.coordinator is not None:
            raise ValueError(
                "a sweep gives each device whole members, in one process: mesh.fsdp and mesh.tensor must be 1, and "
                "distributed.coordinator not given"
            )
        if max(self.seeds) + self.sweep.report_seeds >= 2**32:
            raise ValueError(f"the seeds of the report follow {max(self.seeds)} and must be below 2**32")
        self._check_patterns()
        _check_size(self)
        for trial in self.trials:
            self.settings_of(trial, self.seed)
            if self.sweep.control:
                self.settings_of(trial.control, self.seed)

    def _check_patterns(self) -> None:
        """What a list varies must not be fixed for some modules by a pattern."""
        for tried, pattern in (("alphas", "alpha_pattern"), ("ranks", "rank_pattern")):
            if getattr(self.sweep, tried) is not None and (fixed := getattr(self.lora, pattern)):
                raise ValueError(
                    f"sweep.{tried} would not reach the modules of lora.{pattern}, which is {dict(fixed)}: give "
                    "one of the two"
                )

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the search."""
        return (self.seed,) if self.sweep.seeds is None else self.sweep.seeds

    @property
    def report_seeds(self) -> tuple[int, ...]:
        """Those of the report, none of which the search has."""
        first = max(self.seeds) + 1
        return tuple(range(first, first + self.sweep.report_seeds))

    @property
    def arms(self) -> tuple[Arm, ...]:
        """What the report compares."""
        return ("lora", "lora_plus", "control") if self.sweep.control else METHODS

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks tried."""
        return self.sweep.ranks or (self.lora.rank,)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every setting of the search, those of plain LoRA first."""
        return _sample_trials(self) if self.sweep.samples is not None else _grid_trials(self)

    @property
    def shared_optimizer(self) -> OptimizerSettings:
        """What of the optimizer all members share.

        An encoder's new head learns at the recipe's own rate whatever eta_A is tried: at eta_A, which is larger for
        LoRA than for LoRA+ of the same eta_B, the head's rate would be compared along with the method.
        """
        if self.is_language or self.optimizer.head_learning_rate is not None:
            return self.optimizer
        return dataclasses.replace(self.optimizer, head_learning_rate=self.optimizer.learning_rate)

    def settings_of(self, trial: Trial, seed: int, output_dir: str | None = None) -> Settings:
        """The single run that a trial with a seed equals.

        The alphas of patterns grow as the trial's does: a control has lambda times the scale of every module.
        """
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


def _check_size(run: SweepRun) -> None:
    """Counted before any setting is made: the lists' product may be of any size."""
    sweep = run.sweep
    if sweep.samples is not None:
        count = 2 * sweep.samples
    else:
        pairs = len(sweep.learning_rates or RATE_MULTIPLES) * len(sweep.lr_ratios)
        lora = len(sweep.lora_learning_rates or ()) or pairs
        count = (pairs + lora) * len(sweep.alphas or (run.lora.alpha,)) * len(run.ranks)
    if (members := count * len(run.seeds)) > MOST_MEMBERS:
        raise ValueError(
            f"a sweep trains at most {MOST_MEMBERS:,} runs side by side, and {count:,} settings on "
            f"{len(run.seeds):,} of sweep.seeds are {members:,}: give shorter lists, or sweep.samples"
        )


def _rates(run: SweepRun) -> tuple[float, ...]:
    """eta_A of LoRA+; the recipe's own rate to all its digits."""
    base_rate = run.optimizer.learning_rate
    return run.sweep.learning_rates or tuple(
        base_rate if f == 1.0 else _short(f * base_rate) for f in RATE_MULTIPLES
    )


def _lora_rates(run: SweepRun) -> tuple[float, ...]:
    """The rates of plain LoRA; those that are not given may be equal to three digits."""
    if run.sweep.lora_learning_rates:
        return run.sweep.lora_learning_rates
    rates, ratios = _rates(run), run.sweep.lr_ratios
    low, high = min(rates) * min(1.0, *ratios), max(rates) * max(1.0, *ratios)
    return tuple(map(_short, np.geomspace(low, high, len(rates) * len(ratios))))


def _grid_trials(run: SweepRun) -> tuple[Trial, ...]:
    lora_rates = _lora_rates(run)
    if (distinct := len(set(lora_rates))) < len(lora_rates):
        raise ValueError(
            f"sweep.lora_learning_rates is not given, and of {len(lora_rates)} rates from {lora_rates[0]:g} to "
            f"{lora_rates[-1]:g}, as many as LoRA+ has settings, only {distinct} differ in three digits: give it, "
            "or sweep.learning_rates and lr_ratios that are further apart"
        )
    shared = list(itertools.product(run.sweep.alphas or (run.lora.alpha,), run.ranks))
    pairs = [
        *((rate, 1.0) for rate in lora_rates),
        *itertools.product(_rates(run), run.sweep.lr_ratios),
    ]
    return tuple(Trial(*pair, *rest) for pair in pairs for rest in shared)


def _sample_trials(run: SweepRun) -> tuple[Trial, ...]:
    """Settings drawn by the run's seed, as many different ones of each arm."""
    rng, count = np.random.default_rng(run.seed), run.sweep.samples or 0
    alphas = run.sweep.alphas or (run.lora.alpha,)

    def between(values: tuple[float, ...]) -> float:
        """To three digits, and not beyond the ends."""
        low, high = min(values), max(values)
        return min(max(_short(np.exp(rng.uniform(np.log(low), np.log(high)))), low), high)

    def different(arm: Arm, rates: tuple[float, ...], ratios: tuple[float, ...]) -> list[Trial]:
        trials: dict[Trial, None] = {}
        for _ in range(MAX_DRAWS_PER_SAMPLE * count):
            alpha_and_rank = alphas[rng.integers(len(alphas))], run.ranks[rng.integers(len(run.ranks))]
            trial = Trial(between(rates), between(ratios), *alpha_and_rank)
            if trial.arm == arm:  # a lambda that rounds to 1 is plain LoRA's
                trials[trial] = None
            if len(trials) == count:
                return list(trials)
        raise ValueError(
            f"sweep.samples is {count}, and {MAX_DRAWS_PER_SAMPLE * count:,} draws found only {len(trials)} "
            f"settings of {ARM_LABELS[arm]} that differ in three digits: give fewer samples, or lists whose ends "
            "are further apart"
        )

    return (
        *different("lora", _lora_rates(run), (1.0,)),
        *different("lora_plus", _rates(run), run.sweep.lr_ratios),
    )
