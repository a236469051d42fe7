"""Trackers get every row once, over interruptions too, and end no run; with modules in place of the services'."""

import errno
import importlib
import importlib.util
import io
import json
import math
import os
import sys
import types

import pytest

from loraplus_jax.training import metrics_log, trackers
from loraplus_jax.training.console import LineConsole
from loraplus_jax.training.metrics_log import RunLog
from loraplus_jax.training.run_directory import lock_directory
from loraplus_jax.training.trackers import TRACKERS, Reports, check_trackers

from ..messages import assert_mentions, mentions

CONFIG = {"seed": 0, "train": {"steps": 5}}


class Service:
    """What a tracker has, in memory, as a service keeps it when the process ends."""

    address = None

    def __init__(self):
        self.runs, self.closed, self.fails = {}, 0, False

    def start(self, directory, config, run_id):
        if self.fails:
            raise OSError("no\nnetwork")
        self.run = self.runs.setdefault(run_id or f"id{len(self.runs)}", [])
        return next(name for name, run in self.runs.items() if run is self.run)

    def log(self, step, values):
        if self.fails:
            raise OSError("no\nnetwork")
        self.run.append((step, values))

    def finish(self, finished):
        self.closed += 1
        self.finished = finished


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda: service)  # pyright: ignore
    return service


def logged(directory, steps, keep=0, names=("wandb",), finished=False):
    """Writes a row for each step, after the first `keep` rows of an interrupted run; returns what is printed."""
    file = io.StringIO()
    console = LineConsole(file=file)
    log = RunLog(
        directory, keep=keep, open_reports=lambda rows: Reports(names, directory, CONFIG, rows, console)
    )
    for step in steps:
        log.write(step, {"loss": step, "validation/loss": math.nan})
    log.close(finished=finished)
    return file.getvalue().splitlines()


def steps_of(run):
    return [step for step, _ in run]


# What a run logs, interruption by interruption: steps, rows that are kept of before, trackers.
HISTORIES = {
    "it stops before it has written again what it wrote before": [([1, 2, 3], 0), ([3], 2), ([3, 4], 2)],
    "a tracker that is added gets the rows so far": [([1, 2, 3], 0, ()), ([3, 4], 2)],
    "one that was left out for a while gets what it lacks": [([1, 2], 0), ([3], 2, ()), ([4], 3)],
    "train.log_every has changed": [([1, 2, 3], 0), ([4], 1)],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_over_interruptions_every_row_is_sent_once(tmp_path, service, history):
    for part in history:
        logged(tmp_path, *part, finished=part is history[-1])
        assert (tmp_path / "trackers.json").exists() == bool(service.runs)
        assert not service.runs or service.finished == (part is history[-1])
    values = service.runs["id0"][0][1]
    assert (values.keys(), values["train/loss"]) == ({"train/loss", "validation/loss"}, 1.0)
    assert math.isnan(values["validation/loss"])
    assert {name: steps_of(run) for name, run in service.runs.items()} == {"id0": [1, 2, 3, 4]}


def test_a_tracker_that_fails_is_left_out_with_one_line(tmp_path, service):
    assert logged(tmp_path, [1]) == []
    service.fails = True
    (line,) = logged(tmp_path, [2, 3, 4], keep=1)
    assert_mentions(line, "train.report_to wandb", "OSError", "no network")
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4]
    service.fails = False
    assert logged(tmp_path, [5], keep=4) == []
    assert steps_of(service.runs["id0"]) == [1, 2, 3, 4, 5]


def test_after_a_kill_the_rows_of_the_file_count_as_sent(tmp_path, service):
    console = LineConsole(file=io.StringIO())
    log = RunLog(tmp_path, open_reports=lambda rows: Reports(["wandb"], tmp_path, CONFIG, rows, console))
    for step in (1, 2, 3):
        log.write(step, {"loss": step})
    at_the_start = (tmp_path / "trackers.json").read_text()
    log.close()
    (tmp_path / "trackers.json").write_text(at_the_start)  # a kill leaves no more
    logged(tmp_path, [2, 3, 4], keep=1)
    assert steps_of(service.runs["id0"]) == [1, 2, 3, 4]


