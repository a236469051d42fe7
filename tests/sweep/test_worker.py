"""What a worker checks before it runs a unit, and how it tells its progress."""

import socket
import types

import jax
import pytest

from loraplus_jax._utils.records import write_record
from loraplus_jax.sweep import worker
from loraplus_jax.sweep.settings import SweepRun
from loraplus_jax.sweep.unit import Progress, Unit, unit_directory
from loraplus_jax.sweep.worker import PROGRESS, Job, packages, read_progress, run_on_worker
from loraplus_jax.training.run_files import OWNER

from ..messages import assert_mentions

UNIT = Unit("search-8-0", "search", (), 0, (8,), "validation")


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / OWNER).write_text("7\n")
    settings = SweepRun, {"train": {"compilation_cache": False}}
    return Job(settings, tmp_path, tmp_path, "7\n", {"packages": packages()}, 1, 1, None)


def error_of(job, words):
    answer = run_on_worker(job, UNIT)
    assert answer["host"] == socket.gethostname()
    assert_mentions(answer["error"], *words)
    assert "result" not in answer


def test_other_packages_and_storage_of_its_own_are_named(job):
    other = packages() | {"jax": "0.0.1"}
    error_of(job._replace(source={"packages": other}), ["jax", "0.0.1", "on the driver", "on this worker"])
    other = packages() | {"jax_default_matmul_precision": "highest"}
    error_of(
        job._replace(source={"packages": other}),
        ["jax_default_matmul_precision", "highest", "options of JAX"],
    )
    error_of(job._replace(owner="8\n"), [job.directory, "storage", "does not see"])
    error_of(job._replace(directory=job.directory / "none"), ["none", "storage"])


def test_options_of_jax_that_no_step_runs_with_are_named(job):
    with jax.disable_jit():
        error_of(job, ["jax_disable_jit", True])


def test_an_error_of_any_kind_names_its_host_and_is_a_line(job, monkeypatch):
    def fail(job):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nframes")

    monkeypatch.setattr(worker, "_prepare", fail)
    answer = run_on_worker(job, UNIT)
    assert answer["host"] == socket.gethostname()
    assert answer["failed"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"


def test_the_base_and_the_data_are_compared_with_the_drivers(job, monkeypatch):
    origin = {"base": "a1", "identity": {"data": {"train": "d1"}}}
    monkeypatch.setattr(worker, "settings_from_json", lambda values, kind: None)
    monkeypatch.setattr(worker, "abstract_population", lambda run: None)
    monkeypatch.setattr(worker, "prepare_population", lambda *_: types.SimpleNamespace(origin=origin))
    monkeypatch.setattr(worker, "run_unit", lambda population, unit, directory, **_: {"rows": []})
    monkeypatch.setattr(worker._Prepared, "key", None)
    source = job.source | origin
    assert run_on_worker(job._replace(source=source), UNIT)["result"] == {"rows": []}
    error_of(job._replace(source=source | {"base": "b2"}), ["base", "a1", "b2"])
    data = {"identity": {"data": {"train": "e2"}}}
    error_of(job._replace(source=source | data), ["identity.data.train", "d1", "e2"])


def test_unreadable_progress_is_none(tmp_path):
    path = unit_directory(tmp_path, UNIT.name) / PROGRESS
    assert read_progress(tmp_path, UNIT) is None
    path.parent.mkdir(parents=True)
    for text in ("", "{", "[]", '{"steps": 1}', '{"step": 1, "digest": "0"}'):
        path.write_text(text)
        assert read_progress(tmp_path, UNIT) is None
    row = {"stage": "search", "arm": "lora", "trial": [1e-3, 1.0, 16.0, 8], "seed": 0, "step": 3}
    row |= {"split": "validation", "loss": None, "accuracy": 0.5}
    for rows in ({}, [{"loss": 1.0}], [row | {"step": "3"}], [row | {"accuracy": "high"}]):
        write_record(path, {"step": 3, "rows": rows})
        assert read_progress(tmp_path, UNIT) is None
    worker._Reporter(path).tell(Progress(3, [row]))
    assert read_progress(tmp_path, UNIT) == Progress(3, [row])
