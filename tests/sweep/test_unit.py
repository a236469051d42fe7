"""A unit's directory: its lock, and the result that marks it as finished."""

import threading

import pytest

from loraplus_jax._utils.records import read_record, write_record
from loraplus_jax.sweep import unit as units
from loraplus_jax.sweep.settings import Trial
from loraplus_jax.sweep.unit import MemberSpec, Unit, is_result_of, run_unit, unit_directory
from loraplus_jax.training.console import LineConsole
from loraplus_jax.training.run_directory import lock_directory
from loraplus_jax.training.run_files import RESULT

MEMBER = MemberSpec("lora", Trial(1e-3, 1.0, 16.0, 8), 3)
UNIT = Unit("search-8-0", "search", (MEMBER,), 0, (8,), "validation")
QUIET = LineConsole(quiet=True)


def test_a_unit_waits_for_the_process_that_ran_it_and_takes_its_result(tmp_path):
    path = unit_directory(tmp_path, UNIT.name)
    path.mkdir(parents=True)
    locked, results = threading.Event(), []

    def other():
        with lock_directory(path):
            locked.set()
            # As long as the unit below waits for the lock; it would fail without a population.
            threading.Event().wait(0.5)
            write_record(path / RESULT, {"members": UNIT.members, "rows": []})

    thread = threading.Thread(target=other)
    thread.start()
    locked.wait()
    results.append(run_unit(None, UNIT, tmp_path, console=QUIET))  # pyright: ignore
    thread.join()
    assert results == [read_record(path / RESULT)]
    assert is_result_of(results[0], UNIT)
    assert not is_result_of(results[0], UNIT._replace(members=(MEMBER._replace(seed=4),)))


def test_a_unit_that_another_process_keeps_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "LOCK_SECONDS", 0.1)
    path = unit_directory(tmp_path, UNIT.name)
    path.mkdir(parents=True)
    with lock_directory(path), pytest.raises(ValueError, match=r"search-8-0 is in use"):
        run_unit(None, UNIT, tmp_path, console=QUIET)  # pyright: ignore
