"""Predictions and evaluations of an adapter that was never trained, against its model applied by hand."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from loraplus_jax.inference.predict import (
    describe_adapter,
    evaluate_run,
    load_tuned,
    predict_run,
    settings_and_task,
    write_predictions,
)

from ..messages import mentions
from ..refusals import refusals

pytestmark = pytest.mark.usefixtures("cache")
TEXTS = ["the film is so good", "bad play", "one quite bad tale that felt good"]


@pytest.mark.slow
def test_a_prediction_is_the_output_of_the_model_for_the_text_alone(untrained):
    tuned = load_tuned(untrained.out)
    vocabulary = json.loads((untrained.model / "tokenizer.json").read_text())["model"]["vocab"]
    found = predict_run(untrained.out, texts=TEXTS)[0]
    ids = np.array([[2, *(vocabulary[word] for word in TEXTS[0].split()), 3]], np.int32)  # [CLS], [SEP]
    logits = jax.jit(tuned.parts.model.apply)(tuned.variables, ids, np.ones_like(ids), np.zeros_like(ids))
    expected = np.asarray(jax.nn.softmax(logits))[0]
    assert list(found["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
    assert (found["text"], found["prediction"]) == (TEXTS[0], ("no", "yes")[expected.argmax()])


@pytest.mark.slow
def test_an_evaluation_counts_right_predictions_and_truncated_texts_of_a_file(untrained, tmp_path, capsys):
    rows = untrained.rows()
    rows[3] |= {"text": "good " * 200}
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = predict_run(untrained.out, data=str(data))
    assert f"truncated 1 of {len(rows)} texts to data.max_length" in capsys.readouterr().err
    right = np.mean([a["prediction"] == b["label"] for a, b in zip(found, rows, strict=True)])
    evaluated = evaluate_run(untrained.out, data=str(data))
    assert evaluated["truncated"] == 1
    assert evaluated["accuracy"] == pytest.approx(right)
    assert 0 < right < 1
    losses = [-np.log(a["probabilities"][b["label"]]) for a, b in zip(found, rows, strict=True)]
    assert evaluated["loss"] == pytest.approx(np.mean(losses), abs=1e-4)


def damaged(**change):
    """Reads the notes of an adapter with other values."""

    def call(untrained):
        adapter = untrained.out / "adapter"
        notes = json.loads((adapter / "adapter.json").read_text())
        assert settings_and_task(adapter, notes)[1].names == ("no", "yes")
        settings_and_task(adapter, notes | change)

    return call


DAMAGED = "adapter.json is damaged"
test_invalid_arguments_and_notes = pytest.mark.slow(
    refusals(
        (lambda untrained: evaluate_run(untrained.out, split="tests"), "--split", "'tests'", "'test'"),
        (lambda untrained: evaluate_run(untrained.out, output=Path("a.txt")), "--output", ".jsonl", "a.txt"),
        (lambda untrained: evaluate_run(untrained.out, output=Path("a.jsonl")), "--output", "generation"),
        (lambda untrained: predict_run(untrained.out, texts=["a", " "]), "empty"),
        (damaged(task={"kind": "classification"}), DAMAGED, "names"),
        (damaged(task={"kind": "classification", "names": [1, 2]}), DAMAGED, "task.names", "[1, 2]"),
        (damaged(task={"kind": "instruction", "nosuch": 1}), DAMAGED, "nosuch"),
        (damaged(settings={"nosuch": 1}), DAMAGED, "nosuch"),
        lines=9,
    )
)


@pytest.mark.slow
def test_damaged_notes_of_a_run_whose_base_has_moved(untrained, tmp_path):
    adapter = shutil.copytree(untrained.out / "adapter", tmp_path / "adapter")
    notes = json.loads((adapter / "adapter.json").read_text())
    del notes["digest"], notes["settings"]["model"]
    (adapter / "adapter.json").write_text(json.dumps(notes))
    for base in (None, str(tmp_path)):
        with pytest.raises(ValueError, match=mentions("adapter.json is damaged", "model.path")):
            describe_adapter(adapter, None, (), base)


def test_predictions_replace_no_file(tmp_path):
    write_predictions(tmp_path / "a.jsonl", [{"text": "ä", "loss": float("nan")}])
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"text": "ä", "loss": null}\n'
    with pytest.raises(ValueError, match=mentions("a.jsonl", "exists")):
        write_predictions(tmp_path / "a.jsonl", [])
