"""The scripts of `benchmarks/`, importable as they import each other."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The directory, in front of the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return BENCHMARKS
