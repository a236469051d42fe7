"""The parts of `benchmarks/generate.py` and `startup.py` that need no run: order of rounds, rates and ratios."""

from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_rates_ratios_and_equal_tokens_by_hand():
    from generate import rows_of

    def run(decode_s, text):
        about = {"prefill_s": [0.25], "peak_bytes": 5e6, "to_first_step_s": 7.0}
        return about | {"decode_s": decode_s, "texts": [[1, 2, 3, 4, 5], text]}

    runs = {
        "here": run([1.0, 2.0, 4.0], [6, 7, 8, 9, 0]),
        "transformers": run([4.0, 4.0, 4.0], [6, 7, 8, 8, 8]),
        "compiled": {"no run": "no compiler"},
    }
    ours, other, failed = rows_of("2+lora", runs)
    assert (ours["batch"], ours["adapters"], failed["tokens/s"]) == ("2", "unmerged", "no compiler")
    assert (ours["tokens/s"], other["tokens/s"]) == ("4.0", "2.0")  # 2 texts of 4 tokens after the first
    assert (ours["ours / its"], other["ours / its"]) == ("1.00", "2.00")
    assert (ours["equal tokens"], other["equal tokens"]) == ("1.000", "0.800")
    assert ours.keys() == other.keys() == failed.keys()


def test_processes_take_turns_and_the_first_round_does_not_count():
    from startup import in_turn, rows_of

    order = []

    def run(name):
        def once():
            order.append(name)
            return {"": float(len(order))}

        return once

    measured = in_turn({"a": run("a"), "b": run("b")}, 2)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert measured == {"a": [3.0, 6.0], "b": [4.0, 5.0]}
    first, second = rows_of(measured, {"b": "a"})
    assert (first["ratio"], second["ratio"]) == ("-", f"{(4 / 3 + 5 / 6) / 2:.2f}")
