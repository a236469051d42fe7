"""Which rows and steps the theory's terms are measured on, and what a run reads of them."""

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.step.sharding import make_mesh
from loraplus_jax.training.theory_metrics import count_rows, read_metrics, to_metrics

from ..messages import assert_mentions


def test_what_is_read_is_the_second_half_of_the_run():
    rows = [
        {"step": n, "theory/q/delta1": d, "theory/q/delta2": 1.0, "theory/q/delta3": 0.0}
        for n, d in ((1, 99.0), (2, 99.0), (3, 0.1), (4, 0.1))
    ]
    rows = [row | {"theory/q/z_a": 1.0, "theory/q/z_b": 1.0, "theory/mean/delta1": 5.0} for row in rows]
    config = LoRAPlusConfig(target_modules="q", lr_ratio=20.0, init="lora_b")
    line = read_metrics([{"step": 0, "loss": 1.0}, *rows], config, False)
    assert line is not None
    assert_mentions(line, 0.1, "lr_ratio", 2)
    assert "learning_rate" not in line  # with A zero at the start A's rate stays
    assert "learning_rate" in (read_metrics(rows, config, True) or "")
    assert read_metrics([{"step": 0, "loss": 1.0}], config, False) is None
    assert read_metrics(rows, None, False) is None


def test_a_quarter_of_the_rows_on_all_devices():
    sizes = ((32, 1), (30, 1), (32, 8), (4, 4), (1, 1))
    assert [count_rows(size, make_mesh(devices)) for size, devices in sizes] == [8, 8, 8, 4, 1]
    assert to_metrics({}, {}) == {}
