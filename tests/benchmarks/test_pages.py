"""The figures of the pages are those of the JSON files that the benchmarks wrote."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from loraplus_jax.sweep.statistics import ratio_interval, t_interval

DOCS = Path(__file__).parents[2] / "docs"


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(page):
    """The tables of a page, each as a list of dicts."""
    for block in (DOCS / page).read_text(encoding="utf-8").split("\n\n"):
        if block.startswith("| "):
            head, _, *rows = map(cells, block.splitlines())
            yield [dict(zip(head, row, strict=True)) for row in rows]


def figures(row, columns):
    """The values of some columns but for names, which the page spells out."""
    return [str(row.get(name, "-")) for name in columns if name not in ("run", "what", "over")]


def test_the_rows_of_the_performance_page_are_those_of_the_files(benchmarks):
    kept = [json.loads(path.read_text()).get("rows", []) for path in (benchmarks / "results").glob("*.json")]
    compared = 0
    for table in tables("performance.md"):
        table = [{name.replace("loraplus_jax", "here"): cell for name, cell in row.items()} for row in table]
        files = [rows for rows in kept if rows and table[0].keys() <= set().union(*rows)]
        known = [figures(row, table[0]) for rows in files for row in rows]
        compared += bool(known)
        assert not known or all(figures(row, table[0]) in known for row in table)
    assert compared == 8


def test_the_results_page_is_what_its_files_give(benchmarks):
    import results_page

    page = (DOCS / "results.md").read_text(encoding="utf-8")
    tables = results_page.read()
    assert results_page.filled(page, tables) == page
    for studies in tables.values():
        for title, study in studies.items():
            assert f"{study['methods']['lora']['loss']:.4f}" in page, title


def test_no_best_rate_of_the_summary_is_at_the_edge_of_its_range(benchmarks):
    import results_page

    page = " ".join((DOCS / "results.md").read_text(encoding="utf-8").split())
    assert "no best rate of LoRA, LoRA+ or full fine-tuning is at the edge of its range" in page
    for title, study in results_page.data_sets(results_page.read()).items():
        for name in results_page.LINES.keys() & study["methods"].keys():
            assert not study["methods"][name]["at_the_edge"], (title, name)


def report(gains, ratios, confidence=0.95):
    """A study of which `overall` reads the intervals of LoRA+ against LoRA."""
    measures = {"test_metric": t_interval(gains, confidence)}
    measures["steps_ratio"] = ratio_interval(ratios, [1.0] * len(ratios), confidence)
    return {
        "protocol": {"metric": "accuracy", "confidence": confidence},
        "methods": {"lora_plus": {"against_lora": measures}},
    }


def test_the_mean_over_data_sets_uses_all_their_seeds():
    from results_page import overall

    first, second = report([0.01, 0.03, 0.02], [2.0, 4.0, 8.0]), report([0.05, 0.01, 0.03, 0.07], [4.0, 16.0])
    # Variances of the means 1e-4/3 and (20/3)e-4/4, so 6/3 e-4 together, with 4e-8 / (1/9/2 + 25/9/3)e-8 degrees.
    gain = overall([[first], [second]], "test_metric", 0.95)
    degrees = 4 / (1 / 18 + 25 / 27)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(2e-4) / 2
    assert [gain[n] for n in ("low", "mean", "high")] == pytest.approx([0.03 - half, 0.03, 0.03 + half])
    # Geometric means 4 and 8.
    assert overall([[first], [second]], "steps_ratio")["mean"] == pytest.approx(math.sqrt(32))
    # A data set's two studies count half each: means 0.02 and 0.04 beside 0.02, each with its share squared.
    again = overall([[first], [first, second]], "test_metric", 0.95)
    variances = np.array([1 / 3 / 4, 1 / 3 / 16, 5 / 3 / 16]) * 1e-4
    error = variances.sum() ** 0.5
    quantile = stats.t.ppf(0.975, error**4 / (variances**2 / [2, 2, 3]).sum())
    assert (again["mean"], again["high"]) == pytest.approx((0.025, 0.025 + quantile * error))
    # The confidence of a study's own interval, which the number of its methods decides, changes nothing.
    corrected = report([0.05, 0.01, 0.03, 0.07], [4.0, 16.0], 0.99)
    assert overall([[first], [corrected]], "test_metric", 0.95) == pytest.approx(gain)


def test_steps_are_only_counted_on_curves_with_enough_points():
    from results_page import counts_steps

    runs = [{"diverged": False, "curve": [[0, 1.0], [1, 0.0]]}]
    study = {"methods": {"lora": {"runs": runs}}}
    assert not counts_steps(study)
    runs[0]["curve"] = [[n, 1.0 - n] for n in range(4)]
    assert not counts_steps(study)
    runs[0]["curve"].append([4, 0.0])
    assert counts_steps(study)


def test_significant_differences_are_bold(benchmarks):
    from results_page import significant

    found = [
        significant({"mean": 1.5, "low": low, "high": high}, ".1f", 1.0) for low, high in ((1.2, 2), (0.5, 2))
    ]
    assert found == ["**1.5 [1.2, 2.0]**", "1.5 [0.5, 2.0]"]
