"""What `convergence.py` runs: the two tasks, the methods, what each may be tuned over, and which seeds."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.settings.schema import Settings

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 60
TUNING_SEEDS = (100, 101)
REPORT_SEEDS = tuple(range(8))
CONTROL = "lora, alpha x lambda"

_COMMON = (
    *("--optimizer.schedule", "linear", "--optimizer.warmup_steps", "6", "--optimizer.max_grad_norm", "null"),
    *("--train.steps", str(STEPS), "--train.prompt", "null"),
)


class Point(NamedTuple):
    """One setting of a method: eta_A, lambda, and alpha over the task's own."""

    rate: float
    ratio: float = 1.0
    alpha: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    Attributes:
      init: of the factors; None trains every weight.
      points: what it is tuned over: as many for every method. The control has none of its own.
      rival: the tuned method that it is compared with, seed by seed.
    """

    init: str | None
    points: tuple[Point, ...]
    rival: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A task with its methods.

    Attributes:
      settings: of every run, but for method, init, rates, alpha and seed.
      head_rate: of the new head under the adapter methods, the same for all; None where there is no head.
      stride: every how many-th row of the validation split the tuning uses. Not the first rows: they come in
        the file's order, which may be by label.
      metrics: of the test split, those that the table shows.
    """

    settings: Settings
    head_rate: float | None
    stride: int
    metrics: tuple[str, ...]
    methods: Mapping[str, Method]


class Job(NamedTuple):
    """One run: its phase (tune or report), method, point and seed."""

    phase: str
    method: str
    point: Point
    seed: int


def methods(slowest: float, full: float) -> dict[str, Method]:
    """Six points each: rates twice apart for LoRA and for full, three rates and two ratios for LoRA+."""
    alone = tuple(Point(slowest * 2.0**n) for n in range(6))
    pairs = tuple(Point(slowest * 4.0**n, ratio) for n in range(3) for ratio in (4.0, 16.0))
    return {
        "lora": Method(init="he_uniform", points=alone, rival=None),
        "lora+": Method(init="he_uniform", points=pairs, rival="lora"),
        CONTROL: Method(init="he_uniform", points=(), rival="lora"),
        "lora, init lora_b": Method(init="lora_b", points=alone, rival="lora"),
        "lora+, init lora_b": Method(init="lora_b", points=pairs, rival="lora, init lora_b"),
        "full": Method(init=None, points=tuple(Point(full * 2.0**n) for n in range(6)), rival="lora"),
    }


def experiment(name: str) -> Experiment:
    """`"sentences"`: MiniLM on film reviews; `"language"`: SmolLM2-135M on instructions."""
    if name == "sentences":
        own = ("--data.max_length", "32", "--train.batch_size", "16", "--train.eval_batch_size", "128")
        return Experiment(
            settings=parse_settings(CONFIGS / "quickstart.yaml", (*_COMMON, *own)),
            head_rate=5e-4,
            stride=2,
            metrics=("loss", "accuracy"),
            methods=methods(2.5e-4, 2.5e-5),
        )
    own = ("--train.batch_size", "1", "--train.eval_batch_size", "4")
    return Experiment(
        settings=parse_settings(CONFIGS / "smollm2_chat.yaml", (*_COMMON, *own)),
        head_rate=None,
        stride=1,
        metrics=("loss",),
        methods=methods(1e-4, 1e-5),
    )


def tuning(plan: Experiment, names: Iterable[str]) -> Iterator[Job]:
    """All tuning runs of some methods, seed by seed, so that an early end leaves whole seeds."""
    names = list(names)
    for seed in TUNING_SEEDS:
        for n in range(6):
            for name in names:
                if points := plan.methods[name].points:
                    yield Job("tune", name, points[n], seed)


def reports(plan: Experiment, names: Iterable[str], rows: list[dict[str, Any]]) -> Iterator[Job]:
    """The report runs of methods whose tuning is complete in the rows."""
    chosen = {name: point for name in names if (point := choose(plan, name, rows)) is not None}
    for seed in REPORT_SEEDS:
        for name, point in chosen.items():
            yield Job("report", name, point, seed)


def choose(plan: Experiment, name: str, rows: list[dict[str, Any]]) -> Point | None:
    """The point of the lowest mean validation loss; None as long as a tuning run is missing.

    The control has LoRA+'s rate, and its lambda as a factor on alpha.
    """
    if name == CONTROL:
        best = choose(plan, "lora+", rows)
        return best and Point(best.rate, 1.0, best.ratio)
    losses = {(point_of(row), row["seed"]): row["loss"] for row in rows if is_tuning(row, name)}
    points = plan.methods[name].points
    if any((point, seed) not in losses for point in points for seed in TUNING_SEEDS):
        return None
    # A run that diverged has no loss, and its point is out.
    means = {p: [losses[p, seed] for seed in TUNING_SEEDS] for p in points}
    finite = {p: sum(values) for p, values in means.items() if None not in values}
    return min(finite, key=lambda p: finite[p]) if finite else None


def is_tuning(row: Mapping[str, Any], name: str) -> bool:
    return row["phase"] == "tune" and row["method"] == name


def point_of(row: Mapping[str, Any]) -> Point:
    return Point(row["rate"], row["ratio"], row["alpha"])
