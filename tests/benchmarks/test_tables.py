"""`benchmarks/tables.py`: means over data sets by hand, samples of data, and invalid input."""

import argparse
import json
import math

import pytest

from loraplus_jax.sweep.method_comparison import method_run


def run(seed, metric, curve, target=None, steps=None, diverged=False):
    test = None if diverged else {"loss": curve[-1][1], "accuracy": metric}
    return {"seed": seed, "curve": curve, "test": test, "target": target, "steps_to_target": steps} | {
        "diverged": diverged
    }


def report(gains, speeds):
    """LoRA falls from 1 to 0 in 100 steps; LoRA+ gets there `speed` times faster."""
    own = [
        run(s, 0.5 + gain, [[0, 1.0], [100 / speed, 0.0]], 0.0, 100 / speed)
        for s, (gain, speed) in enumerate(zip(gains, speeds, strict=True))
    ]
    lora = [run(s, 0.5, [[0, 1.0], [100, 0.0]]) for s in range(len(gains))]
    return {
        "protocol": {"metric": "accuracy", "confidence": 0.95},
        "methods": {"lora": {"runs": lora}, "lora_plus": {"runs": own}},
    }


def test_the_mean_over_data_sets_is_paired_by_seed():
    from tables import overall

    first, second = report([0.01, 0.03, 0.02], [2.0, 2.0, 8.0]), report([0.03, 0.03, 0.0], [2.0, 8.0, 2.0])
    gain, ratio = overall([first, second], "lora_plus")
    # Means of the seeds 0.02, 0.03, 0.01: mean 0.02, error 0.01 / sqrt(3), t of 0.975 with two degrees 4.30265.
    half = 4.30265 * 0.01 / math.sqrt(3)
    assert [gain[n] for n in ("low", "mean", "high")] == pytest.approx(
        [0.02 - half, 0.02, 0.02 + half], abs=1e-6
    )
    # Geometric means of the seeds 2, 4, 4: their logarithms' mean is 5/3 of log 2.
    assert ratio["mean"] == pytest.approx(2 ** (5 / 3))
    second["methods"]["lora_plus"]["runs"][0] = run(0, None, [[0, None]], diverged=True)
    assert overall([first, second], "lora_plus")[0]["pairs"] == 2


def test_intervals_over_data_sets_have_the_confidence_of_their_tables():
    from tables import overall

    study = report([0.01, 0.03, 0.02], [2.0, 2.0, 8.0])
    study["protocol"]["confidence"] = 0.99
    gain, _ = overall([study], "lora_plus")
    # t of 0.995 with two degrees of freedom.
    assert gain["high"] - gain["mean"] == pytest.approx(9.92484 * 0.01 / math.sqrt(3), abs=1e-6)


def test_steps_are_only_counted_on_curves_with_enough_points():
    from tables import counts_steps

    study = report([0.01], [2.0])
    assert not counts_steps(study)
    for method in study["methods"].values():
        method["runs"][0]["curve"] = [[n, 1.0 - n] for n in range(5)]
    assert counts_steps(study)


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
            "Please choose the correct answer to the question: What melts?\n\nAnswer1: ice Answer2: hot iron "
            "Answer3: a: b\n\nAnswer format: answer1/answer2/answer3",
            "answer2",
            ["ice", "hot iron", "a: b"],
        ),
        (
            "Please choose the correct solution to the question: What melts?\n\nSolution1: ice.\n\nSolution2: "
            "iron.\n\nAnswer format: solution1/solution2",
            "solution2",
            ["ice.", "iron."],
        ),
    ],
)
def test_a_question_is_answered_by_the_text_of_a_choice(instruction, answer, choices):
    from tables import spell

    row = {"instruction": instruction, "answer": answer}
    assert spell(row) == {"instruction": "What melts?", "choices": choices, "answer": choices[1]}


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
