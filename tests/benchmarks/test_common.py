"""What the benchmarks share: turns of the runs, and the command line."""


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
