"""GLUE by name, in whole runs on synthetic files of GLUE's layout: metrics, and the state they select."""

import json

import numpy as np
import pytest
import scipy.stats

from loraplus_jax.cli.commands import main
from loraplus_jax.inference import predict
from loraplus_jax.sweep import run as sweeping

from .runs import SHORT, column, evaluated, flags, lines_of, printed, summary_of
from .test_sweep import TINY

pytestmark = pytest.mark.usefixtures("cache")


def write_lines(directory, name, lines):
    directory.mkdir(exist_ok=True, parents=True)
    (directory / name).write_text("\n".join(lines) + "\n")


def write_cola(world):
    """CoLA's files: acceptable is what is good; quotes that do not close."""
    rows = world.rows()
    lines = [f'gj04\t{int(row["label"] == "yes")}\t\t"{row["text"]}' for row in rows]
    write_lines(world.directory / "glue/CoLA", "train.tsv", lines[:120])
    write_lines(world.directory / "glue/CoLA", "dev.tsv", lines[120:])
    tests = [f"{n}\t{row['text']}" for n, row in enumerate(rows[:11])]
    write_lines(world.directory / "glue/CoLA", "test.tsv", ["index\tsentence", *tests])


def write_stsb(world):
    """STS-B's files: what is good scores higher."""
    header = ["index", "genre", "sentence1", "sentence2", "score"]
    lines = [
        f"{n}\tnews\t{row['text']}\ta film\t{3 * (row['label'] == 'yes') + n % 20 / 10:.3f}"
        for n, row in enumerate(world.rows())
    ]
    for name, part in {"train.tsv": lines[:120], "dev.tsv": lines[120:]}.items():
        write_lines(world.directory / "glue/STS-B", name, ["\t".join(header), *part])
    tests = [line.rpartition("\t")[0] for line in lines[:7]]
    write_lines(world.directory / "glue/STS-B", "test.tsv", ["\t".join(header[:-1]), *tests])


def glue(world, name):
    return ("--data.path", f"glue/{name}", "--data.root", str(world.directory / "glue"))


@pytest.mark.slow
def test_classification_selects_by_its_own_metric(world, capsys):
    write_cola(world)
    out = world.trained(*glue(world, "cola"), "--train.steps", "30", "--train.eval_every", "10")
    assert "data: 108 train, 12 validation, 40 test" in capsys.readouterr().out.splitlines()
    summary = summary_of(out)
    assert set(summary["after"]) == {"loss", "accuracy", "matthews"}
    scores = column(out, "validation/matthews")
    # Among ties the latest counts.
    assert summary["selected_step"] == max(scores, key=lambda step: (scores[step], step))
    dev = world.directory / "glue/CoLA/dev.tsv"
    assert evaluated(capsys, out, "--data", dev)["matthews"] == summary["after"]["matthews"]
    # Matthews' coefficient from the counts of single predictions.
    texts = [line.split("\t") for line in dev.read_text().splitlines()]
    answers = printed(capsys, "predict", out, "--data", dev).splitlines()
    predicted = [json.loads(line)["prediction"] for line in answers]
    pairs = list(zip(predicted, [row[1] for row in texts], strict=True))
    tp, fp, fn, tn = (pairs.count(pair) for pair in [("1", "1"), ("1", "0"), ("0", "1"), ("0", "0")])
    below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert summary["after"]["matthews"] == pytest.approx((tp * tn - fp * fn) / below if below else 0.0)


@pytest.mark.slow
def test_a_sweep_reports_the_tasks_metric(world, monkeypatch):
    write_cola(world)
    monkeypatch.setattr(sweeping, "draw_figures", lambda *_: None)
    monkeypatch.setattr(sweeping, "write_report", lambda directory, report, page=False: None)
    few = flags("--sweep.learning_rates [5e-3] --sweep.lr_ratios [4]")
    args = [*TINY, *few, *glue(world, "cola")]
    assert main(["sweep", str(world.config), "--output_dir", str(world.out), *args]) == 0
    rows = lines_of(world.out / "metrics.jsonl")
    assert rows
    assert all(-1 <= row["matthews"] <= 1 for row in rows)
    assert len({row["matthews"] for row in rows}) > 1


@pytest.mark.slow
def test_regression_on_pairs_by_correlation(world, capsys):
    write_stsb(world)
    out = world.trained(*glue(world, "stsb"), *SHORT, "--task", "regression", "--data.max_length", "16")
    summary = summary_of(out)
    assert set(summary["after"]) == {"loss", "mse", "mae", "pearson", "spearman"}
    scores = column(out, "validation/pearson")
    assert summary["selected_step"] == max(scores, key=lambda step: (scores[step], step))
    dev = world.directory / "glue/STS-B/dev.tsv"
    found = [row["prediction"] for row in predict.predict_run(out, data=str(dev))]
    assert main(["predict", str(out), "--text", "alone"]) == 2
    assert "text pairs" in capsys.readouterr().err
    labels = [float(line.rpartition("\t")[2]) for line in dev.read_text().splitlines()[1:]]
    assert summary["after"]["pearson"] == pytest.approx(scipy.stats.pearsonr(found, labels)[0], abs=1e-5)
    assert summary["after"]["spearman"] == pytest.approx(scipy.stats.spearmanr(found, labels)[0], abs=1e-5)
