"""Whole runs of the command line on the tiny world of texts, in this process."""

import json
import math
import re

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from loraplus_jax import load_adapter
from loraplus_jax.cli.commands import main

from ..inference.test_eval_tasks import write_tasks
from ..messages import assert_mentions
from .properties import cells
from .runs import (
    SHORT,
    column,
    evaluated,
    flags,
    lines_of,
    printed,
    rejected,
    saved_steps,
    summary_of,
    tensor_bytes,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

CELLS = """
        learns  resumes  devices  exports  restarts
bert    slow    -        slow     -        slow
full    slow    -        -        -        -
bf16    slow    -        -        -        -
theory  slow    -        -        -        -
"""  # test_disturbances.py resumes, tests/inference/test_export.py exports, test_population.py has the members


@pytest.mark.parametrize(("kind", "prove"), cells(CELLS))
def test_kind(kind, prove, run_of, undrawn):
    prove(run_of(kind))


# what a run leaves


def test_output_files_of_a_run(finished):
    names = {path.name for path in finished.out.iterdir()}
    files = {"config.yaml", "loss.png", "metrics.jsonl", "summary.json", "identity.json"}
    assert names == files | {"adapter", "checkpoints", "tensorboard", ".lock"}
    adapter = {path.name for path in (finished.out / "adapter").iterdir()}
    assert adapter == {"adapter.json", "adapter.safetensors"}
    assert saved_steps(finished.out) == [20, 40]
    assert (finished.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_says_before_and_after(finished):
    summary = summary_of(finished.out)
    assert summary["before"]["accuracy"] < 0.75
    assert summary["after"]["accuracy"] > 0.9
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["held_out"] == {"split": "test", "examples": 32}
    assert (summary["method"], summary["steps"]) == ("lora_plus", 40)
    assert summary["devices"].startswith("1 x ")
    # query, value and up in two layers at rank 4, and the head; in all also the encoder.
    assert summary["trainable"] == 2 * 4 * (32 + 32 + 48) + 34
    tensors = load_file(finished.model / "model.safetensors")
    base = sum(tensor.size for name, tensor in tensors.items() if not name.startswith("pooler"))
    assert summary["total"] == summary["trainable"] + base


def test_the_rows_of_metrics(finished):
    rows = lines_of(finished.out / "metrics.jsonl")
    assert list(column(finished.out, "loss")) == [5, 10, 15, 20, 25, 30, 35, 40]
    assert list(column(finished.out, "validation/accuracy")) == [20, 40]
    assert len(rows) == 1 + 8 + 2 + 1
    trained = [row for row in rows if "loss" in row]
    roles = ("a", "b", "extra")
    for row in trained:
        assert set(row) == {"step", "loss", "accuracy", "skipped", "steps_per_second"} | {
            f"{name}/{role}" for name in ("rate", "grad_norm", "update_norm") for role in roles
        }
        assert row["rate/b"] == pytest.approx(4 * row["rate/a"], rel=1e-6)
        assert all(math.isfinite(value) for value in row.values())
        assert row["rate/a"] == pytest.approx(5e-3, rel=1e-6)
    summary = summary_of(finished.out)
    before, after = ({f"test/{name}": x for name, x in summary[when].items()} for when in ("before", "after"))
    assert rows[0] == {"step": 0, **{f"before/{name}": value for name, value in before.items()}}
    assert rows[-1] == {"step": summary["selected_step"], **after}


def test_tensorboard_events_hold_the_same_numbers(finished):
    from tensorboardX.proto.event_pb2 import Event

    events = {}
    for path in (finished.out / "tensorboard").iterdir():
        content, place = path.read_bytes(), 0
        while place < len(content):  # length, its checksum, the event, its checksum
            size = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + size])
            events |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            place += 12 + size + 4
    expected = {
        (name if "/" in name else f"train/{name}", row["step"]): value
        for row in lines_of(finished.out / "metrics.jsonl")
        for name, value in row.items()
        if name != "step"
    }
    assert events.keys() == expected.keys()
    for key, value in expected.items():
        assert events[key] == pytest.approx(value, rel=1e-6)


def test_the_config_is_complete(finished):
    """`resumes` trains by it."""
    content = yaml.safe_load((finished.out / "config.yaml").read_text())
    assert content["optimizer"]["b2"] == 0.999
    assert content["lora"]["target_modules"] == ["query", "value", "up"]


def test_the_adapter_loads_without_the_run(finished):
    adapter = load_adapter(finished.out / "adapter")
    assert adapter.config is not None
    assert (adapter.config.rank, adapter.config.lr_ratio, adapter.config.modules_to_save) == (
        4,
        4.0,
        ("head",),
    )
    assert set(adapter.specs) == {
        f"encoder/layers/{name}" for name in ("attention/query", "attention/value", "mlp/up")
    }
    assert jax.tree.map(np.shape, adapter.extras) == {"params": {"head": {"bias": (2,), "kernel": (16, 2)}}}
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(adapter.lora))


