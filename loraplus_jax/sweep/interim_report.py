"""A report that may end before its last seed, at numbers of seeds fixed in advance (`sweep.interim_seeds`).

The report trains its seeds in groups. After each group it compares the arms on all seeds so far, and ends if the
interval of the paired difference in test loss excludes zero. Testing repeatedly at 95 % would find differences that
do not exist in more than 5 % of reports (Armitage, McPherson and Rowe, JRSS A 132, 1969). So would testing two
quantities, as the steps to the target decide where the test loss does not. With K analyses, the last one included,
every interval of the report has confidence 1 - 0.05 / 2K. By Bonferroni's inequality the chance that one of these
2K intervals misses the true value is at most 5 %, however they depend on each other.

Each interval is Student's, exact if the differences are normal. Light tails make it too narrow for few seeds: see
`benchmarks/false_verdicts.py`.
"""

from .settings import SweepRun
from .statistics import CONFIDENCE, RunRow, lower_loss_arm

QUANTITIES = 2
"""What may decide a report: the test loss and the steps to the target."""


def interval_confidence(analyses: int) -> float:
    """Confidence of each interval, so that those of both quantities in all analyses hold together with 95 %.

    >>> round(interval_confidence(1), 4), round(interval_confidence(2), 4)
    (0.975, 0.9875)
    """
    return 1 - (1 - CONFIDENCE) / (QUANTITIES * analyses)


def seed_groups(run: SweepRun) -> list[tuple[int, ...]]:
    """The report's seeds, split where it may end; the last group ends with the last seed."""
    ends = (*run.sweep.interim_seeds, run.sweep.report_seeds)
    return [run.report_seeds[start:end] for start, end in zip((0, *ends), ends, strict=False)]


def reason_to_end(run: SweepRun, comparison: RunRow) -> str | None:
    """`"decided"` or `"all_seeds"`; None if the report continues with the next group of seeds.

    Args:
      run: settings of the sweep.
      comparison: LoRA+ compared with LoRA on all seeds so far, with intervals of `interval_confidence`. If a run
        diverged, the difference in test loss decides nothing, and the report continues.
    """
    if comparison["pairs"] == run.sweep.report_seeds:
        return "all_seeds"
    is_decided = not any(comparison["diverged"].values()) and lower_loss_arm(comparison) is not None
    return "decided" if is_decided else None
