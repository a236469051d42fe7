"""The parts of `benchmarks/step_time.py` that need no long run: FLOPs by formula, settings, goals, agreement."""

from pathlib import Path

import numpy as np
import pytest

from ..messages import mentions

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_ideal_flops_of_one_small_layer_by_hand():
    from step_time_model import SMOLLM2, ideal_flops

    sizes = {"vocab_size": 10, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    config = SMOLLM2 | sizes | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}
    found = ideal_flops(config, batch=2, tokens=3, rank=5)
    weights = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 6 + 4 * 10
    adapters = 5 * ((4 + 4) + (4 + 2) + (4 + 2) + (4 + 4))
    assert found == {"weights": 4 * weights * 6, "attention": 12 * 2 * 9 * 4, "adapters": 6 * adapters * 6}


def test_smollm2_has_its_135_million_weights():
    from step_time_model import SMOLLM2, products

    norms = (2 * SMOLLM2["num_hidden_layers"] + 1) * SMOLLM2["hidden_size"]
    assert sum(a * b for a, b in products(SMOLLM2).values()) + norms == 134_515_008


def test_variants_take_what_they_do_not_name_from_the_options():
    from step_time import variants_of

    defaults = {"remat": "none", "unroll": False, "chunk": 512}
    found = variants_of("a:remat=dots,unroll=true;b:chunk=64", defaults)
    assert found == {"a": {**defaults, "remat": "dots", "unroll": True}, "b": {**defaults, "chunk": 64}}
    with pytest.raises(SystemExit, match=mentions("'rmat'", "remat", "unroll")):
        variants_of("a:rmat=dots", defaults)


def run(seconds, first, last, memory=100, device=None):
    return {
        "seconds": seconds,
        "first": {"loss": first},
        "last": {"loss": last},
        "peak_bytes": memory,
        "device_peak_bytes": device,
    }


FLOPS = {"weights": 90e9, "attention": 8e9, "adapters": 2e9}


def test_goals_are_medians_of_the_rounds_own_ratios():
    from step_time_report import goals_of

    runs = {
        "here": run([1.0, 8.0, 9.0], 2.0, 1.0, 60),
        "peft": run([2.0, 10.0, 9.0], 2.0, 1.0),
        "no adapters": run([1.0, 7.0, 7.0], 2.0, 2.0),
        "tunix": {"no run": "tunix is not installed"},
        "matmul": {"seconds": [1.0], "gflop_per_s": [15.0]},
    }
    found = {line.pop("what"): line for line in goals_of("8x64", "cpu", "here", runs, FLOPS)}
    assert found == {
        "8x64 time / no adapters": {"measured": 1.1429, "bound": "at most", "goal": 1.05, "met": "missed"},
        "8x64 time / peft": {"measured": 0.8, "bound": "at most", "goal": 0.9, "met": "met"},
        "8x64 memory / peft": {"measured": 0.6, "bound": "at most", "goal": 0.7, "met": "met"},
        "8x64 share of peak": {"measured": 0.8333, "bound": "at least", "goal": 0.78, "met": "met"},
    }


def test_shares_of_the_peak_count_what_each_run_does():
    from step_time_report import rows_of

    runs = {
        "here": run([2.0], 2.0, 1.0) | {"to_first_step_s": 1.0, "about": {}, "steps_peak_bytes": 5},
        "matmul": {"seconds": [1.0], "gflop_per_s": [100.0]},
        "peft": {"no run": "peft is not installed"},
    }
    runs["no adapters"] = runs["here"]
    found = rows_of("8x64", runs, FLOPS)
    assert [row["share of peak"] for row in found] == ["0.500", "0.900", "-", "0.490"]
    assert found[2]["step, s"] == "peft is not installed"


@pytest.mark.parametrize(("last", "expected"), [(1.0, 0.0), (1.5, 0.5), (np.nan, np.inf)])
def test_losses_that_differ_are_seen_and_nan_is_no_agreement(last, expected):
    from step_time_report import losses_differ

    runs = {
        "here": run([1.0], 2.0, 1.0),
        "peft": run([1.0], 2.0, last),
        "qwix": {"no run": "qwix is not installed"},
        "no adapters": run([1.0], 2.0, 2.0),
    }
    assert losses_differ(runs) == expected
