"""`benchmarks/tables.py`: samples of data, and invalid input."""

import argparse
import json

import pytest

from loraplus_jax.sweep.arms import programs_of


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
            programs = [tables.lambdas(run)] if name == "lambda" else programs_of(run)
            assert run.sweep.widen > 0
            assert all(len(arm.trials) > 2 for program in programs for arm in program.arms)
