"""What the reproductions share: passing ranges, slopes, pictures, and the files in `benchmarks/results/paper`."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import RESULTS, report


class Check(NamedTuple):
    """A found number and the range that it must lie in, ends included."""

    found: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        return self.low <= self.found <= self.high


def numbers(values: Any) -> Any:
    """An array as nested lists for JSON, which has no infinity: None stands for it."""
    if isinstance(values, float | int):
        return values if np.isfinite(values) else None
    return [numbers(value) for value in (values.tolist() if isinstance(values, np.ndarray) else values)]


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Of log value on log width, by least squares.

    >>> round(slope([1, 10, 100], [2.0, 0.2, 0.02]), 6)
    -1.0
    """
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def finish(name: str, rows: Sequence[Mapping[str, Any]], checks: Mapping[str, Check], **more: Any) -> int:
    """Prints rows and checks, writes `results/paper/NAME.json`, and gives the exit status: 1 if a check fails."""
    found = {
        key: {"found": check.found, "range": numbers(check[1:]), "passed": check.passed}
        for key, check in checks.items()
    }
    report(f"paper/{name}", rows, unprinted={"checks": found, **more})
    for key, check in checks.items():
        verdict = "pass" if check.passed else "FAIL"
        print(f"{verdict}  {key}: {check.found:.4g}, to lie in [{check.low:.4g}, {check.high:.4g}]")
    return int(not all(check.passed for check in checks.values()))


def figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure without a screen, and its axes row by row."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    size = (5 * columns, 4 * rows)
    drawn, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return drawn, axes.ravel()


def save(drawn: Any, name: str) -> None:
    """Into `results/paper/NAME.png`."""
    path = RESULTS / "paper" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)
    print(path)
