"""The report of a sweep and its pictures, from rows by hand."""

import re

from loraplus_jax.sweep import report
from loraplus_jax.sweep.figures import heat_map_cells


def test_every_best_value_at_an_edge_names_the_option_that_widens_the_range(parsed):
    options = {
        "learning_rates": [1e-3, 2e-3, 4e-3],
        "lr_ratios": [2.0, 4.0],
        "lora_learning_rates": [1e-3, 8e-3],
    }
    run = parsed(*(f"--sweep.{name}={value}" for name, value in options.items()))
    for best in run.trials:
        lines = report.make_report(run, [], {best.arm: best}, 8, "accuracy", {})["at_the_edge"]
        found = {name for line in lines for name in re.findall(r"--sweep\.(\w+)", line)}
        tried = {"learning_rates": best.learning_rate, "lr_ratios": best.lr_ratio}
        if best.arm == "lora":
            tried = {"lora_learning_rates": best.learning_rate}
        ends = {name for name, value in tried.items() if value in (min(options[name]), max(options[name]))}
        assert found == ends


def row(rate, ratio, step, loss, alpha=16.0):
    return {"learning_rate": rate, "lr_ratio": ratio, "alpha": alpha, "rank": 8, "step": step, "loss": loss}


SEARCH = [
    row(1e-3, 1.0, 5, 0.6),
    row(1e-3, 4.0, 5, 0.5),
    row(1e-2, 1.0, 5, 0.7),
    row(1e-2, 4.0, 5, None),
    row(1e-3, 1.0, 40, 0.4),
    row(1e-3, 4.0, 40, 0.3),
]


def test_cells_are_those_of_the_last_rung():
    cells, dropped = heat_map_cells(SEARCH)
    assert cells == {(1e-3, 1e-3): 0.4, (1e-3, 4e-3): 0.3, (1e-2, 1e-2): None, (1e-2, 4e-2): None}
    assert dropped == {(1e-2, 1e-2): 5}
