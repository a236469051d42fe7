"""The plan of a sweep: runs that a device holds, and times by those of a single run's plan, by hand."""

import json
import types

import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.plan import sweep_plan
from loraplus_jax.plan.sweep_plan import SHARED, format_sweep, plan_sweep, runs_held
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.sweep.settings import SweepRun

from ..messages import assert_mentions
from .tiny import config

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


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Plans a sweep whose runs have the given plan, on local devices of which a worker has two."""

    def plan(one, workers, *options):
        monkeypatch.setattr(sweep_plan, "plan_for", lambda settings, chip, devices: one)
        monkeypatch.setattr(sweep_plan.jax, "devices", lambda: ["a", "b"])
        run = parse_settings(config(tmp_path), [*OPTIONS, *options], SweepRun)
        return plan_sweep(run, workers), run

    return plan


def test_the_time_by_hand(planned):
    # 8 settings to step 2, 4 to step 8, 4 runs of the report, one on each of two devices.
    plan, run = planned(run_plan(), 2)
    assert (plan.schedule.makespan, plan.schedule.work) == (
        2.0 * (2 * 2 + 6 + 8),
        2.0 * (4 * 2 + 2 * 6 + 2 * 8),
    )
    # Three on each.
    plan, run = planned(run_plan(), 2, "--sweep.members_at_once=3")
    assert (plan.held, plan.group_size, plan.devices) == ({"": 3}, 6, 2)
    assert [len(span.unit.members) for span in plan.schedule.spans] == [6, 2, 4, 4]
    assert plan.schedule.makespan == 2.0 * (3 * 2 + 2 * 6 + 2 * 8)
    assert plan.schedule.work == 2.0 * ((3 + 1) * 2 + 2 * 6 + 2 * 8)
    assert_mentions(
        format_sweep(plan, run), "3 runs", "2 workers", "68 s", "72 s", "2 from step 0 of the search"
    )
    plan, _ = planned(run_plan(), 8, "--sweep.group_size=1")
    assert plan.schedule.makespan == plan.schedule.bound == 2.0 * 16
    plan, run = planned(run_plan(seconds=0.0), 2)
    assert plan.schedule is None
    assert_mentions(format_sweep(plan, run), "--topology")


def test_bad_input_is_one_line(planned, tmp_path, capsys):
    with pytest.raises(ValueError, match="and a run needs"):
        planned(run_plan(room=50), 2)
    options = [config(tmp_path), *OPTIONS]
    for more, words in {
        ("--workers", "0"): ("--workers", 0),
        ("--workers", "2", "--train.steps=null"): ("--workers", "train.steps"),
        ("--workers", "2", "--search"): ("--workers", "--search"),
        ("--sweep.keep=0.25",): ("sweep",),  # no plan of a sweep without --workers
    }.items():
        assert main(["plan", *options[: 1 if more[0] == "--sweep.keep=0.25" else None], *more]) == 2
        error = capsys.readouterr().err
        assert_mentions(error, *words)
        assert error.count("\n") == 1


@pytest.mark.slow
def test_the_command_writes_what_it_prints(tmp_path, capsys):
    file = tmp_path / "plan.json"
    command = ["plan", config(tmp_path), *OPTIONS, "--sweep.methods=[full]", "--workers", "2"]
    assert main([*command, "--json", str(file)]) == 0
    found, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert set(found["held"]) == set(found["plans"]) == {"lora", "full"}
    assert found["held"]["full"] < found["held"]["lora"]
    assert_mentions(printed, f"{found['held']['lora']:,} runs", f"{found['held']['full']:,} runs")
