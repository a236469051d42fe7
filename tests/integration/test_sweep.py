"""The sweep on the tiny world: what it leaves, interruptions, members that diverge, and its page."""

import base64
import contextlib
import json
import re
import shutil
import signal

import jax
import pytest
import yaml

from loraplus_jax._utils.records import read_record, write_record
from loraplus_jax.cli.commands import main
from loraplus_jax.sweep import device_members
from loraplus_jax.sweep.device_members import DeviceMembers
from loraplus_jax.training import console

from ..messages import assert_mentions
from .runs import Page, cut_short, flags, lines_of, report_of, saved_steps, summary_of
from .test_paths import moved_files

pytestmark = pytest.mark.slow

TINY = flags(
    "--sweep.learning_rates [2e-3,5e-3] --sweep.lr_ratios [2,4] --sweep.report_seeds 2 --sweep.rungs [0.25]"
    " --sweep.keep 0.5 --train.max_skipped 2 --train.steps 16 --train.eval_every 4"
)


@pytest.fixture(scope="module")
def swept(first_world, tmp_path_factory, cache):
    """A whole sweep, to be read only."""
    world = first_world.copy(tmp_path_factory.mktemp("swept"))
    with pytest.MonkeyPatch.context() as patch, world.printed.open("w") as file:
        patch.setattr(console, "SECONDS_PER_LINE", 0.0)
        with contextlib.redirect_stdout(file):
            assert run_sweep(world) == 0
    return world.out


def run_sweep(world, *overrides, out=None):
    return main(["sweep", str(world.config), "--output_dir", str(out or world.out), *TINY, *overrides])


def result_of(out):
    """What must not depend on interruptions and places."""
    return {**report_of(out), "command": ""}, (out / "metrics.jsonl").read_text()


def test_output_files_of_a_sweep(swept):
    report = report_of(swept)
    assert report["complete"]
    # 4 settings of each arm to step 4, then 2 of each to 16: 8 x 4 + 4 x 12. Three arms on 2 seeds for 16 steps.
    assert report["member_steps"] == {"search": 80, "grid": 128, "report": 96}
    assert [sum(row["step"] == step for row in report["search"]) for step in (4, 16)] == [8, 4]
    assert [(run["arm"], run["seed"]) for run in report["runs"]] == [
        (arm, seed) for arm in ("lora", "lora_plus", "control") for seed in (1, 2)
    ]
    assert all([step for step, _ in run["curve"]] == [0, 4, 8, 10, 11, 13, 14, 16] for run in report["runs"])
    # Each member is evaluated once at a step: 8 and 4 in the search, 6 at eight steps of the report.
    rows = lines_of(swept / "metrics.jsonl")
    keys = {(row["stage"], row["arm"], *row["trial"], row["seed"], row["step"]) for row in rows}
    assert len(rows) == len(keys) == 8 + 4 + 6 * 8
    assert all(run["test"]["loss"] == run["curve"][-1][1] for run in report["runs"])
    for arm in ("lora", "lora_plus"):
        last = [row for row in report["search"] if row["step"] == 16 and row["arm"] == arm]
        best = min(last, key=lambda row: row["loss"])
        assert report["chosen"][arm] == {name: best[name] for name in report["chosen"][arm]}
    assert summary_of(swept)["verdict"] == report["verdict"]


def test_a_sweep_prints_lines_between_its_comparisons(swept):
    text = (swept.parent / "printed.txt").read_text()
    names = re.findall(r"^((?:search|report) step \d+ of \d+): .* left$", text, flags=re.M)
    search = [f"search step {step} of {4 if step <= 4 else 16}" for step in range(1, 17)]
    assert names[:16] == search
    assert {name.split()[0] for name in names[16:]} == {"report"}
    # Before the first step and after the third of 8 members: 80 steps of the search and 96 of the report, as in the
    # test of the output files; a batch for each of 12 evaluations of the search, and two for 6 x 8 of the report.
    begins = "estimate:", "search step", "loading and compiling took"
    first, *lines = [line for line in text.splitlines() if line.startswith(begins)]
    assert first.startswith(begins[2])
    assert [n for n, line in enumerate(lines) if line.startswith("estimate:")] == [0, 4]
    assert "176 training steps and 108 evaluation batches" in lines[0]
    assert "152 training steps and 108 evaluation batches" in lines[4]


def test_the_pages_numbers_are_the_reports_and_it_needs_no_network(swept):
    report, page = report_of(swept), Page((swept / "report.html").read_text())
    assert len(page.numbers) > 100
    page.check(report)
    shown = {path for path, *_ in page.numbers}
    assert {f"runs.{n}.test.loss" for n in range(6)} <= shown
    starts = [run["curve"][0][1] for run in report["runs"] if run["arm"] == "lora"]
    assert report["protocol"]["untrained"]["loss"] == pytest.approx(sum(starts) / len(starts))
    assert "protocol.untrained.loss" in shown
    assert {f"comparisons.{n}.steps_ratio.{k}" for n in range(2) for k in ("mean", "low", "high")} <= shown
    assert report["verdict"] in page.text
    assert report["command"] in page.text
    pictures = [(swept / f"{name}.png").read_bytes() for name in ("heat_map", "curves")]
    found = [base64.b64decode(load.removeprefix("data:image/png;base64,")) for load in page.loads]
    assert found == pictures


