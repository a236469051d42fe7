"""What training needs of every kind of task: the metric that selects, and notes that make the task again."""

import json

import pytest

from loraplus_jax.tasks.causal_lm import LanguageTask
from loraplus_jax.tasks.encoder import EncoderTask
from loraplus_jax.tasks.interface import held_out_split, row_count

TASKS = [
    (LanguageTask(kind="instruction"), "perplexity", "min"),
    (LanguageTask(kind="generation", template="{{ messages }}"), "perplexity", "min"),
    (LanguageTask(kind="multiple_choice"), "accuracy", "max"),
    (EncoderTask(kind="classification", names=("a", "b")), "accuracy", "max"),
    (EncoderTask(kind="classification", names=("a", "b"), metrics=("matthews", "f1")), "matthews", "max"),
    (EncoderTask(kind="regression"), "mse", "min"),
    (EncoderTask(kind="regression", metrics=("mae",)), "mae", "min"),
    (EncoderTask(kind="regression", metrics=("pearson", "spearman")), "pearson", "max"),
]


@pytest.mark.parametrize(("task", "metric", "mode"), TASKS)
def test_the_first_metric_selects_and_the_notes_are_the_task(task, metric, mode):
    assert (task.metric, task.mode) == (metric, mode)
    notes = json.loads(json.dumps(task.notes()))
    assert notes["kind"] == task.kind
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in notes.items()}
    assert type(task)(**fields) == task


def test_the_test_split_is_held_out_if_there_is_one():
    assert held_out_split({"train": 1, "validation": 1, "test": 1}) == "test"
    assert held_out_split({"train": 1, "validation": 1}) == "validation"
    assert row_count({"a": [1, 2, 3], "b": [4, 5, 6]}) == 3
