"""`sweep.methods`: tunes each method on equally many settings and compares all with plain LoRA on new seeds.

Every method is a search and a report of its own, one program each, in a directory of its own; a finished one is
read back when the comparison resumes.
"""

import contextlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from pydantic.dataclasses import dataclass

from .._utils.atomic import write_text
from .._utils.records import read_record, write_record
from .._utils.validation import expand_path
from ..adapter.tree import combine, count
from ..data.fetch import resolve
from ..models.checkpoints.hf import load_params
from ..optim.trained_ranks import alpha_for
from ..settings.field_types import SECTION
from ..settings.parsing import settings_from_json
from ..settings.schema import OptimizerSettings, Settings
from ..step.checkpoint import PACKAGES
from ..step.fingerprints import fingerprint
from ..tasks.causal_lm import LanguageTask
from ..tasks.held_out_generation import HeldOutTexts
from ..training.anomalies import TrainingFailed
from ..training.console import LineConsole, ignored_lines, lines_only
from ..training.metrics_log import SUMMARY
from ..training.provenance import check_identity, model_identity
from ..training.run_directory import open_output_directory
from ..training.run_files import read_summary, saved_steps
from ..training.setup import params_of
from .method_comparison_report import PICTURES, compare, draw
from .population import Population, abstract_population, add_scales
from .report import PAGE, REPORT, render_page, write_report
from .run import Sweep, sweep
from .settings import Arm, SweepRun, Trial, grid_rates

TIMED_STEPS = 5
"""Steps that are timed once a method has finished; the median counts."""


class Method(NamedTuple):
    """A method of the comparison.

    Attributes:
      label: display name.
      changes: settings that differ from plain LoRA's, by dotted name, or a function that makes them of a sweep's.
      rate: its default learning rates, as a multiple of plain LoRA's.
    """

    label: str
    changes: Mapping[str, Any] | Callable[[SweepRun], Mapping[str, Any]] = MappingProxyType({})
    rate: float = 1.0


def _adalora(run: SweepRun) -> dict[str, Any]:
    # Ends with the rank of the others, on average, from 1.5 times as much and at the same scale.
    rank = math.ceil(1.5 * run.lora.rank)
    alpha = alpha_for(run.lora.scale, rank, run.lora)
    last = {"train.select": "last", "train.early_stopping": None}
    return {"lora.rank": rank, "lora.alpha": alpha, "optimizer.target_rank": run.lora.rank} | last


