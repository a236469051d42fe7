"""Schedules of units, against times by hand."""

import itertools

import pytest

from loraplus_jax.sweep.makespan import schedule

OPTIONS = (
    *("--sweep.learning_rates", "[1e-4,2e-4]", "--sweep.lr_ratios", "[2,4]", "--sweep.control", "false"),
    *("--sweep.rungs", "[0.25]", "--sweep.keep", "0.5", "--sweep.report_seeds", "2"),
)


def steps_of(sweep, unit):
    return len(unit.members) * float(unit.stops[-1] - unit.start)


def test_by_hand(parsed):
    # 8 settings to step 2 of 8, 4 of them to step 8, then 2 arms on 2 seeds: 16 + 24 + 32 steps, in 3 stages.
    run = parsed(*OPTIONS)
    one = schedule([run], 8, 1, 1, steps_of)
    assert (one.makespan, one.work, one.chain, one.bound) == (72, 72, 2 + 6 + 8, 72)
    many = schedule([run], 8, 1, 8, steps_of)
    assert many.makespan == many.bound == many.chain == 16
    # Three workers: 8 units of 2 steps take 3 rounds, 4 of 6 and 4 of 8 two each.
    assert schedule([run], 8, 1, 3, steps_of).makespan == 3 * 2 + 2 * 6 + 2 * 8
    # Groups of 2 members: 4, 2 and 2 units of twice the steps.
    assert schedule([run], 8, 2, 2, steps_of).makespan == 2 * 4 + 12 + 16


def test_sweeps_share_workers_and_each_worker_prepares_each(parsed):
    run = parsed(*OPTIONS)
    both = schedule([run, run], 8, 1, 16, steps_of, preparation=1.0)
    # A preparation at the start, and one by a worker that changes to the other sweep.
    assert (both.makespan, both.bound) == (18, 17)
    assert {span.sweep for span in both.spans} == {0, 1}
    alone = schedule([run, run], 8, 1, 1, steps_of, preparation=1.0)
    # The stages of the two alternate: three preparations of each.
    assert (alone.makespan, alone.work) == (2 * 72 + 6, 2 * 72)


def test_a_worker_runs_one_unit_at_a_time(parsed):
    found = schedule([parsed(*OPTIONS, "--sweep.interim_seeds", "[]")] * 3, 8, 1, 5, steps_of)
    for worker in range(5):
        spans = sorted((span.start, span.end) for span in found.spans if span.worker == worker)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert found.bound <= found.makespan <= found.bound + found.chain


@pytest.mark.parametrize("interim", ["[]", "[2,3]"])
def test_all_report_seeds_are_planned(parsed, interim):
    run = parsed("--sweep.report_seeds", "4", "--sweep.interim_seeds", interim)
    found = schedule([run], 100, 1, 4, steps_of)
    report = [span.unit for span in found.spans if span.unit.stage == "report"]
    assert len(report) == 3 * 4
