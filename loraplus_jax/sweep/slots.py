"""Assigns population members to device slots, and compacts them as members are pruned."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..data.batches import Batch, eval_batches
from ..train_step import TrainState, weighted_means
from .population import Members, Population


class DeviceSlots:
    """Numbered members in as many slots as a population ever needs; a slot is empty or holds one.

    The slots make up whole calls of the program: however many members are left, nothing is compiled again. How
    many slots that takes depends on the devices, so checkpoints hold members by number and not by slot.

    Attributes:
      size: how many members there are at most.
      slots: the number of the member in each slot, -1 for none.
      chunks: the arrays, one tree for each call.
    """

    def __init__(self, population: Population, size: int) -> None:
        self.population, self.chunk = population, population.chunk
        self.size, self.total = size, -(-size // self.chunk) * self.chunk
        self.slots: list[int] = []
        self.chunks: list[Members] = []

    @property
    def member_ids(self) -> list[int]:
        """The members, in order."""
        return sorted(n for n in self.slots if n >= 0)

    def fill(self, members: Mapping[int, Members]) -> None:
        """Puts members into slots; all other slots are empty."""
        population = self.population
        where = assign_slots(len(members), self.chunk, population.mesh.size, population.at_once)
        self.slots = [-1] * self.total
        for slot, number in zip(where, members, strict=True):
            self.slots[slot] = number
        empty = jax.tree.map(np.zeros_like, next(iter(members.values())))
        self.load(stack_members([members.get(number, empty) for number in self.slots]))

    def compact(self, kept: Sequence[int]) -> None:
        """Moves the members kept together, so that whole calls of the program are saved."""
        host, place = self.to_host(), {number: place for place, number in enumerate(self.slots)}
        self.fill({n: jax.tree.map(lambda leaf, n=n: leaf[place[n]], host) for n in sorted(kept)})

    def load(self, members: Members) -> None:
        """The arrays of all slots, each of the size `(total, ...)`, as the program takes them."""
        shardings = self.population.programs.step.input_shardings[0][0]
        cuts = (
            jax.tree.map(lambda leaf, start=start: np.asarray(leaf)[start : start + self.chunk], members)
            for start in range(0, self.total, self.chunk)
        )
        self.chunks = [jax.device_put(cut, shardings) for cut in cuts]

    def to_host(self) -> Members:
        """All slots as one tree of arrays in the host's memory."""
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *jax.device_get(self.chunks))

    def step(self, batches: Mapping[int, Batch]) -> None:
        """One step of every member, each on its own batch."""
        programs, frozen = self.population.programs, self.population.parts.frozen
        shardings = programs.step.input_shardings[0][2]
        filler = next(iter(batches.values()))  # what an empty slot gets does not matter
        for chunk in self._busy():
            parts = [batches.get(number, filler) for number in self.slots_in(chunk)]
            batch = jax.tree.map(lambda *columns: np.stack(columns), *parts)
            batch = jax.device_put(batch, shardings)
            self.chunks[chunk] = programs.step(self.chunks[chunk], frozen, batch)

    def evaluate(self, split: Batch, batch_size: int) -> dict[int, dict[str, float]]:
        """The means over all rows of a split by member; NaN for those that have diverged."""
        programs, frozen = self.population.programs, self.population.parts.frozen
        shardings = programs.evaluate.input_shardings[0][2]
        totals: dict[int, Any] = {}
        for batch in eval_batches(split, batch_size):
            batch = jax.device_put(batch, shardings)
            for chunk in self._busy():
                pairs = programs.evaluate(self.chunks[chunk], frozen, batch)
                totals[chunk] = (
                    jax.tree.map(lambda a, b: a + b, totals[chunk], pairs) if chunk in totals else pairs
                )
        results = {}
        for chunk, total in totals.items():
            values, alive = jax.device_get((weighted_means(total), self.chunks[chunk].alive))
            for place, number in enumerate(self.slots_in(chunk)):
                if number >= 0:
                    row = {name: float(column[place]) for name, column in values.items()}
                    results[number] = row if alive[place] else dict.fromkeys(row, math.nan)
        return dict(sorted(results.items()))

    def retire(self, numbers: Iterable[int]) -> None:
        """Members that take no more steps."""
        stopped = set(numbers)
        for chunk, members in enumerate(self.chunks):
            stays = np.array([number not in stopped for number in self.slots_in(chunk)])
            alive = np.asarray(members.alive) & stays
            self.chunks[chunk] = members.replace(alive=jax.device_put(alive, members.alive.sharding))

    def slots_in(self, chunk: int) -> list[int]:
        """The slots of one call."""
        return self.slots[chunk * self.chunk :][: self.chunk]

    def as_state(self, clock: int) -> TrainState:
        """What changes in training, as checkpoints hold it, under a number of its own.

        Along the first axis are the members by number, zeros for those that are gone: the same on any devices.
        """
        numbers = self.member_ids
        where = [self.slots.index(number) for number in numbers]

        def by_number(leaf: np.ndarray) -> np.ndarray:
            rows = np.zeros((self.size, *leaf.shape[1:]), leaf.dtype)
            rows[numbers] = leaf[where]
            return rows

        host = jax.tree.map(by_number, self.to_host())
        values = {"trainable": host.state.trainable, "step": host.state.step}
        values |= {"skipped": host.skipped, "alive": host.alive}
        step: Any = np.int32(clock)
        return jax.device_put(TrainState(values, host.state.opt_state, step, host.state.rng))

    def resume(self, state: TrainState, first: Mapping[int, Members], places: Sequence[int]) -> None:
        """The inverse of `as_state`.

        Args:
          state: as a checkpoint held it.
          first: the members before their first step, for their rates and scales.
          places: which members were left, in any order, -1 for none; they get the slots that these devices have.
        """
        values = jax.device_get(state.trainable)
        kept = TrainState(values["trainable"], state.opt_state, values["step"], state.rng)
        changing = jax.device_get((kept, values["skipped"], values["alive"]))

        def member(number: int) -> Members:
            mine, skipped, alive = jax.tree.map(lambda leaf: leaf[number], changing)
            return first[number].replace(state=mine, skipped=skipped, alive=alive)

        self.fill({number: member(number) for number in sorted(places) if number >= 0})

    def _busy(self) -> list[int]:
        """The calls that have a member."""
        return [chunk for chunk in range(len(self.chunks)) if max(self.slots_in(chunk)) >= 0]


def assign_slots(count: int, chunk: int, devices: int, at_once: int) -> list[int]:
    """Where `count` members go, so that all devices have as many of them.

    With several at once a call computes all its slots, so that calls are filled one after the other.

    >>> assign_slots(3, chunk=8, devices=4, at_once=1)
    [0, 2, 4]
    """
    if at_once > 1:
        return list(range(count))
    each = chunk // devices
    return [n // chunk * chunk + n % chunk % devices * each + n % chunk // devices for n in range(count)]


def stack_members(members: Sequence[Members]) -> Members:
    """Single members side by side, in the host's memory."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *members)