TABLE: dict[str, Method] = {
    "lora": Method("LoRA"),
    "lora_plus": Method("LoRA+"),
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


def sweep_or_compare(
    run: SweepRun,
    *,
    fresh: bool = False,
    allow_different: Sequence[str] = (),
    console: LineConsole | None = None,
) -> dict[str, Any]:
    """Runs `sweep`, or with `sweep.methods` `compare_methods`."""
    command = sweep if run.sweep.methods is None else compare_methods
    return command(run, fresh=fresh, allow_different=allow_different, console=console)


def compare_methods(
    run: SweepRun,
    *,
    fresh: bool = False,
    allow_different: Sequence[str] = (),
    console: LineConsole | None = None,
) -> dict[str, Any]:
    """Tunes and compares `sweep.methods`, writes the results to `run.output_dir`, and resumes what is there.

    Args, errors: as for `sweep`; a method of which every setting diverges is reported as such.

    Returns:
      The content of `report.json`.
    """
    names = tuple(dict.fromkeys(("lora", *(run.sweep.methods or ()))))
    runs = {name: method_run(run, name) for name in names}
    labels = {name: TABLE[name].label for name in names}
    return compare_runs(run, runs, labels, fresh=fresh, allow_different=allow_different, console=console)


def compare_runs(
    run: SweepRun,
    runs: "Mapping[str, MethodRun]",
    labels: Mapping[str, str],
    *,
    fresh: bool = False,
    allow_different: Sequence[str] = (),
    console: LineConsole | None = None,
) -> dict[str, Any]:
    """Compares searches of any settings with that of the name `"lora"`, otherwise as `compare_methods`.

    Args:
      run: settings that all share, and the directory of the results.
      runs: the search and report of each name, in a directory of its own.
      labels: display name of each.
    """
    console, parts = lines_only(console), [_place(one) for one in runs.values()]
    with open_output_directory(
        run, console, fresh=fresh, allow_different=allow_different, parts=parts
    ) as output:
        directory = output.path
        finished = [] if fresh else [one for one in runs.values() if read_summary(_place(one))]
        base, data, _, _, shapes = abstract_population(runs["lora"])
        # Every method is checked before the first is trained, on data that is loaded once.
        for name, one in runs.items():
            with _named(name):
                abstract_population(one, data)
        if finished:  # what is not trained again must come from the base and the data that are there
            identity = model_identity(run, base, data.task) | {"data": data.digests}
            params = load_params(base, shapes.base.table, params_of(shapes), new=shapes.base.new)
            weights = fingerprint(params)
            for one in finished:
                path = _place(one) / REPORT
                check_identity(path, read_record(path), identity, weights=weights, allow=allow_different)
        began = time.perf_counter()
        output.claim()
        results = {}
        for name, one in runs.items():
            console.print(f"{labels[name]}: {len(one.trials)} settings")
            # An accepted difference without effect is an error, and only a checkpoint can differ.
            allow = allow_different if saved_steps(_place(one)) else ()
            with _named(name):
                results[name] = _result(one, allow, console)
            # Files may change under a comparison of hours.
            path, first = _place(one) / REPORT, results["lora"]
            identity, weights = dict(first["identity"]), first["base"]
            check_identity(path, results[name], identity, weights=weights, allow=allow_different)
        output.check()
        report = compare(run, labels, results)
        report["protocol"]["test_rows"] = data.examples["test"]
        draw(directory, report)
        write_report(directory, report)
        write_text(directory / PAGE, render_page(directory, report, "methods.html", PICTURES))
        summary = {"verdict": report["verdict"], "seconds": round(time.perf_counter() - began, 1)}
        summary["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        summary["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
        write_record(directory / SUMMARY, summary)
    console.print(report["verdict"], f"{directory}: {PAGE}, {REPORT}, {SUMMARY}", sep="\n")
    return report


def _result(run: "MethodRun", allow_different: Sequence[str], console: LineConsole) -> dict[str, Any]:
    """The rows, the chosen setting and the costs of a method, read back if it has finished."""
    if read_summary(_place(run)) is None:
        with contextlib.suppress(TrainingFailed):  # which the report says
            return sweep(run, allow_different=allow_different, console=console, kind=MethodSweep)
    return read_record(_place(run) / REPORT)


def _place(run: "MethodRun") -> Path:
    return expand_path("output_dir", run.output_dir)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Says in an error of which method it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"sweep.methods {name}: {error}") from None


@dataclass(frozen=True, kw_only=True, config=SECTION)
class MethodRun(SweepRun):
    """The search and report of one method.

    Attributes:
      name: the method, one of `TABLE`.
    """

    name: str

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        self._check_one_process()
        _ = self.trials

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The one arm."""
        return ("lora_plus",) if self.name == "lora_plus" else ("lora",)

    @property
    def shared_optimizer(self) -> OptimizerSettings:
        """As for a sweep; full fine-tuning has one rate for all weights, the head too."""
        return self.optimizer if self.name == "full" else super().shared_optimizer

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The settings to try: as many for every method."""
        rest = self.lora.alpha, self.lora.rank
        pairs, even = grid_rates(self)
        if self.name == "lora_plus":
            return tuple(Trial(*pair, *rest) for pair in pairs)
        rates = self.sweep.method_learning_rates.get(self.name)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if rates is None:
            rates = tuple(float(f"{TABLE[self.name].rate * rate:.3g}") for rate in even)
            if len(rates) != len(pairs):
                raise ValueError(
                    f"sweep.learning_rates and sweep.lr_ratios give {self.name} only {len(rates)} rates that "
                    f"differ in three digits; set sweep.method_learning_rates of {self.name} to {len(pairs)} rates"
                )
        if len(rates) != len(pairs):
            raise ValueError(
                f"sweep.method_learning_rates of {self.name} must be {len(pairs)} rates, as many as LoRA+ has "
                f"settings, got {len(rates)}"
            )
        return tuple(Trial(rate, 1.0, *rest) for rate in rates)


def method_run(run: SweepRun, name: str) -> MethodRun:
    """The search and report of a method, from the settings of the comparison.

    Raises:
      ValueError: the method and the settings contradict each other; the message names the method.
    """
    # Through JSON, so that the changed settings are checked as those of a file are.
    values = run.to_json()
    values["output_dir"] = str(Path(run.output_dir) / name)
    values["sweep"]["control"] = False
    changes = TABLE[name].changes
    with _named(name):
        for dotted, value in (changes(run) if callable(changes) else changes).items():
            section, _, field = dotted.rpartition(".")
            owner = values[section] if section else values
            if value is None:  # back to the default: it has no effect with this method
                del owner[field]
            else:
                owner[field] = value
        if name != "lora_plus":
            values["lora"]["lr_ratio"] = 1.0
        return settings_from_json({**values, "name": name}, MethodRun)


class MethodSweep(Sweep):
    """The search and report of one method; its report holds the rows for the comparison, and what a step costs."""

    run: MethodRun

    def start(self) -> None:
        """Begins or resumes, under the method's name."""
        self.labels = dict.fromkeys(self.run.arms, TABLE[self.run.name].label)
        super().start()

    def report(self) -> dict[str, Any]:
        """The rows so far and the chosen setting."""
        return {
            "rows": self.rows,
            "chosen": {arm: trial._asdict() for arm, trial in self.chosen.items()},
            "steps": self.population.steps,
            "metric": self.population.data.task.metric,
            "mode": self.population.data.task.mode,
            "constant": dict(self.population.data.constant),
            **self.source(),
        }

    def fail(self, diverged: Sequence[str]) -> None:
        """Writes what there is and ends the method."""
        write_report(self.directory, self.report() | {"diverged": True})
        self.write_end()
        raise TrainingFailed(f"every setting diverged by step {self.step}")

    def finish(self) -> dict[str, Any]:
        """Writes the rows, the costs and, last, the summary."""
        report = self.report() | {"text_scores": self.score_texts()}
        # Last, as the timed steps train the members on.
        report |= {"cost": cost(self.population, self.slots, self.next_batches())}
        self.output.check()
        write_report(self.directory, report)
        self.write_end()
        return report

    def score_texts(self) -> list[dict[str, Any]]:
        """The seed and the scores of the texts of each run of the report (task generation); else empty."""
        run, parts, data = self.run, self.population.parts, self.population.data
        if not isinstance(data.task, LanguageTask) or data.task.kind != "generation":
            return []
        directory = resolve(run.model.path, "model")
        texts = HeldOutTexts.from_settings(run, directory, data.task, parts.model, data.inputs)
        rows, members = [], self.slots.to_host()
        for slot, number in enumerate(self.slots.slots):
            member = jax.tree.map(lambda leaf, slot=slot: leaf[slot], members)
            if number >= 0 and member.alive:
                frozen = add_scales(parts.frozen, parts.specs, member)
                _, scores = texts.generate(combine(member.state.trainable, frozen))
                rows.append({"seed": self.entries[number].seed, **scores})
        return rows

    def write_end(self) -> None:
        """Marks the method as finished."""
        write_record(self.directory / SUMMARY, {"method": self.run.name})

    def print_head(self) -> None:
        """Prints which settings the method ignores, and where it resumes."""
        for line in ignored_lines(self.run, self.population.parts):
            self.console.print(line)
        if self.clock:
            self.console.print(f"resuming from step {self.step} of the {self.stage}")


def cost(population: Population, slots: Any, batches: Mapping[int, Any]) -> dict[str, Any]:
    """Trainable parameters, and seconds of a member's step (median)."""
    members = len(slots.member_ids)
    seconds = []
    for _ in range(TIMED_STEPS):
        began = time.perf_counter()
        slots.step(batches)
        jax.block_until_ready(slots.chunks)
        seconds.append((time.perf_counter() - began) / members)
    return {"trainable": count(population.parts.trainable), "step_seconds": float(np.median(seconds))}
