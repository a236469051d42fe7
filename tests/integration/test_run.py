"""Whole runs of the command line on the tiny world, in this process."""

import json
import math
import re

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from loraplus_jax import jit_step, load_adapter
from loraplus_jax.cli.commands import main
from loraplus_jax.training import console
from loraplus_jax.training import setup as prepare
from loraplus_jax.training.trainer import Trainer

from ..marks import long
from ..messages import assert_mentions
from .runs import (
    SHORT,
    column,
    evaluated,
    flags,
    interrupted,
    lines_of,
    printed,
    result_of,
    rows_of,
    saved_steps,
    summary_of,
    tensor_bytes,
    tensors_of,
    undisturbed,
)

pytestmark = pytest.mark.usefixtures("cache")

RATING = flags("--task regression --data.label rating")


@pytest.fixture(scope="module")
def short(first_world, tmp_path_factory, cache):
    """A short run that others are compared with."""
    return undisturbed(first_world, tmp_path_factory, SHORT)


# what a run leaves


def test_output_files_of_a_run(finished):
    names = {path.name for path in finished.out.iterdir()}
    files = {"config.yaml", "loss.png", "metrics.jsonl", "summary.json"}
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


def test_the_config_repeats_the_run_bitwise_and_nothing_is_compiled_again(finished, world, cache):
    content = yaml.safe_load((finished.out / "config.yaml").read_text())
    assert content["optimizer"]["b2"] == 0.999
    assert content["lora"]["target_modules"] == ["query", "value", "up"]
    compiled = {path.name for path in (cache / "xla").glob("*-cache")}
    assert any("step" in name for name in compiled)
    assert main(["train", str(finished.out / "config.yaml"), "--output_dir", str(world.out)]) == 0
    assert tensor_bytes(world.out) == tensor_bytes(finished.out)
    assert {path.name for path in (cache / "xla").glob("*-cache")} == compiled


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
    assert sum(line.startswith("before: accuracy 0.") and line.endswith("(test)") for line in lines) == 1
    # The estimate comes before the first step.
    names = [line.split(":")[0] for line in lines if line.startswith(("estimate:", "before:", "step "))]
    assert names == ["estimate", "before", "step 20", "step 40"]
    assert_mentions(next(line for line in lines if line.startswith("estimate:")), "40 steps", "3 evaluations")
    assert sum(line.startswith("after:  accuracy ") for line in lines) == 1


