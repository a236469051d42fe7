"""Options of `loraplus eval --tasks`, and accuracies by hand; whole evaluations are in `tests/integration`."""

import json

import numpy as np
import pytest

from loraplus_jax.cli.commands import main

from ..data.test_mmlu import write_mmlu
from ..messages import assert_mentions

pytestmark = pytest.mark.usefixtures("cache")


def write_tasks(root):
    """Files of boolq, arc_easy and two subjects of MMLU, small enough for the tiny model's context."""
    rng = np.random.default_rng(0)
    for folder, words in {"boolq": ["true", "false"], "ARC-Easy": ["answer1", "answer2", "answer3"]}.items():
        (root / folder).mkdir(parents=True)
        rows = []
        for n in range(30):
            text = f"what is {n} ?\n\nAnswer format: {'/'.join(words)}"
            word = str(rng.choice(words))
            rows.append({"instruction": text, "input": "", "output": f"the correct answer is {word}"})
            rows[-1]["answer"] = word
        (root / folder / "test.json").write_text(json.dumps(rows))
    for subject in ("astronomy", "world_religions"):
        rows = [[f"what is {n} ?", *map(str, range(4)), "ABCD"[rng.integers(4)]] for n in range(12)]
        # Too long for all three examples.
        rows[5][0] *= 18
        write_mmlu(root / "mmlu", subject, rows[:3], rows[3:])
    return root


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--tasks", "mmlu, bolq"), ["--tasks", "'bolq'", "'boolq'"]),
        (("--tasks", "boolq,boolq"), ["--tasks", "boolq", "twice"]),
        (("--tasks", ""), ["--tasks", "arc_easy"]),
        (("--tasks", "piqa"), ["piqa/test.json", "boolq", "mmlu"]),
        (("--tasks", "mmlu"), ["--shots 5", 3, "astronomy_dev.csv"]),
        (("--tasks", "mmlu", "--shots", "-1"), ["--shots", -1, 0]),
        (("--tasks", "boolq", "--shots", "2"), ["--shots 2", "mmlu"]),
        (("--tasks", "mmlu", "--template", "plain"), ["--template plain", "mmlu"]),
        (("--tasks", "boolq", "--allow_different", "data"), ["--allow_different data", "run or merged"]),
        (("--tasks", "boolq", "--limit", "0"), ["--limit", 0, 1]),
        (("--tasks", "boolq", "--batch_size", "0"), ["--batch_size", 0, 1]),
        (("--tasks", "boolq", "--output", "{dir}/a.txt"), ["--output", ".json", "a.txt"]),
        (("--tasks", "boolq", "--output", ""), ["--output", "run, adapter or merged model"]),
        (("--tasks", "boolq", "--data_root", "{dir}/nowhere"), ["--data_root", "nowhere", "directory"]),
        (("--tasks", "mmlu", "--shots", "3"), ["astronomy_test.csv:1", "context", 64]),
    ],
)
def test_invalid_options(first_talk, tmp_path, capsys, options, named):
    words = {"--data_root": str(tmp_path / "tasks"), "--output": str(tmp_path / "a.json")}
    write_tasks(tmp_path / "tasks")
    words |= {a: b.format(dir=tmp_path) for a, b in zip(options[::2], options[1::2], strict=True)}
    given = [word for name, value in words.items() if value or name == "--tasks" for word in (name, value)]
    assert main(["eval", str(first_talk.model), *given]) == 2
    message = capsys.readouterr().err
    assert_mentions(message, *named)
    assert message.count("loraplus:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]
