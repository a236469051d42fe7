"""Does LoRA+ converge faster or further than LoRA, when both are tuned on equal budgets?

    python benchmarks/tables.py convergence

Every finished run appends a row to `results/convergence.jsonl`, and the same command trains the runs that are not
there yet. Each method gets six points and two tuning seeds, chooses by the mean loss on validation data, and
reports on test data with eight other seeds. Batches, head and first values of A or B depend on the seed alone, so
methods are compared seed by seed.

One process, the base loaded once, one compilation for each init: rates, ratio and scale are values.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from common import PACKAGES, RESULTS, version
from convergence_plan import (
    CONTROL,
    REPORT_SEEDS,
    STEPS,
    TUNING_SEEDS,
    Experiment,
    Job,
    Method,
    experiment,
    reports,
    tuning,
)
from convergence_table import summarize

from loraplus_jax import TrainState, init_state, lora_plus_adamw, make_eval, make_schedule
from loraplus_jax.adapter import combine, scale_variables
from loraplus_jax.data.batches import eval_batches, train_batches
from loraplus_jax.data.fetch import resolve
from loraplus_jax.settings.schema import DataSettings, ModelSettings, Settings
from loraplus_jax.step.train_step import make_step, weighted_means
from loraplus_jax.tasks.interface import AdaptedModel
from loraplus_jax.training.setup import build_model, load_model, task_module

ROWS = RESULTS / "convergence.jsonl"
METHODS = {"sentences": tuple(experiment("sentences").methods), "language": ("lora", "lora+", CONTROL)}
"""What is run of each task; the language task leaves out what would take longest."""


class Bench:
    """A task's data and base, and the compiled programs of each init."""

    def __init__(self, plan: Experiment) -> None:
        self.plan, settings = plan, plan.settings
        self.directory = resolve(settings.model.path, "model")
        self.data = task_module(settings).load_data(settings, self.directory)
        self.programs: dict[str | None, Programs] = {}
        self.base: dict[str, Any] | None = None

    def run(self, job: Job) -> dict[str, Any]:
        """One training run, and its evaluation on the split of its phase."""
        started = time.perf_counter()
        method = self.plan.methods[job.method]
        if method.init not in self.programs:
            self.programs[method.init] = Programs(self, method)
        programs = self.programs[method.init]
        curve, state, frozen = programs.train(job)
        seconds = time.perf_counter() - started
        split = {"tune": "validation", "report": "test"}[job.phase]
        result = programs.evaluate(state, frozen, split) if math.isfinite(curve[-1]) else {}
        finite = bool(result) and all(math.isfinite(v) for v in result.values())
        return {
            "phase": job.phase,
            "method": job.method,
            **job.point._asdict(),
            "seed": job.seed,
            "split": split,
            **{name: round(result[name], 6) if finite else None for name in self.plan.metrics},
            "curve": [round(loss, 4) if math.isfinite(loss) else None for loss in curve],
            "train_seconds": round(seconds, 1),
        }


class Programs:
    """Training and evaluation of one init, compiled once for all rates, ratios, scales and seeds."""

    def __init__(self, bench: Bench, method: Method) -> None:
        self.bench, self.plan = bench, bench.plan
        settings = _with_init(bench.plan.settings, method.init)
        parts = build_model(settings, bench.directory, bench.data.task, settings.applied)
        if bench.base is None:  # the same for every init but for its place in the two trees
            bench.base = combine(*load_model(settings, bench.directory, parts, settings.applied)[3:])[
                "params"
            ]
        self.parts: AdaptedModel = parts
        losses = task_module(settings).make_losses(settings, bench.data.task, parts)
        self.is_full = method.init is None
        self.step = jax.jit(self._step(losses.train, settings), donate_argnums=0)
        self.evaluator = make_eval(losses.evaluate)
        self.fresh = jax.jit(self._fresh)
        new = parts.base.new
        self.frozen = {} if self.is_full else {"params": _without(bench.base, new)}

    def train(self, job: Job) -> tuple[list[float], TrainState, dict[str, Any]]:
        """The loss of every step, the last state, and the frozen variables."""
        frozen = dict(self.frozen)
        if not self.is_full:
            config = self.plan.settings.lora
            frozen["lora_scale"] = scale_variables(self.parts.specs, config.scale * job.point.alpha)
        trainable = self.fresh(jax.random.key(job.seed))
        if self.is_full:
            old = _without(self.bench.base, self.parts.base.new)
            trainable = {"params": combine(old, trainable.get("params", {}))}
        state = init_state(trainable, _optimizer(self.plan, 1.0, 1.0), jax.random.key(job.seed))
        rows = self.bench.data.splits["train"]
        batches = train_batches(rows, batch_size=self.plan.settings.train.batch_size, seed=job.seed)
        curve = []
        for _ in range(STEPS):
            state, metrics = self.step(state, frozen, next(batches), job.point.rate, job.point.ratio)
            curve.append(metrics["loss"])
        return [float(loss) for loss in curve], state, frozen

    def evaluate(self, state: TrainState, frozen: dict[str, Any], split: str) -> dict[str, float]:
        """The means over a split; of the validation split over the rows that tuning uses."""
        rows = self.bench.data.splits[split]
        if split == "validation":
            rows = {name: column[:: self.plan.stride] for name, column in rows.items()}
        totals: Any = None
        for batch in eval_batches(rows, self.plan.settings.train.eval_batch_size):
            pairs = self.evaluator(state.trainable, frozen, batch)
            totals = pairs if totals is None else jax.tree.map(jnp.add, totals, pairs)
        return {name: float(value) for name, value in weighted_means(totals).items()}

    def _step(self, loss_fn: Any, settings: Settings) -> Any:
        def step(state: TrainState, frozen: Any, batch: Any, rate: Any, ratio: Any) -> Any:
            tx = _optimizer(self.plan, rate, ratio, self.parts.specs, self.is_full)
            return make_step(loss_fn, tx)(state, frozen, batch)

        return step

    def _fresh(self, key: jax.Array) -> dict[str, Any]:
        """First values of what no file holds: adapters, and a new head, whose key is not theirs."""
        new_key, lora_key = jax.random.split(key)
        zeros = [jnp.zeros(x.shape, x.dtype) for x in self.parts.base.inputs]
        head = self.parts.base.model.init(new_key, *zeros)["params"]
        made = {"params": {name: head[name] for name in self.parts.base.new}}
        if not self.is_full:
            made["lora"] = self.parts.model.init(lora_key, *zeros)["lora"]
        return {name: tree for name, tree in made.items() if tree}


