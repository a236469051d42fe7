"""`loraplus runs`: state, result and resume command of runs, sweeps and comparisons, read without JAX."""

import contextlib
import json
import math
import subprocess
import sys

import filelock
import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.settings.parsing import settings_from_json
from loraplus_jax.settings.schema import Settings
from loraplus_jax.sweep.settings import SweepRun
from loraplus_jax.training.anomalies import TrainingFailed
from loraplus_jax.training.console import LineConsole
from loraplus_jax.training.list_runs import best_row, describe_run, find_runs, list_runs
from loraplus_jax.training.run_directory import lock_directory, open_output_directory, write_config

from ..messages import assert_mentions, mentions
from .preparation import lock_of_another_process

PLAIN = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"steps": 40}}
EVALUATIONS = [(10, 0.7, 0.5), (20, 0.8, 0.4), (30, 0.6, 0.3), (40, math.nan, math.nan)]


def run_of(directory, values=PLAIN, kind=Settings, steps=(), rows=(), summary=None):
    directory.mkdir(parents=True)
    write_config(directory, settings_from_json(values | {"output_dir": str(directory)}, kind))
    for step in steps:
        (directory / "checkpoints" / str(step)).mkdir(parents=True)
    if rows:
        lines = (json.dumps(row).replace("NaN", "null") + "\n" for row in rows)
        (directory / "metrics.jsonl").write_text("".join(lines) + '{"st')
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def validations(rows, metric="accuracy"):
    return [{"step": n, f"validation/{metric}": a, "validation/loss": b} for n, a, b in rows]


def sweep_rows(arms, step=40, stage="report"):
    same = {"stage": stage, "trial": [0.1, 1.0, 16.0, 8], "step": step, "split": "test"}
    return [
        same | {"arm": a, "seed": n, "loss": x} for a, losses in arms.items() for n, x in enumerate(losses)
    ]


def test_a_finished_run_shows_its_held_out_result_and_no_command(tmp_path):
    run = run_of(tmp_path / "a", steps=[20, 40], summary=finished({"loss": 0.5, "accuracy": 0.9}))
    (run / "metrics.jsonl").write_text("[]\n")  # which is not read
    row = describe_run(run)
    assert (row["state"], row["step"], row["steps"], row["resume"]) == ("finished", 40, 40, None)
    assert row["best"] == {"name": "accuracy", "value": 0.9, "split": "test", "step": 20}


def test_the_constant_answer_stands_beside_the_metric_that_the_settings_choose(tmp_path):
    own = PLAIN | {"data": {"path": "d", "metrics": ["macro_f1", "f1"]}}
    values = {"accuracy": 0.97, "loss": 0.1, "macro_f1": 0.6, "f1": 0.2}
    constant = {"accuracy": 0.9688, "loss": 0.14, "macro_f1": 0.4921, "f1": 0.0}
    run = run_of(tmp_path / "a", own, summary=finished(values) | {"constant": constant})
    best = {"name": "macro_f1", "value": 0.6, "split": "test", "step": 20, "constant": 0.4921}
    assert describe_run(run)["best"] == best
    assert_mentions(list_runs(tmp_path), "macro_f1", "0.6000", "constant", "0.4921")
    rows = [
        {
            "step": n,
            "validation/loss": 0.1,
            "validation/mse": n,
            "validation/mae": -n,
            "validation/spearman": n,
        }
        for n in (1, 2)
    ]
    for metric, step in (("mse", 1), ("mae", 2), ("spearman", 2)):
        found = best_row(rows, [metric])
        assert (found["name"], found["step"]) == (metric, step)


def test_a_stopped_run_shows_its_best_validation_and_the_command_that_resumes_it(tmp_path):
    run = run_of(tmp_path / "a b", steps=[20, 30], rows=validations(EVALUATIONS))
    row = describe_run(run)
    assert (row["state"], row["step"], row["steps"]) == ("stopped", 30, 40)
    assert row["best"] == {"name": "accuracy", "value": 0.8, "split": "validation", "step": 20}
    assert row["resume"] == f"loraplus train '{run}/config.yaml'"
    moved = run.rename(tmp_path / "c")
    assert describe_run(moved)["resume"] == f"loraplus train {moved}/config.yaml --output_dir {moved}"


@pytest.mark.slow
def test_a_run_in_progress_shows_its_pid_and_a_killed_one_does_not(tmp_path):
    run = run_of(tmp_path / "a")
    with lock_of_another_process(run) as holder:
        row = describe_run(run)
        assert (row["state"], row["pid"], row["resume"]) == ("running", str(holder.pid), None)
    assert (run / ".pid").exists()
    assert describe_run(run)["state"] == "stopped"
    with lock_directory(run):  # listing did not keep the lock
        pass


