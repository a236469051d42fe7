"""`benchmarks/tables.py`: samples of data, and invalid input."""

import argparse
import json

import pytest

from loraplus_jax.sweep.method_comparison import method_run


def test_a_sample_is_the_same_each_time_and_keeps_to_its_limits(tmp_path):
    from tables import Sample, sample

    rows = [{"instruction": "a" * n, "output": "ü"} for n in range(40)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    path = sample(tmp_path / "q.json", Sample("q.json", 5, 20), tmp_path / "out")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == 5
    assert all(len(row["instruction"]) <= 20 for row in found)
    first = path.read_bytes()
    assert sample(tmp_path / "q.json", Sample("q.json", 5, 20), tmp_path / "out").read_bytes() == first
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (row,) = sample(tmp_path / "t.jsonl", Sample("t.jsonl", 1), tmp_path / "out").read_text().splitlines()
    assert json.loads(row)["text"] in ("a", "b")


@pytest.mark.parametrize(
    ("instruction", "answer", "choices"),
    [
        (
            "\n\nAnswer1: ice Answer2: hot iron Answer3: a: b\n\nAnswer",
            "answer2",
            ["ice", "hot iron", "a: b"],
        ),
        ("\n\nSolution1: ice.\n\nSolution2: iron.\n\nAnswer", "solution2", ["ice.", "iron."]),
    ],
)
def test_a_question_is_answered_by_the_text_of_a_choice(instruction, answer, choices):
    from tables import spell

    start = "Please choose the correct answer to the question: What melts?"
    row = {"instruction": f"{start}{instruction} format: a/b", "answer": answer}
    assert spell(row) == {"instruction": "What melts?", "choices": choices, "answer": choices[1]}


@pytest.mark.slow
def test_the_settings_of_every_study_and_of_each_of_its_methods_are_valid(tmp_path, monkeypatch):
    import tables

    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a", "instruction": "b"}\n')
    row = {"instruction": "question: b\n\nAnswer1: c Answer2: d\n\nAnswer format", "answer": "answer2"}
    for folder in ("boolq", "ARC-Easy", "piqa"):
        (tmp_path / "commonsense" / folder).mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / "commonsense" / folder / f"{split}.json").write_text(json.dumps([row]))
    monkeypatch.setattr(tables, "fetch", lambda name: text)
    options = argparse.Namespace(data=tmp_path, recipe=None, settings=[])
    for name, studies in tables.STUDIES.items():
        for title, study in studies.items():
            run = tables.settings_of(study, options, tmp_path / name / title)
            assert run.lora.init == ("lora_b" if "A zero" in title else "lora")
            for method in () if name == "lambda" else run.sweep.methods:
                assert method_run(run, method).sweep.widen > 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["lambda", "--only", "sentences"], ("--only", "CoLA, B zero", "sentences")),
        (["commonsense", "--data", "nowhere"], ("nowhere/commonsense/ARC-Easy/train.json",)),
        (["lambda", "--sweep.curve_points", "0"], ("sweep.curve_points", "0")),
        (["lambda", "--recipe", "none.yaml"], ("none.yaml",)),
    ],
)
def test_invalid_input_is_one_error(command, words, tmp_path, capsys, monkeypatch):
    import tables

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        tables.main([*command, "--results", str(tmp_path / "results")])
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "results").exists()