def test_what_is_printed(finished):
    lines = finished.printed.read_text().splitlines()
    assert re.match(r"lora_plus \(rank 4, lr_ratio 4\): training 930 of [\d,]+ parameters \(\d", lines[0])
    assert "data: 112 train, 16 validation, 32 test" in lines
    for start in ("before: accuracy 0.", "after:  accuracy "):
        (line,) = (line for line in lines if line.startswith(start))
        assert_mentions(line, "test", "constant", "0.3125")
    # The estimate, which is without the start, comes before the first step.
    names = [
        found[0] for line in lines if (found := re.match(r"loading|(estimate|before|step \d+)(?=:)", line))
    ]
    assert names == ["loading", "estimate", "before", "step 20", "step 40"]
    (start,) = (line for line in lines if line.startswith("loading"))
    assert re.search(r"\d (s|min|h)\b", start)
    assert_mentions(next(line for line in lines if line.startswith("estimate:")), "40 steps", "3 evaluations")
    # A log file gets lines between and during evaluations.
    timed = [line for line in lines if re.search(r"/s, \d+:\d\d:\d\d left$", line)]
    steps = [f"step {step} of 40" for step in range(1, 41)]
    assert [line.split(": ")[0] for line in timed] == ["test batch 1 of 2", *steps, "test batch 1 of 2"]
    losses = [float(re.search(r"loss (\d\.\d{4}), ", line)[1]) for line in timed[1:6]]
    assert sum(losses) / 5 == pytest.approx(column(finished.out, "loss")[5], abs=1e-4)


# using it


def test_eval_repeats_the_summary(finished, capsys):
    after = summary_of(finished.out)["after"]
    found = evaluated(capsys, finished.out)
    assert (found.pop("data"), found.pop("examples")) == ("test", 32)
    assert found.pop("constant") == summary_of(finished.out)["constant"]
    assert found == pytest.approx(after, abs=1e-6)
    alone = evaluated(capsys, finished.out / "adapter", "--split", "validation")
    assert alone["examples"] == 16
    selected = column(finished.out, "validation/loss")[summary_of(finished.out)["selected_step"]]
    assert alone["loss"] == pytest.approx(selected, abs=1e-6)


def test_predict_texts(finished, capsys):
    texts = ["the film is so good", "bad play"]
    lines = printed(capsys, "predict", finished.out, "--text", texts[0], "--text", texts[1]).splitlines()
    found = [json.loads(line) for line in lines]
    assert [(row["text"], row["prediction"]) for row in found] == list(zip(texts, ["yes", "no"], strict=True))
    for row in found:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert max(row["probabilities"], key=row["probabilities"].get) == row["prediction"]


def test_predict_a_file_into_a_file(finished, tmp_path, capsys):
    rows = finished.rows()[:37]  # more than two batches of 16, the last not full
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": r["text"]}) + "\n" for r in rows))
    output = tmp_path / "found.jsonl"
    args = ["predict", str(finished.out), "--data", str(tmp_path / "texts.jsonl"), "--output", str(output)]
    assert main(args) == 0
    found = lines_of(output)
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    right = sum(a["prediction"] == b["label"] for a, b in zip(found, rows, strict=True))
    assert right > 0.9 * len(rows)
    assert main(args) == 2
    assert lines_of(output) == found


# other tasks and data, and where a run ends or begins again


def test_a_fresh_run_on_separate_files_without_a_test_split(finished, tmp_path, undrawn, capsys):
    world = finished.copy(tmp_path)
    (tmp_path / "out.1").mkdir()
    rows = world.rows()
    first = world.write_rows("first.tsv", rows[:120])
    second = world.write_rows("second.jsonl", rows[120:])
    separate = ("--data.path", "null", "--data.train", str(first), "--data.validation", str(second))
    out = world.trained(*SHORT, *separate, "--fresh")
    printed = capsys.readouterr().out
    assert f"{out}.2" in printed.replace("\n", "")
    assert tensor_bytes(tmp_path / "out.2") == tensor_bytes(finished.out)
    assert "data: 120 train, 40 validation" in printed.splitlines()
    summary = summary_of(out)
    assert summary["held_out"] == {"split": "validation", "examples": 40}
    assert column(out, "before/validation/loss") == {0: summary["before"]["loss"]}
    assert column(out, "after/validation/loss") == {summary["selected_step"]: summary["after"]["loss"]}
    assert list(column(out, "validation/loss")) == [4, 8]


# The mean square error, unlike the accuracy, has no ties.
EARLY = flags(
    "--task regression --data.label rating --train.steps 200 --train.eval_every 5 --train.early_stopping 1"
    " --train.keep 1"
)


def test_regression_in_units_of_the_labels_stops_early_with_the_best_state(world, capsys):
    out = world.trained(*EARLY)
    summary = summary_of(out)
    said = (f"stopped at step {summary['steps']} of 200", "train.early_stopping")
    assert_mentions(capsys.readouterr().out, *said)
    assert_mentions(world.rejected(capsys, *EARLY), "raise train.early_stopping")
    scores = column(out, "validation/mse")
    best = min(scores, key=scores.__getitem__)
    assert summary["steps"] == max(scores) == best + 5 < 200
    assert summary["selected_step"] == best
    assert saved_steps(out) == [best, best + 5]
    assert set(summary["before"]) == {"loss", "mse", "mae"}
    assert summary["after"]["mse"] < 2 < 6 < summary["before"]["mse"]  # the ratings are 3 and -3
    assert summary["after"]["mse"] == pytest.approx(9 * summary["after"]["loss"], rel=0.02)
    lines = printed(
        capsys, "predict", out, "--text", "the film was good", "--text", "the film was bad"
    ).splitlines()
    high, low = [json.loads(line)["prediction"] for line in lines]
    assert low < -1 < 1 < high


def test_tasks_need_a_language_model(finished, tmp_path, capsys):
    write_tasks(tmp_path)
    found = set(tmp_path.iterdir())
    for directory, words in ((finished.out, ["encoder"]), (finished.model, ["bert"])):
        output = ("--output", tmp_path / "tasks.json")
        error = rejected(capsys, "eval", directory, "--tasks", "boolq", "--data_root", tmp_path, *output)
        assert_mentions(error, *words, "not a language model")
    assert set(tmp_path.iterdir()) == found