def test_a_log_file_gets_lines_between_and_during_evaluations(world, short, capsys, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_PER_LINE", 0.0)
    out = world.trained(*SHORT)
    lines = [
        line for line in capsys.readouterr().out.splitlines() if re.search(r"/s, \d+:\d\d:\d\d left$", line)
    ]
    assert [line.split(": ")[0] for line in lines] == [
        "test batch 1 of 2",
        *(f"step {step} of 8" for step in range(1, 9)),
        "test batch 1 of 2",
    ]
    assert rows_of(out) == rows_of(short)
    first, second = (float(re.search(r"loss (\d\.\d{4}), ", line)[1]) for line in lines[1:3])
    assert (first + second) / 2 == pytest.approx(column(out, "loss")[2], abs=1e-4)


# using it


def test_eval_repeats_the_summary(finished, capsys):
    after = summary_of(finished.out)["after"]
    found = evaluated(capsys, finished.out)
    assert (found.pop("data"), found.pop("examples")) == ("test", 32)
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


# methods


@pytest.mark.slow
def test_lora_is_bitwise_lora_plus_with_ratio_1(world, short):
    lora = world.trained(*SHORT, "--method", "lora", out=world.directory / "lora")
    plus = world.trained(*SHORT, "--lora.lr_ratio", "1", out=world.directory / "plus")
    assert tensor_bytes(lora) == tensor_bytes(plus)
    assert rows_of(lora) == rows_of(plus)
    assert column(lora, "rate/a") == column(lora, "rate/b")
    assert load_adapter(lora / "adapter").config.lr_ratio == 1  # pyright: ignore
    assert tensor_bytes(lora) != tensor_bytes(short)
    assert summary_of(lora)["before"] == summary_of(short)["before"]


@pytest.mark.slow
def test_full_trains_every_weight_and_is_used_like_an_adapter(world, capsys):
    out = world.trained(*SHORT, "--method", "full")
    summary = summary_of(out)
    assert summary["trainable"] == summary["total"]
    tensors = tensors_of(out)
    assert not any(name.startswith("lora") for name in tensors)
    old = load_file(world.model / "model.safetensors")
    for ours, theirs in [("query", "attention.self.query"), ("up", "intermediate.dense")]:
        name = next(name for name in tensors if name.endswith(f"{ours}/kernel"))
        moved = tensors[name][0].T - old[f"encoder.layer.0.{theirs}.weight"]
        assert np.all(moved != 0)
    found = evaluated(capsys, out, "--data", world.data)
    assert (found["data"], found["examples"]) == (str(world.data), 160)
    assert found["accuracy"] == pytest.approx(summary["after"]["accuracy"], abs=0.2)


# the same numbers, however they are computed


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        "--mesh.data 8 --train.accumulate 4",
        *(long("--mesh.data 8"), long("--train.accumulate 4"), long("--model.unroll true")),
    ],
)
def test_the_same_run_cut_otherwise(world, short, args, monkeypatch):
    seen = []
    monkeypatch.setattr(
        prepare, "jit_step", lambda *a, **options: seen.append(options) or jit_step(*a, **options)
    )
    out = world.trained(*SHORT, *flags(args))
    # The results are the same, so the step itself is checked.
    assert seen[0]["accumulate"] == (4 if "--train.accumulate" in args else 1)
    expected = tensors_of(short)
    for name, tensor in tensors_of(out).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-5, err_msg=name)
    assert column(out, "loss") == pytest.approx(column(short, "loss"), abs=1e-5)
    assert column(out, "validation/loss") == pytest.approx(column(short, "validation/loss"), abs=1e-5)
    assert summary_of(out)["devices"].startswith("8 x" if "8" in args else "1 x")


@pytest.mark.slow
def test_bf16_runs_near_float32_with_float32_adapters(world, short):
    out = world.trained(*SHORT, "--model.dtype", "bfloat16", "--model.param_dtype", "bfloat16")
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {np.dtype("float32")}
    assert column(out, "loss") == pytest.approx(column(short, "loss"), abs=0.05)
    assert column(out, "loss") != column(short, "loss")


@pytest.mark.slow
def test_the_seed_decides(world, short):
    out = world.trained(*SHORT, "--seed", "1")
    assert tensor_bytes(out) != tensor_bytes(short)
    assert column(out, "test/loss") != column(short, "test/loss")


# other tasks and data


@pytest.mark.slow
def test_regression_in_units_of_the_labels(world, capsys):
    out = world.trained(*RATING, "--train.select", "last")
    summary = summary_of(out)
    assert set(summary["before"]) == {"loss", "mse", "mae"}
    assert summary["after"]["mse"] < 2 < 6 < summary["before"]["mse"]  # the ratings are 3 and -3
    assert summary["after"]["mse"] == pytest.approx(9 * summary["after"]["loss"], rel=0.02)
    lines = printed(capsys, "predict", out, "--text", "a good film", "--text", "a bad film").splitlines()
    high, low = [json.loads(line)["prediction"] for line in lines]
    assert low < -1 < 1 < high


def test_separate_files_without_a_test_split(world, capsys):
    rows = world.rows()
    first = world.write_rows("first.tsv", rows[:120])
    second = world.write_rows("second.jsonl", rows[120:])
    separate = ("--data.path", "null", "--data.train", str(first), "--data.validation", str(second))
    out = world.trained(*SHORT, *separate)
    assert "data: 120 train, 40 validation" in capsys.readouterr().out.splitlines()
    summary = summary_of(out)
    assert summary["held_out"] == {"split": "validation", "examples": 40}
    assert column(out, "before/validation/loss") == {0: summary["before"]["loss"]}
    assert column(out, "after/validation/loss") == {summary["selected_step"]: summary["after"]["loss"]}
    assert list(column(out, "validation/loss")) == [4, 8]