def test_a_failed_run_shows_why_until_it_runs_again(tmp_path):
    settings = settings_from_json(PLAIN | {"output_dir": str(tmp_path / "a")})
    with (
        contextlib.suppress(TrainingFailed),
        open_output_directory(settings, LineConsole(quiet=True)) as output,
    ):
        output.claim()
        raise TrainingFailed("the loss is not finite at step 7")
    row = describe_run(tmp_path / "a")
    assert (row["state"], row["problem"]) == ("failed", "the loss is not finite at step 7")
    assert row["resume"]
    with open_output_directory(settings, LineConsole(quiet=True)) as output:
        output.claim()
    assert describe_run(tmp_path / "a")["state"] == "stopped"


@pytest.mark.parametrize(
    ("metric", "best"), [("accuracy", 0.8), ("matthews", 0.8), ("mse", 0.6), ("perplexity", 0.6)]
)
def test_the_decisive_metric_decides_the_best(metric, best):
    rows = validations(EVALUATIONS, metric)
    assert best_row(rows)["value"] == best
    twice = [{**row, "step": row["step"] + 1000} for row in rows]
    assert best_row([*rows, *twice])["step"] > 1000  # the latest, as training selects
    # Before training there is no checkpoint that could be selected.


def test_a_sweep_shows_its_lowest_mean_loss_and_its_winner_s_run(tmp_path):
    rows = sweep_rows({"lora": [9.0]}, 5, "search") + sweep_rows(
        {"lora": [0.5, 0.7], "lora_plus": [0.1, math.nan]}
    )
    sweep = run_of(tmp_path / "s", kind=SweepRun, rows=rows)
    run_of(sweep / "winner", steps=[3])
    run_of(sweep / "checkpoints" / "1", steps=[3])  # nothing of a run is a run
    assert [*find_runs(tmp_path)] == [sweep, sweep / "winner"]
    row = describe_run(sweep)
    assert (row["kind"], row["state"], row["step"]) == ("sweep", "stopped", 40)
    assert row["resume"] == f"loraplus sweep {sweep}/config.yaml"
    assert row["best"]["value"] == pytest.approx(0.6)
    assert (row["best"]["split"], row["best"]["setting"]["arm"]) == ("test", "lora")


def test_a_comparison_is_one_line_and_lists_the_runs_with_its_winners(tmp_path):
    values = PLAIN | {"sweep": {"methods": ["lora_plus", "dora"]}}
    rows = sweep_rows({"lora": [0.5], "dora": [0.4]})
    comparison = run_of(tmp_path / "c", values, SweepRun, rows=rows)
    winner = run_of(comparison / "lora/winner", steps=[3])
    (tmp_path / "linked").symlink_to(comparison / "lora")
    (comparison / "link").symlink_to(comparison / "lora")
    assert [*find_runs(comparison)] == [comparison, winner]
    row = describe_run(comparison)
    assert (row["kind"], row["step"], row["best"]["setting"]["arm"]) == ("comparison", 40, "dora")
    # A program that is still searching comes last; what has ended is shown.
    rows += sweep_rows({"pissa": [0.3]}, 5, "search")
    later = run_of(tmp_path / "l", values, SweepRun, rows=rows)
    assert describe_run(later)["best"]["setting"]["arm"] == "dora"


def test_an_unreadable_directory_does_not_end_the_list(tmp_path):
    run_of(tmp_path / "a", steps=[10])
    (run_of(tmp_path / "b") / "config.yaml").write_text("{")
    (tmp_path / "c" / "checkpoints").mkdir(parents=True)
    (run_of(tmp_path / "d") / "metrics.jsonl").write_text("[]\n")
    run_of(tmp_path / "e", PLAIN | {"train": {"epochs": 2.0}}, steps=[10])
    (tmp_path / "f").mkdir()
    lines = list_runs(tmp_path).splitlines()
    missing = (f"{tmp_path / 'c'}  unreadable: ", "config.yaml", "is missing")
    unreadable = [("unreadable",), missing, ("unreadable",)]
    said = [("10 of 40 steps", "stopped"), *unreadable, ("step 10", "2 epochs", "stopped")]
    for line, words in zip(lines, said, strict=True):
        assert_mentions(line, *words)


