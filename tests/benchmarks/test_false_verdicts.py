"""`benchmarks/false_verdicts.py`: how often a report finds a difference that does not exist."""

import numpy as np


def test_few_reports_find_a_difference_that_does_not_exist(benchmarks):
    import false_verdicts

    rng = np.random.default_rng(0)
    found = np.mean([false_verdicts.two_arms(3, "normal", rng) for _ in range(500)], axis=0)
    by_loss, by_anything, uncorrected = found
    assert by_loss <= by_anything <= 0.06 < uncorrected