def _optimizer(plan: Experiment, rate: Any, ratio: Any, specs: Any = None, is_full: bool = False) -> Any:
    """AdamW with a linear schedule, without decay and clipping; under full the head learns at the rate of all."""
    given = plan.settings.optimizer

    def schedule(peak: Any) -> Any:
        return make_schedule(given.schedule, peak, STEPS, warmup_steps=given.warmup_steps)

    head = plan.head_rate is not None and not is_full
    head_rate = schedule(plan.head_rate) if head else None
    return lora_plus_adamw(schedule(rate), ratio, head_learning_rate=head_rate, specs=specs)


def _with_init(settings: Settings, init: Any) -> Settings:
    if init is None:
        return dataclasses.replace(settings, method="full")
    return dataclasses.replace(settings, lora=dataclasses.replace(settings.lora, init=init))


def _without(params: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: tree for name, tree in params.items() if name not in names}


def digest(plan: Experiment, phase: str) -> str:
    """By which rows of other settings are told apart: of what is set, so that new defaults do no harm."""
    given = plan.settings
    bare = Settings(
        model=ModelSettings(path="-"),
        data=DataSettings(path="-"),
        output_dir=given.output_dir,
        task=given.task,
    )
    setup: list[Any] = [_unlike(given.to_json(), bare.to_json()), plan.head_rate, STEPS]
    text = json.dumps([*setup, plan.stride] if phase == "tune" else setup, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _unlike(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The fields whose values differ, sections within."""
    found = {n: _unlike(v, others[n]) if isinstance(v, Mapping) else v for n, v in values.items()}
    return {name: value for name, value in found.items() if value != others[name] and value != {}}


def read(task: str, plan: Experiment) -> list[dict[str, Any]]:
    """The finished runs of a task, as it is set up now."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    rows = [row for row in map(json.loads, lines) if row["task"] == task]
    return [row for row in rows if row["setup"] == digest(plan, row["phase"])]


def run_missing(task: str, minutes: float, wanted: Sequence[str]) -> None:
    """The runs that have no row yet, full last, which takes the longest."""
    plan, end = experiment(task), time.monotonic() + 60 * minutes
    make_bench = functools.cache(lambda: Bench(plan))  # which loads data and base
    versions = {name: version(name) for name in PACKAGES}
    chosen = [name for name in plan.methods if name in wanted]
    for names in ([name for name in chosen if name != "full"], [name for name in chosen if name == "full"]):
        for phase in (tuning, reports):
            jobs = phase(plan, names) if phase is tuning else phase(plan, names, read(task, plan))
            done = {
                (r["phase"], r["method"], r["rate"], r["ratio"], r["alpha"], r["seed"])
                for r in read(task, plan)
            }
            for job in jobs:
                if (job.phase, job.method, *job.point, job.seed) in done:
                    continue
                if time.monotonic() > end:
                    return
                row = {
                    "task": task,
                    "setup": digest(plan, job.phase),
                    **make_bench().run(job),
                    "versions": versions,
                }
                with ROWS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                shown = {
                    k: row[k] for k in ("phase", "method", "rate", "ratio", "seed", "loss", "train_seconds")
                }
                print(json.dumps(shown), flush=True)


def summary() -> dict[str, Any]:
    """The methods of every task, with the budget."""
    found = {}
    for task in METHODS:
        plan = experiment(task)
        settings, points = plan.settings, max(len(method.points) for method in plan.methods.values())
        found[task] = {
            "model": settings.model.path,
            "data": settings.data.path,
            "batch": [settings.train.batch_size, settings.data.max_length],
            "steps": STEPS,
            "points": points,
            "tuning_seeds": len(TUNING_SEEDS),
            "report_seeds": len(REPORT_SEEDS),
            "metrics": plan.metrics,
            "methods": summarize(plan, read(task, plan)),
        }
    return found
