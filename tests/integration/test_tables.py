"""A table of `benchmarks/tables.py` from a recipe to its JSON file, on the tiny world."""

import json
from pathlib import Path

import pytest

from .runs import flags

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.slow]
SMALL = flags(
    "--data.max_length 12 --train.steps 8 --train.batch_size 8 --train.eval_batch_size 32"
    " --optimizer.warmup_steps 1 --sweep.report_seeds 2 --sweep.seeds [0,1] --sweep.learning_rates [2e-3,5e-3]"
    " --sweep.lr_ratios [4] --sweep.curve_points 2 --train.epochs null --sweep.widen 0"
)


def test_a_table_from_a_recipe_to_its_file_and_resumed(world, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import tables

    tiny = tables.Study("", tables.LAMBDA)  # whose data and model are the world's
    monkeypatch.setitem(tables.STUDIES, "lambda", {"tiny": tiny})
    out = world.directory / "tables"
    command = ["lambda", "--recipe", str(world.config), "--output_dir", str(out), *SMALL]
    results = ["--results", str(world.directory / "results")]
    tables.main([*command, *results])
    content = (world.directory / "results/lambda.json").read_text()
    (report,) = json.loads(content)["studies"].values()
    assert report["protocol"]["hours"] > 0
    assert [method["label"] for method in report["methods"].values()] == ["λ = 1 (LoRA)", "λ = 4"]
    for method in report["methods"].values():
        assert len(method["search"]) == 2  # each setting at its last comparison, the mean over its seeds
        assert len(method["runs"]) == 2
    tried = {
        name: {(row["learning_rate"], row["lr_ratio"]) for row in method["search"]}
        for name, method in report["methods"].items()
    }
    assert tried == {"lora": {(2e-3, 1.0), (5e-3, 1.0)}, "lambda_4": {(1e-3, 4.0), (2.5e-3, 4.0)}}
    finished = {path: path.stat().st_mtime_ns for path in out.glob("**/checkpoints/*")}
    tables.main([*command, *results])
    assert finished == {path: path.stat().st_mtime_ns for path in out.glob("**/checkpoints/*")}
    assert (world.directory / "results/lambda.json").read_text() == content