def test_after_a_kill_before_a_service_answers_its_rows_still_count_as_sent(tmp_path, service, monkeypatch):
    logged(tmp_path, [1, 2, 3])
    # A kill leaves no more than the start wrote.
    services = {"wandb": {"id": "id0", "used": True, "rows": []}}
    trackers.write_record(tmp_path / "trackers.json", {"services": services})
    with monkeypatch.context() as patch:
        patch.setattr(service, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            logged(tmp_path, [], keep=1)
    logged(tmp_path, [2, 3, 4], keep=1)
    assert steps_of(service.runs["id0"]) == [1, 2, 3, 4]


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_damaged_file_of_ids_ends_no_run_and_stays(tmp_path, service):
    logged(tmp_path, [1])
    flipped = (tmp_path / "trackers.json").read_text().replace('"id0"', '"id1"')
    for text in ("{", "[1]", '{"services": 5}', '{"services": {"wandb": {"id": "a"}}}', flipped):
        (tmp_path / "trackers.json").write_text(text)
        (line,) = logged(tmp_path, [1])
        assert_mentions(line, "train.report_to wandb", "trackers.json")
        assert logged(tmp_path, [1], names=()) == []
        assert (tmp_path / "trackers.json").read_text() == text


def test_the_address_of_a_run_is_a_line_and_a_password_in_one_is_not_printed(tmp_path, service):
    service.address = "https://host/run"
    (line,) = logged(tmp_path, [1])
    assert_mentions(line, "wandb", "https://host/run")
    service.start = fail
    (line,) = logged(tmp_path, [2], keep=1)
    assert "secret" not in line
    assert "http://***@host/api" in line


def fail(*_):
    raise OSError("http://user:secret@host/api failed")


def test_one_that_fails_while_logging_does_not_stop_the_others(tmp_path, service, monkeypatch):
    other = Service()
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", lambda: other)  # pyright: ignore
    service.log = lambda step, values: 1 / 0
    (line,) = logged(tmp_path, [1, 2], names=("wandb", "mlflow"))
    assert_mentions(line, "wandb", "ZeroDivisionError")
    assert (steps_of(other.runs["id0"]), service.closed, other.closed) == ([1, 2], 0, 1)


@pytest.mark.parametrize(
    ("module", "name"),
    [(metrics_log, "_load_tensorboard"), (metrics_log, "write_text"), (trackers, "write_record")],
)
def test_a_log_that_cannot_be_opened_ends_the_runs_of_the_services(
    tmp_path, service, monkeypatch, module, name
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, name, full)
    with pytest.raises(OSError, match="No space left"):
        logged(tmp_path, [1])
    assert (service.closed, service.finished) == (1, False)


def test_a_log_that_cannot_be_closed_ends_the_runs_of_the_services(tmp_path, service, monkeypatch):
    writer, _ = metrics_log._load_tensorboard()
    close = writer.EventsWriter.close
    monkeypatch.setattr(writer.EventsWriter, "close", lambda self: (close(self), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        logged(tmp_path, [1], finished=True)
    assert (service.closed, service.finished) == (1, True)


def test_a_directory_that_is_lost_is_named_and_the_runs_of_the_services_end(tmp_path, service):
    directory, file = tmp_path / "run", io.StringIO()
    directory.mkdir()
    with lock_directory(directory) as check:
        log = RunLog(
            directory,
            check=check,
            open_reports=lambda rows: Reports(
                ["wandb"], directory, CONFIG, rows, LineConsole(file=file), check
            ),
        )
        directory.rename(tmp_path / "moved")
        for end in (lambda: log.write(1, {"loss": 1.0}), log.close):
            with pytest.raises(ValueError, match="was renamed, deleted or replaced"):
                end()
    assert (service.closed, service.finished, directory.exists()) == (1, False, False)


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else object())
    check_trackers(["wandb", "trackio"])
    with pytest.raises(ImportError, match=mentions("train.report_to", "pip install 'loraplus_jax[mlflow]'")):
        check_trackers(["wandb", "mlflow"])


# the adapters, on modules that record what is called


class Recorder(types.ModuleType):
    """A module any attribute of which is a function that records its call; `returns` has their results."""

    def __init__(self, name, **returns):
        super().__init__(name)
        self.calls, self.returns = [], returns

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self.returns.get(name)

        return call

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def module(monkeypatch, name, **returns):
    found = Recorder(name, **returns)
    monkeypatch.setitem(sys.modules, name, found)
    return found


def used(name, tmp_path, run_id):
    tracker = TRACKERS[name]()
    found = tracker.start(tmp_path, CONFIG, run_id)
    tracker.log(3, {"train/loss": 0.5})
    tracker.finish(True)
    return found


@pytest.mark.parametrize("run_id", [None, "abc"])
def test_wandb(tmp_path, monkeypatch, run_id):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "")  # restored at the end
    monkeypatch.delenv("WANDB_SILENT")
    run = Recorder("run")
    run.id, run.offline, run.url = "given", False, "https://wandb/given"
    wandb = module(monkeypatch, "wandb", init=run)
    assert used("wandb", tmp_path, run_id) == "given"
    ((_, init),) = wandb.of("init")
    assert init["id"] == "abc" if run_id else len(init["id"]) == 8
    assert (init["resume"], init["config"], init["project"]) == ("allow", CONFIG, "loraplus_jax")
    ((_, settings),) = wandb.of("Settings")
    assert (settings.pop("console"), settings.pop("x_save_requirements")) == ("off", False)
    assert os.environ["WANDB_SILENT"] == "true"
    assert set(settings.values()) == {True}
    assert all("disable" in name for name in settings)
    assert run.of("define_metric") == [(("*",), {"step_metric": "step"})]
    assert run.of("log") == [(({"step": 3, "train/loss": 0.5},), {})]
    assert run.of("finish") == [((), {"exit_code": 0})]


@pytest.mark.parametrize("run_id", [None, "abc"])
def test_mlflow(tmp_path, monkeypatch, run_id):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    created = types.SimpleNamespace(info=types.SimpleNamespace(run_id="new"))
    client = Recorder("client", create_experiment="7", create_run=created)
    module(monkeypatch, "mlflow", MlflowClient=client)
    entities = module(monkeypatch, "mlflow.entities")
    assert used("mlflow", tmp_path, run_id) == (run_id or "new")
    params = [args for args, _ in entities.of("Param")]
    assert [args for args, _ in client.of("create_experiment")] == ([] if run_id else [("mine",)])
    assert [args for args, _ in client.of("create_run")] == ([] if run_id else [("7",)])
    assert params == ([] if run_id else [("seed", "0"), ("train.steps", "5")])
    (((name, value, _, step), _),) = entities.of("Metric")
    assert (name, value, step) == ("train/loss", 0.5, 3)
    assert client.of("log_batch")[-1][0][0] == (run_id or "new")
    assert client.of("set_terminated") == [((run_id or "new",), {"status": "FINISHED"})]


@pytest.mark.parametrize("run_id", [None, "out-abc"])
def test_trackio(tmp_path, monkeypatch, run_id):
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    run = Recorder("run")
    run.name = "given"
    trackio = module(monkeypatch, "trackio", init=run)
    assert used("trackio", tmp_path, run_id) == "given"
    ((_, init),) = trackio.of("init")
    assert init["name"] == run_id if run_id else init["name"].startswith(f"{tmp_path.name}-")
    assert (init["resume"], init["config"], init["project"]) == ("allow", CONFIG, "loraplus_jax")
    assert (init["auto_log_cpu"], init["auto_log_gpu"]) == (False, False)
    assert run.of("log") == [(({"train/loss": 0.5},), {"step": 3})]
    assert len(run.of("finish")) == 1
