"""The members of a unit on the devices: one tree of arrays, and one call of a program for all."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from ..data.batches import Batch, add_rows, eval_batches
from ..step.train_step import Rows, TrainState, weighted_means
from ..training.evaluation import join_rows, separate_rows
from .member_programs import Members
from .population import Population


class DeviceMembers:
    """Members that train together.

    A program has arrays of a fixed number of members; those that a unit lacks are zeros, not alive. A device that
    computes one member at a time skips them. One that computes several in parallel does not, so fewer members get a
    smaller program. Where a member is in the arrays depends on the devices, so checkpoints have them in order.

    Attributes:
      places: index of each member in the arrays.
      stacked: the arrays.
    """

    def __init__(self, population: Population, members: Sequence[Members]) -> None:
        self.population, self.programs = population, population.programs_for(len(members))
        self.places = spread(len(members), self.programs.size, population.mesh.size)
        empty = jax.tree.map(np.zeros_like, members[0])
        filled = dict(zip(self.places, members, strict=True))
        rows = [filled.get(place, empty) for place in range(self.programs.size)]
        stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *rows)
        # A compiled program moves no arguments, as jit would. It names their places as (args, kwargs); members are
        # the first of args.
        self.stacked = jax.device_put(stacked, self.programs.step.largest.input_shardings[0][0])

    def to_host(self) -> Members:
        """The members in order, stacked, in host memory."""
        return jax.tree.map(lambda leaf: leaf[self.places], jax.device_get(self.stacked))

    def step(self, batches: Sequence[Batch]) -> None:
        """Runs one training step of every member, each on its own batch."""
        rows = max(len(batch["weight"]) for batch in batches)
        padded = dict(zip(self.places, (add_rows(batch, rows) for batch in batches), strict=True))
        filler = padded[self.places[0]]  # any batch will do where there is no member
        parts = [padded.get(place, filler) for place in range(self.programs.size)]
        batch = jax.tree.map(lambda *columns: np.stack(columns), *parts)
        batch = jax.device_put(batch, self.programs.step.largest.input_shardings[0][2])
        # The step donates its members: the old arrays are gone once it is called.
        self.stacked = self.programs.step(self.stacked, self.population.parts.frozen, batch)

    def evaluate(self, split: Batch, between: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
        """Mean loss and metrics of each member over all rows of a split, NaN if it is not alive, and its `Rows`.

        `between` is called before each batch and may raise.
        """
        program, total, kept = self.programs.evaluate, dict[str, Any](), list[dict[str, Rows]]()
        for batch in eval_batches(split, self.population.batches.eval_rows):
            between()
            batch = jax.device_put(batch, program.input_shardings[0][2])
            pairs, rows = separate_rows(program(self.stacked, self.population.parts.frozen, batch))
            kept.append(rows)
            # Sums stay on the devices; reading them here would wait for every call. At most two are in flight, so
            # that `between` is called regularly.
            jax.block_until_ready(total)
            total = jax.tree.map(lambda a, b: a + b, total, pairs) if total else pairs
        values, alive, rows = jax.device_get((weighted_means(total), self.stacked.alive, kept))
        results = []
        for place in self.places:
            row = {name: float(column[place]) for name, column in values.items()}
            row = row if alive[place] else dict.fromkeys(row, math.nan)
            results.append(row | join_rows(jax.tree.map(lambda x, place=place: x[place], rows)))
        return results

    def time_evaluation(self, split: Batch) -> float:
        """Seconds that all devices together take for a member's evaluation batch, measured on the second of two."""
        programs, frozen = self.programs, self.population.parts.frozen
        devices = self.population.mesh.size
        # One member on each device; a device that computes several in parallel computes all its members.
        computed = devices if programs.at_once == 1 else programs.size
        alive = np.arange(programs.size) % (programs.size // devices) == 0
        members = self._with_alive(alive)
        batch = next(eval_batches(split, self.population.batches.eval_rows))
        batch = jax.device_put(batch, programs.evaluate.input_shardings[0][2])
        jax.block_until_ready(programs.evaluate(members, frozen, batch))
        began = time.perf_counter()
        jax.block_until_ready(programs.evaluate(members, frozen, batch))
        return (time.perf_counter() - began) / computed

    def retire(self, numbers: Iterable[int]) -> None:
        """Stops training these members."""
        alive = np.array(self.stacked.alive)
        alive[[self.places[number] for number in numbers]] = False
        self.stacked = self._with_alive(alive)

    def _with_alive(self, alive: np.ndarray) -> Members:
        # A compiled program takes arrays of its own shardings only.
        return self.stacked.replace(alive=jax.device_put(alive, self.stacked.alive.sharding))

    def as_state(self, clock: int) -> TrainState:
        """The members' changing state in order, as checkpoints store it, with `clock` as the step."""
        step: Any = np.int32(clock)
        return jax.device_put(_as_state(self.to_host(), step))


def state_like(population: Population, count: int) -> TrainState:
    """The shapes of `DeviceMembers.as_state` of so many members."""
    device = SingleDeviceSharding(jax.devices()[0])

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype, sharding=device)

    members = jax.tree.map(shape, population.programs.step.largest.args_info[0][0])
    return _as_state(members, jax.ShapeDtypeStruct((), np.int32, sharding=device))


def _as_state(members: Members, step: Any) -> TrainState:
    # A checkpoint has one step for all, so the members' own counters are stored with what they train.
    values = {"trainable": members.state.trainable, "step": members.state.step}
    values |= {"skipped": members.skipped, "alive": members.alive}
    return TrainState(values, members.state.opt_state, step, members.state.rng)


def stored_members(state: TrainState, first: Sequence[Members], numbers: Sequence[int]) -> list[Members]:
    """Members of a state from `DeviceMembers.as_state`.

    Args:
      state: state from a checkpoint.
      first: initial members, for their rates and scales.
      numbers: the number in the state of each of them.
    """
    values = jax.device_get(state.trainable)
    states = TrainState(values["trainable"], state.opt_state, values["step"], state.rng)
    stored = jax.device_get((states, values["skipped"], values["alive"]))

    def member(initial: Members, number: int) -> Members:
        member_state, skipped, alive = jax.tree.map(lambda leaf: leaf[number], stored)
        return initial.replace(state=member_state, skipped=skipped, alive=alive)

    return [member(initial, number) for initial, number in zip(first, numbers, strict=True)]


def spread(count: int, size: int, devices: int) -> list[int]:
    """Indices of `count` members among `size`, of which each device has a block: as many on each.

    >>> spread(3, size=8, devices=4)
    [0, 2, 4]
    """
    each = size // devices
    return [n % devices * each + n // devices for n in range(count)]
