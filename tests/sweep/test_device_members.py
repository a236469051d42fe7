"""Members on the devices: how many run at once, their places, and what a checkpoint holds of them."""

import math
import types

import numpy as np

from loraplus_jax.step.train_step import TrainState
from loraplus_jax.sweep.device_members import DeviceMembers, spread, stored_members
from loraplus_jax.sweep.member_programs import Members, fastest_batch_size, parallel_members


class Program:
    """A function with shardings, as a compiled program has."""

    input_shardings = ((None, None, None),)

    def __init__(self, function):
        self.function, self.largest = function, self

    def __call__(self, *args):
        return self.function(*args)


def test_members_are_spread_over_the_devices():
    assert spread(5, size=8, devices=4) == [0, 2, 4, 6, 1]
    assert spread(5, size=6, devices=2) == [0, 3, 1, 4, 2]
    for count in range(1, 9):
        assert len(set(spread(count, size=8, devices=4))) == count


def member(number):
    """A member of which every array is its number."""
    state = TrainState({"w": np.full(2, number)}, (), np.int32(number), np.full(2, number, np.uint32))
    return Members(state, number, number, {}, np.int32(number), np.bool_(True))  # pyright: ignore


def test_a_checkpoint_has_the_members_in_order_and_any_of_them_continue_on_other_devices():
    def placed(members, size, devices):
        programs = types.SimpleNamespace(size=size, at_once=1, step=Program(None))
        mesh = types.SimpleNamespace(size=devices)
        return DeviceMembers(types.SimpleNamespace(programs_for=lambda _: programs, mesh=mesh), members)  # pyright: ignore

    first = [member(number) for number in (1, 3, 4)]
    two = placed(first, 4, 2)
    assert two.places == [0, 2, 1]
    np.testing.assert_array_equal(two.stacked.alive, [True, True, True, False])
    saved = two.as_state(7)
    assert int(saved.step) == 7
    np.testing.assert_array_equal(saved.trainable["step"], [1, 3, 4])
    one = placed(stored_members(saved, first[1:], [1, 2]), 3, 1)
    assert one.places == [0, 1]
    np.testing.assert_array_equal(one.as_state(7).trainable["step"], [3, 4])
    one.retire([1])
    np.testing.assert_array_equal(one.stacked.alive, [True, False, False])


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
