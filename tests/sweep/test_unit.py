"""A unit's directory: its lock, and the result that marks it as finished."""

import json
import threading
import types
from typing import Any

import pytest

from loraplus_jax._utils.atomic import to_json
from loraplus_jax._utils.records import read_record, write_record
from loraplus_jax.sweep import unit as units
from loraplus_jax.sweep.trial import Trial
from loraplus_jax.sweep.unit import MemberSpec, Unit, read_result, run_unit, unit_directory
from loraplus_jax.training.console import LineConsole
from loraplus_jax.training.run_directory import lock_directory
from loraplus_jax.training.run_files import RESULT

from ..messages import mentions

MEMBER = MemberSpec("lora", Trial(1e-3, 1.0, 16.0, 8), 3)
UNIT = Unit("search-8-0", "search", (MEMBER,), 0, (4, 8), "validation")
QUIET = LineConsole(quiet=True)
POPULATION: Any = types.SimpleNamespace(
    data=types.SimpleNamespace(task=types.SimpleNamespace(metric="accuracy"))
)
RESULT_OF_UNIT = {
    "origin": "d0",
    "members": UNIT.members,
    "rows": [key | {"loss": 0.5, "accuracy": 0.9} for step in UNIT.stops for key in UNIT.row_keys(step)],
    "seconds": 1.0,
    "devices": "1 x cpu",
}


@pytest.fixture(autouse=True)
def sweeps_record(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "saved_record", lambda directory: {"digest": "d0"})


def test_a_unit_waits_for_the_process_that_ran_it_and_takes_its_result(tmp_path):
    path = unit_directory(tmp_path, UNIT.name)
    path.mkdir(parents=True)
    locked, results = threading.Event(), []

    def other():
        with lock_directory(path):
            locked.set()
            # As long as the unit below waits for the lock; it would fail without a population.
            threading.Event().wait(0.5)
            write_record(path / RESULT, RESULT_OF_UNIT)

    thread = threading.Thread(target=other)
    thread.start()
    locked.wait()
    results.append(run_unit(POPULATION, UNIT, tmp_path, console=QUIET))
    thread.join()
    assert results == [read_record(path / RESULT)]


def test_a_unit_that_another_process_keeps_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "LOCK_SECONDS", 0.1)
    path = unit_directory(tmp_path, UNIT.name)
    path.mkdir(parents=True)
    with lock_directory(path), pytest.raises(ValueError, match=r"search-8-0 is in use"):
        run_unit(POPULATION, UNIT, tmp_path, console=QUIET)


def change_row(**values):
    return lambda c: c["rows"][0].update(values)


EDITS = {
    "kept": lambda c: c.update(origin="d1"),
    "no sweep": lambda c: c.pop("origin"),
    "another sweep": lambda c: c.update(origin="e0"),
    "other members": lambda c: c.update(members=[[*MEMBER[:2], 4]]),
    "no members": lambda c: c.pop("members"),
    "no rows": lambda c: c.pop("rows"),
    "empty rows": lambda c: c.update(rows=[]),
    "rows that are none": lambda c: c.update(rows=[7]),
    "a row less": lambda c: c["rows"].pop(),
    "an earlier step": change_row(step=-1),
    "a step that is text": change_row(step="8"),
    "an unknown arm": change_row(arm="lora_star"),
    "another split": change_row(split="test"),
    "a loss that is text": change_row(loss="low"),
    "a metric less": lambda c: c["rows"][0].pop("accuracy"),
    "a name more": lambda c: c.update(more=1),
    "seconds that are text": lambda c: c.update(seconds="1"),
    "the cost of another kind of unit": lambda c: c.update(cost={"trainable": 1, "step_seconds": None}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_only_the_result_of_this_unit_of_this_sweep_is_read(tmp_path, edit):
    path = unit_directory(tmp_path, UNIT.name) / RESULT
    path.parent.mkdir(parents=True)
    content = json.loads(to_json(RESULT_OF_UNIT))
    EDITS[edit](content)
    write_record(path, content)

    def read():
        return read_result(tmp_path, UNIT, ["d0", "d1"], "accuracy")

    if edit == "kept":
        assert read() == read_record(path)
    else:
        with pytest.raises(ValueError, match=mentions(path, "remove", path.parent)):
            read()
    # Without a digest there is none.
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=mentions(path, "remove", path.parent)):
        read()


def test_a_scored_unit_has_a_cost_and_scores(tmp_path):
    path = unit_directory(tmp_path, UNIT.name) / RESULT
    path.parent.mkdir(parents=True)
    key = {"arm": "lora", "seed": 3}
    cost = {"trainable": 1, "step_seconds": 0.5}
    scored = {"text_scores": [key | {"bleu": 1.0}], "unrelated": [key | {"before": 1.0, "after": 2.0}]}
    scored |= RESULT_OF_UNIT | {"cost": cost}

    def read(**values):
        write_record(path, scored | values)
        return read_result(tmp_path, UNIT._replace(is_scored=True), ["d0"], "accuracy")

    assert read()["cost"] == cost  # pyright: ignore
    for wrong in ({"cost": None}, {"cost": {}}, {"text_scores": [{"bleu": 1}]}, {"unrelated": [key]}):
        with pytest.raises(ValueError, match=mentions(path, "remove")):
            read(**wrong)
