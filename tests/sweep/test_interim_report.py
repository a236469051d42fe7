"""Reports that may end early: the groups of seeds, the level of each analysis, and the error rate of them all."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from loraplus_jax.sweep.interim_report import interval_confidence, reason_to_end, seed_groups
from loraplus_jax.sweep.statistics import compare_arms

ENDS = (3, 5, 8)


@pytest.fixture
def run(parsed):
    return parsed("--seed", "0", "--sweep.report_seeds", "8", "--sweep.interim_seeds", "[3,5]")


def comparison(differences, diverged=0):
    """LoRA+ and LoRA whose test losses differ by these values."""
    tests = [("lora_plus", seed, 0.5 + value) for seed, value in enumerate(differences)]
    tests += [("lora", seed, 0.5) for seed in range(len(differences))]
    runs = [
        {"arm": arm, "seed": seed, "test": {"loss": loss, "accuracy": 0.5}, "steps_to_target": None}
        | {"at_start": False, "diverged": arm == "lora" and seed < diverged}
        for arm, seed, loss in tests
    ]
    return compare_arms(runs, "lora_plus", "lora", "accuracy", interval_confidence(len(ENDS)))


def test_the_seeds_are_those_of_a_report_in_one_group(run):
    groups = seed_groups(run)
    assert groups == [(1, 2, 3), (4, 5), (6, 7, 8)]
    whole = dataclasses.replace(run, sweep=dataclasses.replace(run.sweep, interim_seeds=()))
    assert seed_groups(whole) == [tuple(itertools.chain(*groups))]


def test_every_analysis_has_its_share_of_the_error():
    # Student's t with 2 degrees of freedom leaves 0.05 / 6 outside 10.8859 standard errors.
    assert stats.t.sf(10.8859, 2) * 2 == pytest.approx(0.05 / 6, rel=1e-4)
    spread = np.array([-1.0, 0.0, 1.0]) * np.sqrt(3)  # standard error 1
    found = comparison(spread + 7.0)["test_loss"]
    assert (found["low"], found["high"]) == pytest.approx((7.0 - 10.8859, 7.0 + 10.8859), rel=1e-4)
    assert interval_confidence(1) == 0.975


def test_a_report_ends_once_the_loss_is_decided_or_the_seeds_are_used(run):
    spread = np.array([-1.0, 0.0, 1.0]) * np.sqrt(3)
    assert reason_to_end(run, comparison(spread + 10.0)) is None
    assert reason_to_end(run, comparison(spread + 12.0)) == "decided"
    assert reason_to_end(run, comparison(spread - 12.0)) == "decided"
    assert reason_to_end(run, comparison([*spread + 12.0, 12.0], diverged=1)) is None
    assert reason_to_end(run, comparison(np.zeros(8))) == "all_seeds"


@pytest.mark.parametrize("draw", ["normal", "laplace"])
def test_without_a_difference_at_most_one_report_in_twenty_finds_one(draw):
    rng, count = np.random.default_rng(0), 20_000
    values = getattr(rng, draw)(size=(count, ENDS[-1]))

    def false_positives(confidence):
        """The share of reports that exclude zero after any of their analyses."""
        excluded = np.zeros(count, bool)
        for end in ENDS:
            seeds = values[:, :end]
            half = stats.t.ppf((1 + confidence) / 2, end - 1) * seeds.std(axis=1, ddof=1) / np.sqrt(end)
            excluded |= np.abs(seeds.mean(axis=1)) > half
        return excluded.mean()

    assert false_positives(interval_confidence(len(ENDS))) <= 0.05
    assert false_positives(0.95) > 0.06  # what repeated 95 % intervals find
