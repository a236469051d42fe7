"""Assigns population members to device slots."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from ..data.batches import Batch, add_rows, eval_batches
from ..step.train_step import Rows, TrainState, weighted_means
from ..training.evaluation import join_rows, separate_rows
from .population import Members, Population


class DeviceSlots:
    """Numbered members in a fixed number of slots; a slot holds one member or is empty.

    The slots fill complete program calls. A device that computes one member at a time skips empty slots; one that
    computes several in parallel does not, so fewer members get a program of fewer slots. The number of slots
    depends on the devices, so checkpoints store members by number, not by slot.

    Attributes:
      slots: number of the member in each slot, -1 if empty.
      chunks: arrays of the members, one tree per program call.
    """

    def __init__(self, population: Population) -> None:
        self.population, self.programs = population, population.programs
        self.slots: list[int] = []
        self.chunks: list[Members] = []

    @property
    def chunk(self) -> int:
        """Slots per program call."""
        return self.programs.chunk

    @property
    def member_ids(self) -> list[int]:
        """Numbers of the members, ascending."""
        return sorted(n for n in self.slots if n >= 0)

    def fill(self, members: Mapping[int, Members]) -> None:
        """Puts the members into the slots of as many calls as they need, of programs for their number."""
        population = self.population
        self.programs = population.programs_for(len(members))
        assigned = assign_slots(len(members), self.chunk, population.mesh.size, self.programs.at_once)
        self.slots = [-1] * (-(-len(members) // self.chunk) * self.chunk)
        for slot, number in zip(assigned, members, strict=True):
            self.slots[slot] = number
        # Of zeros, `alive` too: what fills up a call trains nothing.
        empty = jax.tree.map(np.zeros_like, next(iter(members.values())))
        self.load(stack_members([members.get(number, empty) for number in self.slots]))

    def load(self, members: Members) -> None:
        """Puts arrays of all slots, shaped `(slots, ...)`, on the devices, one chunk per program call."""
        # A compiled program moves no arguments, as jit would. It names their places as (args, kwargs); members are
        # the first of args.
        shardings = self.programs.step.largest.input_shardings[0][0]
        chunks = (
            jax.tree.map(lambda leaf, start=start: np.asarray(leaf)[start : start + self.chunk], members)
            for start in range(0, len(self.slots), self.chunk)
        )
        self.chunks = [jax.device_put(chunk, shardings) for chunk in chunks]

    def to_host(self) -> Members:
        """All slots as one tree of host arrays."""
        # One device_get for all chunks starts all copies before it waits for the first.
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *jax.device_get(self.chunks))

    def step(self, batches: Mapping[int, Batch]) -> None:
        """Runs one training step of every member, each on its own batch."""
        programs, frozen = self.programs, self.population.parts.frozen
        shardings = programs.step.largest.input_shardings[0][2]
        filler = next(iter(batches.values()))  # any batch will do for an empty slot
        rows = max(len(batch["weight"]) for batch in batches.values())
        for chunk in range(len(self.chunks)):
            parts = [batches.get(number, filler) for number in self.slots_in(chunk)]
            batch = jax.tree.map(lambda *columns: np.stack(columns), *(add_rows(x, rows) for x in parts))
            batch = jax.device_put(batch, shardings)
            # The step donates its members: the old arrays are gone once it is called.
            self.chunks[chunk] = programs.step(self.chunks[chunk], frozen, batch)

    def evaluate(self, split: Batch) -> dict[int, dict[str, Any]]:
        """Mean loss and metrics of each member over all rows of a split, NaN if it is not alive, and its `Rows`."""
        programs, frozen = self.programs, self.population.parts.frozen
        shardings = programs.evaluate.input_shardings[0][2]
        totals: dict[int, Any] = {}
        kept: dict[int, list[dict[str, Rows]]] = {}
        for batch in eval_batches(split, self.population.batches.eval_rows):
            batch = jax.device_put(batch, shardings)
            for chunk in range(len(self.chunks)):
                pairs, rows = separate_rows(programs.evaluate(self.chunks[chunk], frozen, batch))
                kept.setdefault(chunk, []).append(rows)
                # Sums stay on the devices; reading them here would wait for every call.
                totals[chunk] = (
                    jax.tree.map(lambda a, b: a + b, totals[chunk], pairs) if chunk in totals else pairs
                )
        results = {}
        for chunk, total in totals.items():
            values, alive, rows = jax.device_get(
                (weighted_means(total), self.chunks[chunk].alive, kept[chunk])
            )
            for slot, number in enumerate(self.slots_in(chunk)):
                if number >= 0:
                    row = {name: float(column[slot]) for name, column in values.items()}
                    results[number] = row if alive[slot] else dict.fromkeys(row, math.nan)
                    results[number] |= join_rows(jax.tree.map(lambda x, slot=slot: x[slot], rows))
        return dict(sorted(results.items()))

    def time_evaluation(self, split: Batch) -> float:
        """Seconds that all devices together take for a member's evaluation batch, measured on the second of two."""
        programs, frozen = self.programs, self.population.parts.frozen
        devices, members = self.population.mesh.size, self.chunks[0]
        # One member on each device; a device that computes several in parallel computes all its slots.
        alive = np.arange(self.chunk) % (self.chunk // devices) == 0
        members = members.replace(alive=jax.device_put(alive, members.alive.sharding))
        batch = next(eval_batches(split, self.population.batches.eval_rows))
        batch = jax.device_put(batch, programs.evaluate.input_shardings[0][2])
        jax.block_until_ready(programs.evaluate(members, frozen, batch))
        began = time.perf_counter()
        jax.block_until_ready(programs.evaluate(members, frozen, batch))
        return (time.perf_counter() - began) / (devices * programs.at_once)

    def retire(self, numbers: Iterable[int]) -> None:
        """Stops training these members."""
        stopped = set(numbers)
        for chunk, members in enumerate(self.chunks):
            continues = np.array([number not in stopped for number in self.slots_in(chunk)])
            alive = np.asarray(members.alive) & continues
            # A compiled program takes arrays of its own shardings only.
            self.chunks[chunk] = members.replace(alive=jax.device_put(alive, members.alive.sharding))

    def slots_in(self, chunk: int) -> list[int]:
        """Member numbers in the slots of one program call, -1 if empty."""
        return self.slots[chunk * self.chunk :][: self.chunk]

    def as_state(self, clock: int) -> TrainState:
        """The members' changing state as checkpoints store it, with `clock` as the step.

        The first axis is the member's number, so it does not depend on the devices.
        """
        slots = [self.slots.index(number) for number in self.member_ids]
        host = jax.tree.map(lambda leaf: leaf[slots], self.to_host())
        # A checkpoint has one step for all, so the members' own counters are stored with what they train.
        values = {"trainable": host.state.trainable, "step": host.state.step}
        values |= {"skipped": host.skipped, "alive": host.alive}
        step: Any = np.int32(clock)
        return jax.device_put(TrainState(values, host.state.opt_state, step, host.state.rng))

    def state_like(self, count: int) -> TrainState:
        """The shapes of `as_state` of so many members."""
        device = SingleDeviceSharding(jax.devices()[0])

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype, sharding=device)

        members = jax.tree.map(shape, self.population.programs.step.largest.args_info[0][0])
        values = {"trainable": members.state.trainable, "step": members.state.step}
        values |= {"skipped": members.skipped, "alive": members.alive}
        step: Any = jax.ShapeDtypeStruct((), np.int32, sharding=device)
        return TrainState(values, members.state.opt_state, step, members.state.rng)


