"""What the scripts of this folder share."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts of a folder see that folder only

from common import parse_options as parse_options
from common import report as report


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Of log value on log width, by least squares.

    >>> round(slope([1, 10, 100], [2.0, 0.2, 0.02]), 6)
    -1.0
    """
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def plain(values: np.ndarray) -> list[Any]:
    """Nested lists for JSON, which has no infinity: None stands for it."""
    return np.where(np.isfinite(values), values, None).tolist()
