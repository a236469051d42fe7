"""The report of a sweep, from rows by hand."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.sweep import report
from loraplus_jax.sweep.settings import SweepRun

LEAST = "model: {path: m}\ndata: {path: d}\noutput_dir: o\n"


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    config = tmp_path_factory.mktemp("report") / "config.yaml"
    config.write_text(LEAST)
    return lambda *overrides: parse_settings(config, overrides, SweepRun)


def numbers(low, high):
    """One to three values that differ by 10 % or more, so that the rates between them differ in three digits."""
    steps = st.lists(st.integers(0, 20), min_size=1, max_size=3, unique=True)
    return steps.map(lambda found: [float(f"{low * (high / low) ** (n / 20):.3g}") for n in found])


@settings(deadline=None, max_examples=30)
@given(numbers(1e-5, 1e-2), st.one_of(numbers(1.2, 32.0), numbers(0.05, 0.8)))
def test_every_best_value_at_an_edge_has_an_option_that_widens_the_range(parsed, rates, ratios):
    options = {"sweep.learning_rates": rates, "sweep.lr_ratios": ratios}
    run = parsed(*(f"--{name}={value}" for name, value in options.items()))
    for best in run.trials:
        found = report.make_report(run, [], {best.arm: best}, 8, "accuracy", {})
        for line in found["at_the_edge"]:
            ((name, option, wider),) = re.findall(r": (\w+) .* --([\w.]+) (\[.*\])", line)
            widened = parsed(*(f"--{n}={v}" for n, v in {**options, option: wider}.items()))
            tried = [getattr(trial, name) for trial in widened.trials if trial.arm == best.arm]
            assert min(tried) < getattr(best, name) < max(tried)


@pytest.mark.parametrize("name", ["report.html", "methods.html"])
def test_pages_fit_a_phone(name):
    page, style = ((Path(report.__file__).parent / file).read_text() for file in (name, "page.css"))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table>") == page.count('<div class="wide"><table>') > 0
    assert ".wide { overflow-x: auto; }" in style
