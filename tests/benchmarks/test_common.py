"""What the benchmarks share: turns of the runs, and the command line."""

import pytest


def test_runs_take_turns_and_the_warm_up_does_not_count():
    from common import take_turns

    order = []

    def run(name):
        return lambda: order.append(name) or len(order)

    results = take_turns({name: run(name) for name in "abc"}, rounds=20, warmup=2)
    rounds = ["".join(order[n : n + 3]) for n in range(0, len(order), 3)]
    assert len(rounds) == 22
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 1
    assert sorted(n for numbers in results.values() for n in numbers) == list(range(7, 67))
    assert results["a"] == [n for n, name in enumerate(order, 1) if name == "a"][2:]


def test_a_ratio_is_the_median_of_the_rounds_own():
    from common import median_ratio

    assert median_ratio([1.0, 8.0, 9.0], [2.0, 10.0, 9.0]) == 0.8


def test_options_have_the_type_of_their_default(capsys):
    from common import parse_options

    known = {"what": ["time", "size"], "rounds": 7, "recount": False}
    options = vars(parse_options(None, ["size", "--rounds", "3", "--recount"], **known))
    assert options == {"what": "size", "rounds": 3, "recount": True}
    with pytest.raises(SystemExit, match="2"):
        parse_options(None, ["cost"], **known)
    assert "cost" in capsys.readouterr().err


def test_rates_ratios_and_equal_tokens_by_hand():
    from generate import rows_of

    def run(seconds, text):
        texts = [[1, 2, 3, 4, 5], text]
        return [{"decode": one, "prefill": 0.25, "texts": texts} for one in seconds]

    runs = {
        "here": run([1.0, 2.0, 4.0], [6, 7, 8, 9, 0]),
        "transformers": run([4.0, 4.0, 4.0], [6, 7, 8, 8, 8]),
    }
    ours, other = rows_of("2+lora", runs)
    assert (ours["batch"], ours["adapters"]) == ("2", "unmerged")
    assert (ours["tokens/s"], other["tokens/s"]) == ("4.0", "2.0")  # 2 texts of 4 tokens after the first
    assert (ours["ours / its"], other["ours / its"]) == ("1.00", "2.00")
    assert (ours["equal tokens"], other["equal tokens"]) == ("1.000", "0.800")
