"""The parts of `benchmarks/step_time.py` that need no long run: FLOPs by formula, agreement of losses."""

import numpy as np
import pytest


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


def run(first, last):
    return {"first": {"loss": first}, "loss": [1.5, last]}


@pytest.mark.parametrize(("last", "expected"), [(1.0, 0.0), (1.5, 0.5), (np.nan, np.inf)])
def test_losses_that_differ_are_seen_and_nan_is_no_agreement(last, expected):
    from step_time import losses_differ

    runs = {"here": run(2.0, 1.0), "peft": run(2.0, last), "qwix": {"failed": "qwix is not installed"}}
    assert losses_differ(runs) == expected
