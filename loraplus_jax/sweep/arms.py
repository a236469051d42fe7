"""The arms of a sweep: what it tunes on equal budgets and compares, and which of them share a compiled program.

A sweep of lambda has LoRA, LoRA+ and a control. With `sweep.methods` it has plain LoRA and those of `TABLE`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from .._utils.field_types import SECTION
from ..optim.trained_ranks import alpha_for
from ..settings.parsing import settings_from_json
from ..settings.schema import Settings
from .settings import SweepRun, check_widen, grid_rates
from .trial import ARM_LABELS, Trial


class Arm(NamedTuple):
    """What is tuned and compared.

    Attributes:
      name: its name in results.
      label: display name.
      trials: the settings to try; none for the control, whose setting follows from that of LoRA+.
    """

    name: str
    label: str
    trials: tuple[Trial, ...]


class SharedProgram(NamedTuple):
    """Arms that differ in rates, lambda, scale and rank alone: they share a compiled program and a base.

    Attributes:
      run: the settings of the program.
      arms: the arms.
    """

    run: SweepRun
    arms: tuple[Arm, ...]


class Method(NamedTuple):
    """A method to compare with plain LoRA.

    Attributes:
      label: display name.
      changes: settings that differ from plain LoRA's, by dotted name, or a function that makes them of a sweep's.
        A method without any shares LoRA's program.
      rate: its default learning rates, as a multiple of plain LoRA's.
    """

    label: str
    changes: Mapping[str, Any] | Callable[[SweepRun], Mapping[str, Any]] = MappingProxyType({})
    rate: float = 1.0


def _adalora(run: SweepRun) -> dict[str, Any]:
    # Ends with the rank of the others, on average, from 1.5 times as much and at the same scale.
    for name in ("rank_pattern", "alpha_pattern"):
        if value := getattr(run.lora, name):
            raise ValueError(
                f"lora.{name} must be empty, as this method starts with another rank; got {dict(value)}"
            )
    rank = math.ceil(1.5 * run.lora.rank)
    alpha = alpha_for(run.lora.scale, rank, run.lora)
    last = {"train.select": "last", "train.early_stopping": None}
    return {"lora.rank": rank, "lora.alpha": alpha, "optimizer.target_rank": run.lora.rank} | last


TABLE: dict[str, Method] = {
    "lora": Method(ARM_LABELS["lora"]),
    "lora_plus": Method(ARM_LABELS["lora_plus"]),
    "lora_b": Method("LoRA, A = 0", {"lora.init": "lora_b"}),
    "rslora": Method("rsLoRA", {"lora.use_rslora": True}),
    "dora": Method("DoRA", {"lora.variant": "dora"}),
    "adalora": Method("AdaLoRA", _adalora),
    "orthogonal": Method("LoRA, orthogonal", {"lora.init": "orthogonal"}),
    "pissa": Method("PiSSA", {"lora.init": "pissa"}, 0.1),
    "olora": Method("OLoRA", {"lora.init": "olora"}, 0.1),
    "riemannian": Method("Riemannian", {"optimizer.name": "riemannian"}),
    "lora_rite": Method("LoRA-RITE", {"optimizer.name": "lora_rite"}),
    "lora_muon": Method(
        "LoRA-Muon", {"optimizer.name": "lora_muon", "optimizer.b2": None, "optimizer.eps": None}
    ),
    "full": Method("full", {"method": "full", "optimizer.name": None}, 0.1),
}


def programs_of(run: SweepRun) -> list[SharedProgram]:
    """The arms of a sweep, by the program that they share.

    Raises:
      ValueError: a method and the settings contradict each other; the message names the method.
    """
    if run.sweep.methods is None:
        # The control has none: a trial without a ratio is plain LoRA's.
        trials = {name: tuple(trial for trial in run.trials if trial.arm == name) for name in run.arms}
        arms = (Arm(name, ARM_LABELS[name], trials[name]) for name in run.arms)
        return [SharedProgram(run, tuple(arms))]
    names = dict.fromkeys(("lora", *run.sweep.methods))
    plain = [name for name in names if not TABLE[name].changes]
    programs = []
    for shared in (plain, *([name] for name in names if name not in plain)):
        with named(shared):
            own = method_run(run, shared[0]) if shared != plain else run
            programs.append(SharedProgram(own, tuple(method_arm(own, name) for name in shared)))
    return programs


@contextlib.contextmanager
def named(names: Sequence[str]) -> Iterator[None]:
    """Says in an error of which methods it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"sweep.methods {', '.join(names)}: {error}") from None


@dataclass(frozen=True, kw_only=True, config=SECTION)
class MethodRun(SweepRun):
    """A sweep's settings with those of one method, some of which a sweep of lambda does not take."""

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        self._check_one_process()


def method_run(run: SweepRun, name: str) -> MethodRun:
    """A sweep's settings with those of a method."""
    # Through JSON, so that the changed settings are checked as those of a file are.
    values, changes = run.to_json(), TABLE[name].changes
    for dotted, value in (changes(run) if callable(changes) else changes).items():
        section, _, field = dotted.rpartition(".")
        owner = values[section] if section else values
        if value is None:  # back to the default: it has no effect with this method
            del owner[field]
        else:
            owner[field] = value
    values["lora"]["lr_ratio"] = 1.0
    return settings_from_json(values, MethodRun)


def method_arm(run: SweepRun, name: str) -> Arm:
    """A method with its settings to try, as many for every method."""
    rest = run.lora.alpha, run.lora.rank
    pairs, even = grid_rates(run)
    if name == "lora_plus":
        trials = tuple(Trial(*pair, *rest) for pair in pairs)
    else:
        rates = run.sweep.method_learning_rates.get(name)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if rates is None:
            rates = tuple(float(f"{TABLE[name].rate * rate:.3g}") for rate in even)
            if len(rates) != len(pairs):
                raise ValueError(
                    f"sweep.learning_rates and sweep.lr_ratios give {name} only {len(rates)} rates that "
                    f"differ in three digits; set sweep.method_learning_rates of {name} to {len(pairs)} rates"
                )
        if len(rates) != len(pairs):
            raise ValueError(
                f"sweep.method_learning_rates of {name} must be {len(pairs)} rates, as many as LoRA+ has "
                f"settings, got {len(rates)}"
            )
        trials = tuple(Trial(rate, 1.0, *rest) for rate in rates)
    check_widen(run.sweep, TABLE[name].label, trials)
    return Arm(name, TABLE[name].label, trials)
