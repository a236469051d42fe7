"""Metrics that need all predictions of a split, since they are not means over its rows."""

import math

import numpy as np


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, the harmonic mean of precision and recall: `2 TP / (2 TP + FP + FN)`; 0 without any."""
    correct = np.sum((predicted == 1) & (labels == 1))
    total = np.sum(predicted == 1) + np.sum(labels == 1)
    return float(2 * correct / total) if total else 0.0


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 of the classes that are predicted or in the labels; 0 without any."""
    classes = np.union1d(predicted, labels)
    return float(np.mean([f1(predicted == c, labels == c) for c in classes])) if len(classes) else 0.0


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation, from -1 to 1; 0 if either is constant.

    That of two classes' indices is Matthews' correlation coefficient.
    """
    return _correlation("pearsonr", predicted, labels)


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's correlation of ranks, from -1 to 1; 0 if either is constant."""
    return _correlation("spearmanr", predicted, labels)


def _correlation(name: str, predicted: np.ndarray, labels: np.ndarray) -> float:
    import scipy.stats  # importing it takes longer than all else that a command without these metrics imports

    if not np.isfinite(predicted).all():
        return math.nan
    if len(labels) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return 0.0
    columns = predicted.astype(np.float64), labels.astype(np.float64)
    return float(getattr(scipy.stats, name)(*columns).statistic)


SPLIT_METRICS = {
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": pearson,
    "pearson": pearson,
    "spearman": spearman,
}
"""Function `(predicted (N,), labels (N,)) -> value` by name; of class indices (of two classes but for macro_f1) or
of numbers."""
