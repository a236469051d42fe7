"""How many members run at once."""

import math

from loraplus_jax.sweep.population import fastest_batch_size, parallel_members


def test_more_members_at_once_only_while_it_pays():
    asked = []

    def seconds(size):
        asked.append(size)
        return {1: 1.0, 2: 0.5, 4: 0.49, 8: 0.1}[size]

    assert fastest_batch_size(seconds, 16) == 2
    assert asked == [1, 2, 4]
    assert fastest_batch_size(lambda size: 1 / size, 6) == 4
    assert fastest_batch_size(lambda size: math.inf if size > 1 else 1.0, 6) == 1


def test_few_members_are_computed_in_the_least_power_of_two_that_holds_them():
    assert [parallel_members(count, 16, 1) for count in (32, 9, 8, 5, 2, 1)] == [16, 16, 8, 8, 2, 1]
    assert [parallel_members(count, 16, 4) for count in (33, 32, 4, 3)] == [16, 8, 1, 1]
    assert parallel_members(7, 6, 1) == 6  # a number of the user's own
    assert parallel_members(7, 1, 1) == 1
