"""The sweep on the tiny world: members against their single runs, one compilation, interruptions, the report."""

import json

import pytest

from loraplus_jax.train.cli import main

TINY = [
    *("--sweep.learning_rates", "[2e-3,5e-3]", "--sweep.lr_ratios", "[2,4]", "--sweep.report_seeds", "2"),
    *("--train.steps", "16", "--train.eval_every", "4", "--sweep.rungs", "[0.25,0.5]", "--sweep.keep", "0.5"),
]


def run_sweep(world, *overrides, out=None):
    return main(["sweep", str(world.config), "--output_dir", str(out or world.out), *TINY, *overrides])


def report_of(out):
    return json.loads((out / "report.json").read_text())


@pytest.mark.slow
def test_a_sweep(world, capsys):
    assert run_sweep(world) == 0
    print(capsys.readouterr().out)
    print(json.dumps(report_of(world.out), indent=1))
