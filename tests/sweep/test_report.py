"""The report of a sweep and its pictures, from rows by hand."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from loraplus_jax.sweep import report
from loraplus_jax.sweep.figures import heat_map, heat_map_cells


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


@pytest.mark.parametrize("name", ["report.html", "methods.html"])
def test_pages_fit_a_phone(name):
    page, style = ((Path(report.__file__).parent / file).read_text() for file in (name, "page.css"))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table>") == page.count('<div class="wide"><table>') > 0
    assert ".wide { overflow-x: auto; }" in style


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


def test_a_cell_is_dropped_where_one_of_its_settings_did_not_diverge():
    cells, dropped = heat_map_cells([*SEARCH, row(1e-2, 4.0, 5, 0.9, alpha=4.0)])
    assert cells[1e-2, 4e-2] is None
    assert dropped == {(1e-2, 1e-2): 5, (1e-2, 4e-2): 5}


@pytest.mark.filterwarnings("ignore")
def test_the_legend_covers_no_cell_and_the_title_names_the_last_rung():
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    best = {"learning_rate": 1e-3, "lr_ratio": 4.0}
    chosen = {"lora": {"learning_rate": 1e-3, "lr_ratio": 1.0}, "lora_plus": best}
    heat_map(axes, {"search": SEARCH, "chosen": chosen, "protocol": {"steps": 40}})
    figure.canvas.draw()
    assert "40 of 40" in axes.get_title()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    texts = [text.get_text() for text in axes.texts]
    assert {".300", ".400", "5"} <= set(texts)
    keys = [text.get_text() for text in legend.get_texts()]
    assert keys == ["dropped after this many steps", "diverged", "LoRA, selected", "LoRA+, selected"]
    plt.close(figure)