def stored_members(
    state: TrainState, first: Mapping[int, Members], numbers: Mapping[int, int]
) -> dict[int, Members]:
    """The members of a state from `as_state`.

    Args:
      state: state from a checkpoint.
      first: initial members by number, for their rates and scales.
      numbers: the number in the state of each of them.
    """
    values = jax.device_get(state.trainable)
    states = TrainState(values["trainable"], state.opt_state, values["step"], state.rng)
    stored = jax.device_get((states, values["skipped"], values["alive"]))

    def member(number: int) -> Members:
        own = numbers[number]
        member_state, skipped, alive = jax.tree.map(lambda leaf: leaf[own], stored)
        return first[number].replace(state=member_state, skipped=skipped, alive=alive)

    return {number: member(number) for number in first}


def assign_slots(count: int, chunk: int, devices: int, at_once: int) -> list[int]:
    """Slots for `count` members, spread evenly over the devices.

    If a device computes several members in parallel, a call computes all its slots; so calls are filled in turn.

    >>> assign_slots(3, chunk=8, devices=4, at_once=1)
    [0, 2, 4]
    """
    if at_once > 1:
        return list(range(count))
    each = chunk // devices
    return [n // chunk * chunk + n % chunk % devices * each + n % chunk // devices for n in range(count)]


def stack_members(members: Sequence[Members]) -> Members:
    """Stacks single members along a new first axis, in host memory."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *members)