def finished(after):
    return {"after": after, "held_out": {"split": "test"}, "steps": 40, "selected_step": 20}


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_metric_without_a_value_is_a_dash(tmp_path, value):
    run_of(tmp_path / "a", summary=finished({"loss": 0.5, "accuracy": value}))
    assert_mentions(list_runs(tmp_path), "finished", "accuracy - (test, step 20)")
    (row,) = map(json.loads, list_runs(tmp_path, json=True).splitlines())
    assert (row["state"], row["best"]["value"]) == ("finished", None)


DAMAGE = {
    "metrics.jsonl": ["[" * 100_000 + "\n", "x" * 2**21, '{"validation/loss": "x", "step": 1}\n'],
    "failure.txt": ["x" * 2**21],
    "summary.json": ['{"steps": 9}', json.dumps(finished({})), json.dumps(finished({"loss": "x"}))],
    "config.yaml": [
        "model: {path: [m]}\nmethod: lora\noutput_dir: o\ntrain: {steps: 4}\n",
        "model: {path: 2020-01-01}\nmethod: lora\noutput_dir: o\ntrain: {steps: 4}\n",
        "model: {path: m}\nmethod: lora\noutput_dir: o\ntrain: {epochs: abc}\n",
        "model: {path: m}\nsweep:\ntrain: {steps: 4}\n",
    ],
}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name in DAMAGE for text in DAMAGE[name]])
def test_what_is_wrong_with_one_run_is_its_own_line(tmp_path, name, content):
    run_of(tmp_path / "a", steps=[10])
    (run_of(tmp_path / "b") / name).write_text(content)
    first, second = list_runs(tmp_path).splitlines()
    assert_mentions(first, "stopped")
    assert_mentions(second, "unreadable")
    rows = [json.loads(line) for line in list_runs(tmp_path, json=True).splitlines()]
    assert [row["state"] for row in rows] == ["stopped", "unreadable"]


def test_linked_runs_are_listed_without_loops(tmp_path):
    elsewhere = run_of(tmp_path / "elsewhere" / "a")
    run_of(tmp_path / "elsewhere" / "b" / "c")
    runs = tmp_path / "runs"
    runs.mkdir()
    links = {"a": elsewhere, "b": elsewhere.parent / "b", "loop": runs, "none": runs / "x"}
    for name, target in links.items():
        (runs / name).symlink_to(target)
    assert [*find_runs(runs)] == [runs / "a"]
    (tmp_path / "link").symlink_to(runs)
    assert [*find_runs(tmp_path / "link")] == [tmp_path / "link" / "a"]


def locked_run(tmp_path):
    run = run_of(tmp_path / "a", rows=validations(EVALUATIONS))
    for name in (".lock", ".pid"):
        (run / name).write_text("7\n")
    return run


def test_a_run_whose_lock_cannot_be_opened_keeps_its_results(tmp_path, monkeypatch):
    run = locked_run(tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    row = describe_run(run)
    assert (row["state"], row["resume"], row["best"]["value"]) == ("unknown", None, 0.8)
    assert_mentions(list_runs(tmp_path), "unknown", "accuracy 0.8000")


def test_a_lock_that_is_a_link_is_not_opened(tmp_path):
    run = run_of(tmp_path / "a")
    (run / ".pid").write_text("7\n")
    (run / ".lock").symlink_to(tmp_path / "target")
    assert_mentions(describe_run(run)["problem"], ".lock", "symbolic link")
    assert not (tmp_path / "target").exists()


def test_json_lines_on_the_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "none").mkdir()
    run_of(tmp_path / "runs" / "a", steps=[10])
    (run_of(tmp_path / "runs" / "b") / "config.yaml").write_text("{")
    assert main(["runs", str(tmp_path / "runs"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["state"] for row in rows] == ["stopped", "unreadable"]
    for options, printed in ((["--json"], ""), ([], "no runs")):
        assert main(["runs", str(tmp_path / "none"), *options]) == 0
        assert printed in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert (main(["runs"]), len(capsys.readouterr().out.splitlines())) == (0, 2)
    with pytest.raises(ValueError, match=mentions("absent", "loraplus runs DIRECTORY")):
        list_runs(tmp_path / "absent")


@pytest.mark.slow
def test_the_list_loads_no_jax(tmp_path):
    run_of(tmp_path / "a", steps=[10])
    code = f"""
import sys
from loraplus_jax.cli.commands import main
assert main(["runs", {str(tmp_path)!r}]) == 0
assert not {{"jax", "pydantic", "tensorboardX"}} & {{name.split(".")[0] for name in sys.modules}}
"""
    subprocess.run([sys.executable, "-c", code], check=True)