def test_the_winners_command_trains(swept, tmp_path):
    program, *arguments = report_of(swept)["command"].split()
    assert program == "loraplus"
    assert main([*arguments, "--output_dir", str(tmp_path / "out"), "--train.steps", "4"]) == 0
    config = json.loads((tmp_path / "out/adapter/adapter.json").read_text())["config"]
    winner = report_of(swept)["winner"]
    assert [config[name] for name in ("lr_ratio", "alpha", "rank")] == [
        winner[n] for n in ("lr_ratio", "alpha", "rank")
    ]
    assert winner == {"arm": winner["arm"], **report_of(swept)["chosen"][winner["arm"]]}
    assert yaml.safe_load((swept / "winner.yaml").read_text())["optimizer"]["head_learning_rate"] == 5e-3


def test_a_finished_sweep_and_other_settings_are_rejected(swept, capsys):
    world = ["--output_dir", str(swept), *TINY]
    config = str(swept.parent / "config.yaml")
    assert main(["sweep", config, *world]) == 2
    assert_mentions(capsys.readouterr().err, swept, "finished", "summary.json")
    assert main(["sweep", config, *world, "--sweep.keep", "0.25"]) == 2
    assert_mentions(capsys.readouterr().err, "sweep.keep", 0.5, 0.25)


def stopping(monkeypatch, count, stop):
    """`stop()` is called at the population's `count`-th step."""
    step, taken = DeviceMembers.step, []

    def counted(self, batches):
        taken.append(1)
        step(self, batches)
        if len(taken) == count:
            stop()

    monkeypatch.setattr(DeviceMembers, "step", counted)


class Killed(BaseException):
    """What a kill is to a process, for one that goes on."""


def killed():
    raise Killed


def stopped_at(count, world, *options):
    """A sweep that SIGTERM stops at the population's step of this number."""
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, count, lambda: signal.raise_signal(signal.SIGTERM))
        assert run_sweep(world, *options) == 143


def test_stopped_and_killed_at_any_moment_it_ends_bitwise_the_same(world, swept, capsys, undrawn):
    # Before the rung, after it, amid the report; then at steps 3 and 6 of the search.
    for count, left in ((3, 176), (3, 176 - 3 * 8), (12, 96 + (16 - 6) * 4)):
        stopped_at(count, world)
        printed = capsys.readouterr()
        assert_mentions(printed.err, "stopped", "same command")
        assert f"for {left} training steps" in printed.out
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, 3, killed)
        with pytest.raises(Killed):
            run_sweep(world)
    assert run_sweep(world) == 0
    assert "report" in capsys.readouterr().out
    assert result_of(world.out)[1] == result_of(swept)[1]
    paths = dict.fromkeys(
        ("protocol", "command", "digest"), 0
    )  # hold the paths of a run, or follow from them
    assert report_of(world.out) | paths == report_of(swept) | paths


def stopped_in_evaluation(count, world):
    """The batches that a sweep evaluates if SIGTERM comes during the one of this number."""
    eval_batches, made = device_members.eval_batches, []

    def counted(*arguments):
        for batch in eval_batches(*arguments):
            made.append(1)
            if len(made) == count:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_members, "eval_batches", counted)
        assert run_sweep(world) == 143
    return len(made)


def test_stopped_while_it_evaluates_it_has_saved_and_ends_bitwise_the_same(world, swept, capsys, undrawn):
    # A timed batch, and one after step 4 of the search. Then a timed one, those of steps 4 and 16 and, of the
    # report, two after each of the steps 0, 4 and 8.
    for count, unit, step, left in ((2, "search-4-0", 4, 176), (1 + 2 + 6, "report-0", 8, 176 - 4 * 8)):
        assert stopped_in_evaluation(count, world) == count
        assert_mentions(capsys.readouterr().out, f"for {left} training steps")
        assert max(saved_steps(world.out / "units" / unit)) == step
        assert not (world.out / "units" / unit / "result.json").exists()
    assert run_sweep(world) == 0
    # Six members on two seeds less have 8 of 16 steps.
    assert_mentions(capsys.readouterr().out, "for 48 training steps")
    assert result_of(world.out)[1] == result_of(swept)[1]


def test_a_damaged_or_foreign_checkpoint_of_a_unit_costs_only_its_own_steps(world, capsys, undrawn):
    stopped_at(3, world)
    checkpoints, record = world.out / "units/search-4-0/checkpoints", world.out / "identity.json"
    identity = record.read_text()
    write_record(record, {**read_record(record), "note": "of another sweep"})
    assert run_sweep(world) == 2
    assert_mentions(capsys.readouterr().err, "another sweep", checkpoints, "remove")
    record.write_text(identity)
    cut_short(checkpoints)
    assert run_sweep(world) == 2
    error = capsys.readouterr().err
    assert_mentions(error, checkpoints, "remove")
    assert "--fresh" not in error
    shutil.rmtree(checkpoints)
    stopped_at(1, world)
    assert saved_steps(checkpoints.parent) == [1]


