"""The plan of a sweep: runs that a device holds, and times by those of a single run's plan, by hand."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.plan import sweep_plan
from loraplus_jax.plan.devices import Chip
from loraplus_jax.plan.plan import Work, count_evaluation, layers_of, replace_depth
from loraplus_jax.plan.programs import plan_step
from loraplus_jax.plan.sweep_plan import SHARED, format_sweep, plan_sweep, runs_held
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.step.sharding import make_mesh
from loraplus_jax.step.train_step import make_eval
from loraplus_jax.sweep.settings import SweepRun
from loraplus_jax.tasks.interface import full_batches
from loraplus_jax.training.setup import task_module

from ..messages import assert_mentions
from .tiny import LAYERS, RANK, config, fake, llama, parts_of

HALF_A_SECOND = Work(500.0, 0.0)
CHIP = Chip("chip", memory=100.0, flops=1000.0, memory_rate=1000.0, link_rate=1.0)
OPTIONS = (
    *("--sweep.learning_rates=[1e-4,2e-4]", "--sweep.lr_ratios=[2,4]", "--sweep.control=false"),
    *("--sweep.rungs=[0.25]", "--sweep.keep=0.5", "--sweep.report_seeds=2", "--train.steps=8"),
    "--optimizer.warmup_steps=0",
)


def run_plan(room=100, most=60, seconds=2.0):
    """A plan of 40 bytes of frozen weights."""
    names = {"room": room, "most": most, "device": "chip", "model": "m"}
    return types.SimpleNamespace(memory={SHARED: 40}, roofline={"compute": seconds}, **names)


@pytest.mark.parametrize(("room", "held"), [(100, 3), (99, 2), (59, 0), (20, 0)])
def test_the_frozen_weights_exist_once(room, held):
    assert runs_held(run_plan(room)) == held  # pyright: ignore


ROWS = {"train": 64, "validation": 20, "test": 9}  # at most 8 rows in an evaluation batch: 3 and 2 batches


def load(run, directory):
    """Data without content, and the steps of a full run."""
    data = task_module(run).placeholder_data(run)
    columns = data.splits["train"].items()
    splits = {name: {key: np.repeat(x + 1, rows, 0) for key, x in columns} for name, rows in ROWS.items()}
    return data._replace(splits=splits, examples=ROWS), run.train.steps


@pytest.fixture
def plan_of(tmp_path, monkeypatch):
    """Plans a sweep whose runs have the given plan, for a worker with two devices."""

    def plan(one, workers, *options, topology="chip:2", evaluation=HALF_A_SECOND):
        monkeypatch.setattr(sweep_plan, "plan_for", lambda settings, chip, devices: one)
        monkeypatch.setattr(sweep_plan, "load_sweep_data", load)
        monkeypatch.setattr(sweep_plan, "target_devices", lambda name: (CHIP, jax.devices()[:2]))
        monkeypatch.setattr(sweep_plan, "count_evaluation", lambda *_: evaluation)
        run = parse_settings(config(tmp_path), [*OPTIONS, *options], SweepRun)
        return plan_sweep(run, workers, topology), run

    return plan


@pytest.mark.slow
def test_the_time_by_hand(plan_of):
    # 8 settings to step 2, 4 to step 8, 4 runs of the report, one on each of two devices. Each setting is evaluated
    # on 3 batches, each run of the report on 2 batches after steps 0 and 8.
    plan, run = plan_of(run_plan(), 2, "--sweep.curve_points=1")
    assert (plan.steps, plan.batches, plan.seconds) == (8, {"validation": 3, "test": 2}, {"": (2.0, 0.5)})
    search, rest, report = 2 * 2.0 + 1.5, 6 * 2.0 + 1.5, 8 * 2.0 + 2 * 1.0
    assert plan.schedule.makespan == 2 * search + rest + report
    assert plan.schedule.work == 4 * search + 2 * rest + 2 * report
    # Three on each.
    plan, run = plan_of(run_plan(), 2, "--sweep.members_at_once=3", "--sweep.curve_points=1")
    assert (plan.held, plan.group_size, plan.devices) == ({"": 3}, 6, 2)
    assert [len(span.unit.members) for span in plan.schedule.spans] == [6, 2, 4, 4]
    assert plan.schedule.makespan == 3 * search + 2 * rest + 2 * report
    assert plan.schedule.work == (3 + 1) * search + 2 * rest + 2 * report
    words = ("3 runs", "8 steps a run; 3 batches", "2 in the report", "2 workers", "80 s", "85 s")
    assert_mentions(format_sweep(plan, run), *words, "2 from step 0 of the search")
    plan, _ = plan_of(run_plan(), 8, "--sweep.group_size=1", "--sweep.curve_points=1")
    assert plan.schedule.makespan == plan.schedule.bound == search + rest + report
    plan, run = plan_of(run_plan(), 8, "--sweep.group_size=1", "--sweep.curve_points=1", "--sweep.widen=2")
    assert plan.schedule.makespan == search + rest + report
    assert_mentions(format_sweep(plan, run), "on top", "sweep.widen")
    plan, run = plan_of(run_plan(seconds=0.0), 2)
    assert plan.schedule is None
    assert_mentions(format_sweep(plan, run), "--topology")


@pytest.mark.slow
def test_an_evaluation_of_all_layers_is_counted(tmp_path):
    """Its loss is in eight chunks, whose loop would count once."""
    settings = llama(tmp_path, model={"loss_chunk": 16}, train={"accumulate": 2})
    mesh, (base, data) = make_mesh(1), parts_of(settings, tmp_path)
    batches = full_batches(data.splits["train"], 8, 4)
    work = count_evaluation(settings, base, data, batches, mesh)
    whole = dataclasses.replace(settings, model=dataclasses.replace(settings.model, loss_chunk=512))
    step = plan_step(whole, replace_depth(base, layers_of(base)), data, mesh)
    losses = task_module(whole).make_losses(whole, data.task, step.parts, mesh)
    evaluate = make_eval(losses.evaluate, mesh=mesh, shardings=step.places)
    program = evaluate.lower(step.held["trained"][0], step.parts.frozen, batches.evaluate).compile()
    assert work.flops == pytest.approx(program.cost_analysis()["flops"], rel=0.01)
    # The matmuls of 4 rows of 32 tokens: weights of a layer, scores, factors of q and v, and the head.
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    layer = weights + 2 * 32 * 32 + RANK * (32 + 32 + 32 + 16)
    assert work.flops == pytest.approx(2 * 4 * 32 * (LAYERS * layer + 32 * 256), rel=0.1)


def test_a_run_that_fits_no_device(plan_of):
    with pytest.raises(ValueError, match="and a run needs"):
        plan_of(run_plan(room=50), 2)
    with pytest.raises(ValueError, match=r"evaluation of 7 rows.*train\.eval_batch_size"):
        plan_of(run_plan(), 2, evaluation=None)


def test_bad_input_is_one_line(tmp_path, capsys):
    options = [config(tmp_path), *OPTIONS]
    for more, words in {
        ("--workers", "0"): ("--workers", 0),
        ("--workers", "2"): ("tokenizer.json",),  # the data is read
        ("--workers", "2", "--search"): ("--workers", "--search"),
        ("--sweep.keep=0.25",): ("sweep",),  # no plan of a sweep without --workers
    }.items():
        assert main(["plan", *options[: 1 if more[0] == "--sweep.keep=0.25" else None], *more]) == 2
        error = capsys.readouterr().err
        assert_mentions(error, *words)
        assert error.count("\n") == 1


@pytest.mark.slow
def test_the_command_writes_what_it_prints(planned, tmp_path, capsys, monkeypatch):
    def plan_for(settings, chip, devices):
        larger = settings.method == "full"
        return fake(planned[0], needed=planned[0].needed * (1 + larger), evaluation=None)

    monkeypatch.setattr(sweep_plan, "load_sweep_data", load)
    monkeypatch.setattr(sweep_plan, "plan_for", plan_for)
    file = tmp_path / "plan.json"
    command = ["plan", config(tmp_path), *OPTIONS, "--sweep.methods=[full]", "--workers", "2"]
    assert main([*command, "--json", str(file)]) == 0
    found, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert set(found["held"]) == set(found["plans"]) == {"lora", "full"}
    assert found["held"]["full"] < found["held"]["lora"]
    assert_mentions(printed, f"{found['held']['lora']:,} runs", f"{found['held']['full']:,} runs")
