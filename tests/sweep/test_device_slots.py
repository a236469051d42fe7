"""Members in slots: how many run at once, their places, what a checkpoint holds of them, and what is evaluated."""

import math
import types

import numpy as np

from loraplus_jax.step.train_step import TrainState
from loraplus_jax.sweep.device_slots import DeviceSlots, assign_slots, stored_members
from loraplus_jax.sweep.population import Members, fastest_batch_size, parallel_members


class Program:
    """A function with shardings, as a compiled program has."""

    input_shardings = ((None, None, None),)

    def __init__(self, function):
        self.function, self.largest = function, self

    def __call__(self, *args):
        return self.function(*args)


def test_members_are_spread_over_the_devices():
    assert assign_slots(5, chunk=8, devices=4, at_once=1) == [0, 2, 4, 6, 1]
    assert assign_slots(9, chunk=8, devices=4, at_once=1)[8] == 8
    assert assign_slots(5, chunk=4, devices=2, at_once=2) == [0, 1, 2, 3, 4]
    for count in range(1, 17):
        assert len(set(assign_slots(count, chunk=8, devices=4, at_once=1))) == count


def member(number):
    """A member of which every array is its number."""
    state = TrainState({"w": np.full(2, number)}, (), np.int32(number), np.full(2, number, np.uint32))
    return Members(state, number, number, {}, np.int32(number), np.bool_(True))  # pyright: ignore


def test_members_keep_their_numbers_in_a_checkpoint_and_on_another_number_of_slots():
    def slots(chunk):
        programs = types.SimpleNamespace(chunk=chunk, at_once=1, step=Program(None))
        mesh = types.SimpleNamespace(size=1)
        population = types.SimpleNamespace(programs_for=lambda _: programs, mesh=mesh, programs=programs)
        return DeviceSlots(population)  # pyright: ignore

    first = {number: member(number) for number in (1, 3, 4)}
    two, three = slots(2), slots(3)
    two.fill(first)
    assert (two.slots, two.member_ids, len(two.chunks)) == ([1, 3, 4, -1], [1, 3, 4], 2)
    saved = two.as_state(7)
    assert int(saved.step) == 7
    np.testing.assert_array_equal(saved.trainable["step"], [1, 3, 4])
    places = {3: 1, 4: 2}
    three.fill(stored_members(saved, {number: first[number] for number in places}, places))
    assert three.slots == [3, 4, -1]
    np.testing.assert_array_equal(three.as_state(7).trainable["step"], [3, 4])


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