@pytest.mark.slow
def test_pairs_of_texts(world, capsys):
    rows = [{"a": row["text"], "b": "a film", "label": row["label"]} for row in world.rows()]
    pairs = world.write_rows("pairs.csv", rows)
    out = world.trained(*SHORT, "--data.path", str(pairs), "--data.text", "a", "--data.text_pair", "b")
    assert len(printed(capsys, "predict", out, "--data", pairs).splitlines()) == 160
    assert main(["predict", str(out), "--text", "alone"]) == 2
    assert "text pairs" in capsys.readouterr().err


# how long, and which state is kept


# The mean square error, unlike the accuracy, has no ties.
EARLY = (*RATING, *flags("--train.steps 200 --train.eval_every 5 --train.early_stopping 1 --train.keep 1"))


@pytest.mark.slow
def test_early_stopping_and_the_best_state(world, capsys):
    out = world.trained(*EARLY)
    assert_mentions(
        capsys.readouterr().out, f"stopped at step {summary_of(out)['steps']} of 200", "train.early_stopping"
    )
    assert_mentions(world.rejected(capsys, *EARLY), "raise train.early_stopping")
    scores = column(out, "validation/mse")
    best = min(scores, key=scores.__getitem__)
    summary = summary_of(out)
    assert summary["steps"] == max(scores) == best + 5 < 200
    assert summary["selected_step"] == best
    assert saved_steps(out) == [best, best + 5]
    last = world.trained(*EARLY, "--train.select", "last", out=world.directory / "last")
    assert rows_of(last)[:-1] == rows_of(out)[:-1]
    assert summary_of(last)["selected_step"] == summary["steps"]
    assert tensor_bytes(last) != tensor_bytes(out)


# interrupted, and started over

NOISY = flags(
    "--model.dropout 0.1 --model.head_dropout 0.1 --lora.dropout 0.1 --train.steps 20 --train.eval_every 8"
    " --train.log_every 4 --optimizer.schedule linear --optimizer.weight_decay 0.01"
)


def test_an_interrupted_run_resumes_and_ends_bit_identical(world, capsys):
    straight = world.trained(*NOISY, out=world.directory / "straight")
    interrupted(world, 13, *NOISY)
    assert "interrupted" in capsys.readouterr().err
    assert not (world.out / "summary.json").exists()
    with (world.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    assert world.train(*NOISY) == 0
    assert_mentions(capsys.readouterr().out, "step 8 of 20", "for 12 steps, plus evaluations")
    assert result_of(world.out) == result_of(straight)


@pytest.mark.slow
def test_a_run_that_lacks_only_its_end_trains_no_more(world, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert world.train(*SHORT) == 130
    monkeypatch.setattr("loraplus_jax.training.trainer.shard_batch", lambda batch, mesh: batch)
    assert world.train(*SHORT) == 0
    assert list(column(world.out, "loss")) == [2, 4, 6, 8]


def test_fresh_renames_the_older_run(finished, tmp_path, capsys):
    world = finished.copy(tmp_path)
    (tmp_path / "out.1").mkdir()
    assert world.train(*SHORT, "--fresh") == 0
    assert f"{world.out}.2" in capsys.readouterr().out.replace("\n", "")
    assert tensor_bytes(tmp_path / "out.2") == tensor_bytes(finished.out)
    assert summary_of(world.out)["steps"] == 8


# the compilation cache


@pytest.mark.slow
def test_without_the_compilation_cache_nothing_is_kept(world, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPLUS_CACHE", str(tmp_path / "cache"))
    world.trained("--train.steps", "3", "--train.compilation_cache", "false")
    assert not (tmp_path / "cache").exists()
