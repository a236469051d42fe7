"""Predictions and evaluations of an adapter that was never trained, against its model applied by hand."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.inference.predict import evaluate_run, predict_run, write_predictions
from loraplus_jax.inference.tuned_model import describe, load, settings_and_task
from loraplus_jax.training.place import look

from ..messages import mentions
from ..refusals import refusals

pytestmark = pytest.mark.usefixtures("cache")
TEXTS = ["the film is so good", "bad play", "one quite bad tale that felt good"]


@pytest.mark.slow
def test_a_prediction_is_the_output_of_the_model_for_the_text_alone(untrained):
    tuned = load(describe(look(untrained.out)))
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


def damaged(base=None, **change):
    """Reads the notes of an adapter with other values."""

    def call(untrained):
        place = look(untrained.out)
        assert settings_and_task(place)[1].names == ("no", "yes")
        describe(place._replace(notes=place.notes | change), base=base)

    return call


DAMAGED = "adapter.json is damaged"
test_invalid_arguments_and_notes = pytest.mark.slow(
    refusals(
        (lambda untrained: evaluate_run(untrained.out, split="tests"), "--split", "'tests'", "'test'"),
        (lambda untrained: evaluate_run(untrained.out, output=Path("a.txt")), "--output", ".jsonl", "a.txt"),
        (damaged(task={"kind": "classification"}), DAMAGED, "names"),
        (damaged(task={"kind": "classification", "names": [1, 2]}), DAMAGED, "task.names", "[1, 2]"),
        (damaged(task={"kind": "instruction", "nosuch": 1}), DAMAGED, "nosuch"),
        (damaged(settings={"nosuch": 1}), DAMAGED, "nosuch"),
        (damaged(base="x", settings={"data": {}, "output_dir": "a"}), DAMAGED, "model.path"),
        lines=9,
    )
)


def test_predictions_replace_no_file(tmp_path):
    write_predictions(tmp_path / "a.jsonl", [{"text": "ä", "loss": float("nan")}])
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"text": "ä", "loss": null}\n'
    with pytest.raises(ValueError, match=mentions("a.jsonl", "exists")):
        write_predictions(tmp_path / "a.jsonl", [])


@pytest.mark.slow
@pytest.mark.usefixtures("no_own_cache")
def test_the_next_command_reads_the_programs_from_the_cache(untrained, tmp_path, capsys):
    kept = []
    for _ in range(2):
        assert main(["predict", str(untrained.out), "--text", TEXTS[0]]) == 0
        kept.append({path.name for path in (tmp_path / "xla").glob("*-cache")})
    assert kept[0] == kept[1] != set()
    assert not capsys.readouterr().err
