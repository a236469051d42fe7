"""`loraplus eval --tasks` on runs, models and invalid input."""

import json

import numpy as np
import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.training import trainer

from ..inference.test_eval_tasks import write_tasks
from ..messages import assert_mentions
from .runs import evaluated, flags

pytestmark = pytest.mark.usefixtures("cache")
CHOICES = (
    "--task multiple_choice --data.path {dir}/questions.jsonl --data.max_length 128 --train.steps 4"
    " --train.prompt null --train.prompt_tokens 64"
)
CONTEXT = 256


@pytest.fixture(scope="module")
def long_talk(first_talk, tmp_path_factory):
    """A world with a longer context, the files of tasks, and a run on questions; to be read only."""
    world = first_talk.copy(tmp_path_factory.mktemp("long_talk"))
    config = world.model / "config.json"
    values = json.loads(config.read_text()) | {"max_position_embeddings": CONTEXT}
    config.write_text(json.dumps(values))
    write_tasks(world.directory / "tasks")
    return world


@pytest.fixture(scope="module")
def run(long_talk, cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_loss", lambda *_: None)
        long_talk.trained(*flags(CHOICES.format(dir=long_talk.directory)))
    return long_talk


def evaluate(world, place, tasks, *options):
    return main(
        ["eval", str(place), "--tasks", tasks, "--data_root", str(world.directory / "tasks"), *options]
    )


@pytest.mark.slow
def test_a_run_on_tasks(run, capsys):
    assert evaluate(run, run.out, "arc_easy,mmlu,boolq", "--shots", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["task", "arc_easy", "mmlu", "astronomy", "world_religions", "boolq", "mean"]
    assert [line.split()[0] for line in lines[:7]] == names
    assert_mentions(lines[7], 2, "mmlu", "fewer than 3")
    file = run.out / "tasks.json"
    assert_mentions(lines[8], "written", str(file))
    assert len(lines) == 9
    results = json.loads(file.read_text())
    assert results["steps"] == 4
    assert results["shots"] == 3
    tasks = results["tasks"]
    examples = {"arc_easy": 30, "mmlu": 18, "boolq": 30}
    assert {name: task["examples"] for name, task in tasks.items()} == examples
    # The same answers as an evaluation of the file, whose batches hold all choices of a question.
    for name, folder in {"arc_easy": "ARC-Easy", "boolq": "boolq"}.items():
        data = run.directory / "tasks" / folder / "test.json"
        found = evaluated(capsys, run.out, "--data", data)
        assert tasks[name]["accuracy"] == pytest.approx(found["accuracy"])
    subjects = tasks["mmlu"]["subjects"]
    assert {name: subject["fewer_shots"] for name, subject in subjects.items()} == dict.fromkeys(subjects, 1)
    mean = np.mean([subject["accuracy"] for subject in subjects.values()])
    assert tasks["mmlu"]["accuracy"] == pytest.approx(mean)
    for task in tasks.values():
        p, n = task["accuracy"], task["examples"]
        answers = [1.0] * round(p * n) + [0.0] * round((1 - p) * n)
        assert task["stderr"] == pytest.approx(np.std(answers, ddof=1) / np.sqrt(n))
    assert results["mean"]["accuracy"] == pytest.approx(np.mean([t["accuracy"] for t in tasks.values()]))
    errors = [task["stderr"] for task in tasks.values()]
    assert results["mean"]["stderr"] == pytest.approx(np.linalg.norm(errors) / 3)
    # Nothing is overwritten, and the output names a limit.
    before = file.read_bytes()
    assert evaluate(run, run.out, "boolq,mmlu", "--limit", "4", "--shots", "0") == 0
    printed = capsys.readouterr().out
    assert_mentions(printed, "--limit 4", 26 + 2 * 5, "tasks.1.json")
    assert file.read_bytes() == before
    limited = json.loads((run.out / "tasks.1.json").read_text())
    assert limited["limit"] == 4
    assert limited["tasks"]["mmlu"]["examples"] == 8
    assert limited["tasks"]["mmlu"]["available"] == 18
    assert limited["tasks"]["mmlu"]["fewer_shots"] == 0


@pytest.mark.long
def test_a_base(long_talk, tmp_path, capsys):
    base = tmp_path / "base.json"
    assert evaluate(long_talk, long_talk.model, "mmlu", "--shots", "1", "--output", str(base)) == 0
    results = json.loads(base.read_text())
    assert results["steps"] is None
    assert results["tasks"]["mmlu"]["fewer_shots"] == 0
    capsys.readouterr()
    assert evaluate(long_talk, long_talk.model, "mmlu", "--output", str(base)) == 2
    assert_mentions(capsys.readouterr().err, "--output", "exists")