def test_a_sweep_whose_base_and_data_moved_resumes_as_if_they_had_not(world, swept, capsys, undrawn):
    stopped_at(12, world)  # amid the report
    moved = moved_files(world)
    assert run_sweep(world, *moved) == 0
    assert_mentions(capsys.readouterr().out, "settings changed", "model.path", "data.path", *moved[1::2])
    assert result_of(world.out)[1] == result_of(swept)[1]
    config = yaml.safe_load((world.out / "config.yaml").read_text())
    assert (config["model"]["path"], config["data"]["path"]) == moved[1::2]


def test_results_under_other_options_of_jax_are_not_mixed(world, capsys, undrawn):
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, 16 + 1, killed)  # at the first step of the report, which has no checkpoint yet
        with pytest.raises(Killed):
            run_sweep(world)
    results = {path: path.read_bytes() for path in world.out.glob("units/*/result.json")}
    assert results
    capsys.readouterr()
    with jax.default_prng_impl("rbg"):
        assert run_sweep(world) == 2
    error = capsys.readouterr().err
    assert_mentions(error, world.out, "jax_default_prng_impl", "threefry2x32", "rbg")
    assert error.count("\n") == 1
    # What a process leaves that is killed as it writes a result.
    leftover = next(iter(results)).with_name(".loraplus-0.partial")
    leftover.mkdir()
    (leftover / "lock").touch()
    assert run_sweep(world) == 0
    assert {path: path.read_bytes() for path in results} == results
    assert not list(world.out.glob("units/*/*.partial"))


def test_a_wider_search_resumes_and_reports_what_it_tried(world, tmp_path, capsys, undrawn, monkeypatch):
    step, ready = DeviceMembers.step, []

    def recorded(self, batches):
        ready.append(all(leaf.is_ready() for leaf in jax.tree.leaves(self.stacked)))
        step(self, batches)

    monkeypatch.setattr(DeviceMembers, "step", recorded)
    # Two rates a method: either is an end.
    options = (
        *("--sweep.lora_learning_rates", "[1e-4,2e-4]", "--sweep.widen", "1", "--sweep.control", "false"),
        *("--sweep.lr_ratios", "[4]", "--sweep.keep", "0.75"),
    )
    stopped_at(16 + 6, world, *options)
    assert_mentions(capsys.readouterr().out, "LoRA: the best learning rate", "edge", "trying", "at least")
    assert run_sweep(world, *options) == 0
    # Of 4 settings and 4 runs of the report 64 steps each, of the two added 32; the 4 settings have ended.
    left = f"for {64 + 32 - 2 * 6} training steps"
    assert_mentions(capsys.readouterr().out, "resuming from step 6 of the search", left)
    assert run_sweep(world, *options, out=tmp_path / "straight") == 0
    assert result_of(world.out)[1] == result_of(tmp_path / "straight")[1]
    report = report_of(world.out)
    assert [sum(row["step"] == step for row in report["search"]) for step in (4, 16)] == [6, 6]
    assert report["member_steps"]["search"] == 6 * 16
    for arm in ("lora", "lora_plus"):
        rates = {row["learning_rate"] for row in report["search"] if row["arm"] == arm}
        assert len(rates) == 3
        last = [row for row in report["search"] if row["step"] == 16 and row["arm"] == arm]
        assert (
            report["chosen"][arm]["learning_rate"] == min(last, key=lambda row: row["loss"])["learning_rate"]
        )
    assert all(ready)  # a signal waits for one step, not for all that were dispatched


def test_diverged_runs_and_a_target_never_reached_are_reported(world, undrawn, capsys):
    options = ("--sweep.learning_rates", "[2e-3,1e30]", "--sweep.lora_learning_rates", "[2e-3,5e-3]")
    assert run_sweep(world, *options, "--sweep.target", "1e-6", "--sweep.control", "false") == 0
    report = report_of(world.out)
    gone = [(row["learning_rate"], row["loss"]) for row in report["search"] if row["learning_rate"] == 1e30]
    assert gone == [(1e30, None)] * 2
    assert_mentions(report["verdict"], "verdict on steps", "1e-06", "none of 2 seeds")
    printed = capsys.readouterr().out
    assert_mentions(printed, "2 diverged", "unequal", "2 settings of LoRA", "4 settings of LoRA+")
    assert "diverged" in (world.out / "report.html").read_text()
    assert not report["protocol"]["equal_budgets"]


def test_when_all_diverge_it_says_so_and_keeps_what_there_is(world, capsys):
    assert run_sweep(world, "--sweep.learning_rates", "[1e30]", "--sweep.lora_learning_rates", "[2e-3]") == 1
    printed = capsys.readouterr().err
    assert_mentions(printed, "training failed", "LoRA+", "diverged", "step 4")
    report = report_of(world.out)
    assert not report["complete"]
    assert [row["loss"] is None for row in report["search"]] == [False, True, True]
    assert (world.out / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    assert len((world.out / "metrics.jsonl").read_text().splitlines()) == 3
