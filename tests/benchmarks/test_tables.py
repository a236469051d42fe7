"""`benchmarks/tables.py`: means over data sets by hand and by simulation, samples of data, and invalid input."""

import argparse
import json
import math

import numpy as np
import pytest
from scipy import stats

from loraplus_jax.sweep.method_comparison import method_run
from loraplus_jax.sweep.statistics import ratio_interval, t_interval


def report(gains, ratios, confidence=0.95):
    """A study of which `overall` reads the intervals of LoRA+ against LoRA."""
    measures = {"test_metric": t_interval(gains, confidence)}
    measures["steps_ratio"] = ratio_interval(ratios, [1.0] * len(ratios), confidence)
    return {
        "protocol": {"metric": "accuracy", "confidence": confidence},
        "methods": {"lora_plus": {"against_lora": measures}},
    }


def test_one_data_set_has_its_own_interval():
    from tables import overall

    study = report([0.01, 0.03, 0.02], [2.0, 2.0, 8.0], 0.99)
    for measure, own in study["methods"]["lora_plus"]["against_lora"].items():
        assert overall([study], measure) == pytest.approx({n: own[n] for n in ("mean", "low", "high")})


def test_the_mean_over_data_sets_uses_all_their_seeds():
    from tables import overall

    first, second = report([0.01, 0.03, 0.02], [2.0, 4.0, 8.0]), report([0.05, 0.01, 0.03, 0.07], [4.0, 16.0])
    # Variances of the means 1e-4/3 and (20/3)e-4/4, so 6/3 e-4 together, with 4e-8 / (1/9/2 + 25/9/3)e-8 degrees.
    gain = overall([first, second], "test_metric")
    degrees = 4 / (1 / 18 + 25 / 27)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(2e-4) / 2
    assert [gain[n] for n in ("low", "mean", "high")] == pytest.approx([0.03 - half, 0.03, 0.03 + half])
    # Geometric means 4 and 8.
    assert overall([first, second], "steps_ratio")["mean"] == pytest.approx(math.sqrt(32))
    # The wider confidence of the two holds for both.
    wider = overall([first, report([0.05, 0.01, 0.03, 0.07], [4.0, 16.0], 0.99)], "test_metric")
    assert wider["mean"] == pytest.approx(0.03)
    assert wider["high"] - 0.03 == pytest.approx(
        half * stats.t.ppf(0.995, degrees) / stats.t.ppf(0.975, degrees)
    )
    assert overall([first, report([0.05], [4.0])], "test_metric") is None


@pytest.mark.parametrize(("noise", "share"), [((1, 1, 1), 0.955), ((3, 1, 1), 0.93)])
def test_intervals_over_data_sets_cover_the_true_mean(noise, share):
    from tables import overall

    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        sets = [
            report(rng.normal(n, s, seeds), [1.0, 1.0])
            for n, (s, seeds) in enumerate(zip(noise, (3, 5, 5), strict=True))
        ]
        found = overall(sets, "test_metric")
        covered += found["low"] <= 1 <= found["high"]
    assert covered / 2000 == pytest.approx(share, abs=0.015)


def test_steps_are_only_counted_on_curves_with_enough_points():
    from tables import counts_steps

    runs = [{"diverged": False, "curve": [[0, 1.0], [1, 0.0]]}]
    study = {"methods": {"lora": {"runs": runs}}}
    assert not counts_steps(study)
    runs[0]["curve"] = [[n, 1.0 - n] for n in range(5)]
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
