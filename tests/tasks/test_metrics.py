"""Metrics of all predictions against literals and formulas of their own."""

import math

import numpy as np
import pytest

from loraplus_jax.tasks.encoder import EncoderTask
from loraplus_jax.tasks.metrics import SPLIT_METRICS

from ..refusals import refusals


def counts(tp, fp, fn, tn):
    """Predictions and labels with these counts."""
    predicted = np.repeat([1, 1, 0, 0], [tp, fp, fn, tn])
    return predicted, np.repeat([1, 0, 1, 0], [tp, fp, fn, tn])


def test_f1_and_matthews_by_hand():
    predicted, labels = counts(6, 1, 2, 3)
    assert SPLIT_METRICS["f1"](predicted, labels) == pytest.approx(12 / 15)
    # (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))
    assert SPLIT_METRICS["matthews"](predicted, labels) == pytest.approx(16 / math.sqrt(7 * 8 * 4 * 5))


def test_macro_f1_by_hand():
    predicted, labels = np.array([0, 0, 1, 1, 1, 3]), np.array([0, 0, 0, 1, 2, 2])
    # F1 of 0: 2 right of 2 and of 3; of 1: 1 of 3 and of 1; of 2 and 3 none.
    assert SPLIT_METRICS["macro_f1"](predicted, labels) == pytest.approx((4 / 5 + 2 / 4 + 0 + 0) / 4)
    predicted, labels = counts(6, 1, 2, 3)
    assert SPLIT_METRICS["macro_f1"](predicted, labels) == pytest.approx((12 / 15 + 6 / 9) / 2)


def test_correlations_by_hand():
    labels, predicted = np.array([0.0, 1.0, 2.0, 5.0]), np.array([1.0, 3.0, 2.0, 10.0], np.float32)
    # Deviations from the means 2 and 4: (-2, -1, 0, 3) and (-3, -1, -2, 6).
    assert SPLIT_METRICS["pearson"](predicted, labels) == pytest.approx(25 / math.sqrt(14 * 50))
    # Ranks 1 3 2 4 against 1 2 3 4: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15).
    assert SPLIT_METRICS["spearman"](predicted, labels) == pytest.approx(0.8)


@pytest.mark.parametrize("name", SPLIT_METRICS)
def test_what_is_undefined_is_0_and_what_is_not_finite_no_number(name):
    zeros, labels = np.zeros(4), np.array([0.0, 1.0, 0.0, 1.0])
    assert SPLIT_METRICS[name](zeros[:0], labels[:0]) == 0
    if name == "macro_f1":
        return
    assert SPLIT_METRICS[name](zeros, labels) == 0
    if name != "f1":  # of indices
        assert math.isnan(SPLIT_METRICS[name](np.array([0, 1, math.inf, math.nan]), labels))


def test_ranks_with_ties():
    rng = np.random.default_rng(0)
    labels = rng.integers(6, size=100) / 2
    predicted = (labels + rng.normal(size=100)).round(1)

    def ranks(values):
        return np.array([np.mean(np.flatnonzero(np.sort(values) == value)) for value in values])

    expected = np.corrcoef(ranks(predicted), ranks(labels))[0, 1]
    assert SPLIT_METRICS["spearman"](predicted, labels) == pytest.approx(expected)
    expected = np.corrcoef(predicted, labels)[0, 1]
    assert SPLIT_METRICS["pearson"](predicted, labels) == pytest.approx(expected)


def with_metric(metric, *names):
    return lambda: EncoderTask(kind="classification", names=names, metrics=(metric,))


test_metrics_that_do_not_fit_the_task = refusals(
    (with_metric("pearson", "a", "b"), "classification", "f1", "matthews", "pearson"),
    (with_metric("f1", "a", "b", "c"), "data.metrics", "f1", "two classes", "a", "b", "c", "macro_f1"),
)
