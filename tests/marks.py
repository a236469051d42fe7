"""Marks cases of a large table: `slow` ones run in `.ci/run`, `long` ones in `.ci/run --all`."""

import pytest


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def diagonal(first, second, *, also=()):
    """All pairs; not long is a diagonal, on which every value of either axis stands, and the pairs of `also`."""
    first, second = list(first), list(second)
    return [
        (a, b) if i % len(second) == j or j % len(first) == i or (a, b) in also else long(a, b)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def every(step, values, start=0):
    """All values; not long is every `step`-th from `start` on."""
    return [value if n % step == start else long(value) for n, value in enumerate(values)]
