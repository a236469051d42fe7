"""`sweep.methods`: tunes each method on equally many settings and compares all with plain LoRA on new seeds.

Every method is a search and a report of its own, one program each, in a directory of its own; a finished one is
read back when the comparison resumes.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from .._utils.atomic import write_text
from .._utils.json_files import MAX_ROWS_BYTES
from .._utils.records import read_record, write_record
from .._utils.validation import expand_path
from ..optim.trained_ranks import alpha_for
from ..settings.field_types import SECTION
from ..settings.parsing import settings_from_json
from ..settings.schema import OptimizerSettings, Settings
from ..step.run_metadata import package_versions
from ..training.anomalies import TrainingFailed
from ..training.console import LineConsole, ignored_lines, lines_only
from ..training.metrics_log import SUMMARY
from ..training.run_directory import OutputDirectory, open_output_directory
from ..training.run_files import read_summary
from .executor import Executor
from .method_comparison_report import PICTURES, compare, draw
from .population import abstract_population, origin_of
from .report import PAGE, REPORT, WINNER, render_page, write_report
from .run import Sweep, open_executor, sweep
from .settings import Arm, SweepRun, Trial, grid_rates


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
    with (
        open_executor(run, console) as executor,
        open_output_directory(
            run, console, fresh=fresh, allow_different=allow_different, parts=parts
        ) as output,
        contextlib.ExitStack() as stack,
    ):
        directory = output.path
        finished = {name for name, one in runs.items() if not fresh and read_summary(_place(one))}
        lora = abstract_population(runs["lora"])
        # Every method is checked before the first is trained, on data that is loaded once.
        for name, one in runs.items():
            with _named(name):
                abstract_population(one, lora.data)
        if (text := lora.data.unrelated) is not None and text.truncated:
            console.print(
                f"sweep.unrelated_text: {text.truncated:,} of {text.examples:,} texts truncated to "
                f"data.max_length {run.data.max_length} tokens"
            )
        began = time.perf_counter()
        output.claim()
        # Also the data alone, as of methods that have all finished no weights are read.
        output.check_origin(origin_of(lora, None))
        sweeps = {}
        for name, one in runs.items():
            if name not in finished:
                with _named(name):
                    part = stack.enter_context(open_output_directory(one, console))
                sweeps[name] = MethodSweep(one, part, output, executor, labels[name])
        executor.finish(list(sweeps.values()))
        # Read back, as those that had finished are.
        results = {
            name: read_record(_place(one) / REPORT, limit=MAX_ROWS_BYTES) for name, one in runs.items()
        }
        output.check()
        report = compare(run, labels, results)
        report["protocol"]["test_rows"] = lora.data.examples["test"]
        draw(directory, report)
        write_report(directory, report)
        write_text(directory / PAGE, render_page(directory, report, "methods.html", PICTURES))
        devices = sorted({text for sweep in sweeps.values() for text in sweep.devices})
        summary = {"verdict": report["verdict"], "seconds": round(time.perf_counter() - began, 1)}
        summary["devices"] = ", ".join(devices)
        summary["versions"] = package_versions()
        write_record(directory / SUMMARY, summary)
    configs = [f"{name}/{WINNER}" for name, one in runs.items() if (_place(one) / WINNER).exists()]
    console.print(report["verdict"], f"{directory}: {', '.join((PAGE, REPORT, SUMMARY, *configs))}", sep="\n")
    return report


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
        self._check_widen()

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
    is_scored = True

    def __init__(
        self, run: MethodRun, output: OutputDirectory, home: OutputDirectory, executor: Executor, label: str
    ) -> None:
        super().__init__(run, output, home, executor)
        self.label, self.labels = label, dict.fromkeys(map(str, run.arms), label)
        self.title = f"{label}: " if executor.is_concurrent else ""

    async def train(self) -> dict[str, Any]:
        """As for a sweep; a method of which every setting diverges is reported as such."""
        with _named(self.run.name):
            try:
                return await super().train()
            except TrainingFailed:
                return read_record(self.directory / REPORT, limit=MAX_ROWS_BYTES)

    def report(self) -> dict[str, Any]:
        """The rows so far and the chosen setting."""
        return {
            "rows": self.rows,
            "chosen": {arm: trial._asdict() for arm, trial in self.chosen.items()},
            "steps": self.steps,
            "metric": self.abstract.data.task.metric,
            "mode": self.abstract.data.task.mode,
            "constant": dict(self.abstract.data.constant),
        }

    def fail(self, step: int, diverged: Sequence[str]) -> None:
        """Writes what there is and ends the method."""
        write_report(self.directory, self.report() | {"diverged": True})
        self.write_end()
        raise TrainingFailed(f"every setting diverged by step {step}")

    def finish(self) -> dict[str, Any]:
        """Writes the rows, the costs, the config of the chosen setting and, last, the summary."""
        scores = [score for result in self.results for score in result["text_scores"]]
        unrelated = [losses for result in self.results for losses in result["unrelated"]]
        report = self.report() | {
            "text_scores": scores,
            "unrelated": unrelated,
            "cost": self.results[0]["cost"],
        }
        self.output.check()
        write_report(self.directory, report)
        (best,) = self.chosen.values()
        self.write_winner(best)
        self.write_end()
        return report

    def write_end(self) -> None:
        """Marks the method as finished."""
        write_record(self.directory / SUMMARY, {"method": self.run.name})

    def print_head(self) -> None:
        """Prints the method, and which settings it ignores."""
        self.console.print(f"{self.label}: {len(self.run.trials)} settings")
        for line in ignored_lines(self.run, self.abstract.shapes):
            self.console.print(line)
