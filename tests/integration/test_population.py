"""Members of a population equal their single runs, whatever else is in the program with them."""

import jax
import numpy as np
import pytest

from loraplus_jax import init_state
from loraplus_jax.adapter.tree import leaves_by_path
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.step.sharding import shard_batch
from loraplus_jax.sweep import member_programs
from loraplus_jax.sweep.device_members import DeviceMembers, stored_members
from loraplus_jax.sweep.population import abstract_population, prepare_population
from loraplus_jax.sweep.settings import SweepRun
from loraplus_jax.sweep.trial import Trial
from loraplus_jax.training.setup import prepare

from .runs import flags

pytestmark = pytest.mark.slow

STEPS = 12
# All that draws random numbers or cuts a batch is on.
ODD = flags(
    "--model.dropout 0.1 --lora.dropout 0.1 --model.head_dropout 0.1 --train.accumulate 2"
    " --optimizer.weight_decay 0.01 --optimizer.schedule linear --train.steps 100 --sweep.ranks [2,4]"
)
ENTRIES = (
    (Trial(1e-3, 16.0, 16.0, 4), 0),
    (Trial(1e-3, 1.0, 16.0, 4), 3),
    (Trial(3e-4, 4.0, 32.0, 2), 0),
    (Trial(1e30, 4.0, 16.0, 4), 0),
)
DIVERGES = 3


def swept(world, *overrides):
    return parse_settings(world.config, [*ODD, *overrides], SweepRun)


def taken(run, entries, steps=STEPS, at_once=None):
    """A population after some steps."""
    population = prepare_population(abstract_population(run), len(entries), at_once)
    members = DeviceMembers(population, [population.first(*entry) for entry in entries])
    for step in range(steps):
        members.step([population.batches.batch(seed, step) for _, seed in entries])
    return members


def member(members, number):
    """What a member trains."""
    return {path: leaf[number] for path, leaf in leaves_by_path(members.to_host().state.trainable).items()}


def alone(run, trial, seed, steps=STEPS):
    """The single run that `loraplus train` makes of it."""
    single = prepare(run.settings_of(trial, seed))
    state = init_state(single.parts.trainable, single.tx, jax.random.fold_in(jax.random.key(seed), 1))
    for step in range(steps):
        batch = shard_batch(single.batches.batch(seed, step), single.mesh)
        state, _ = single.programs.step(state, single.parts.frozen, batch)
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(state.trainable).items()}


@pytest.fixture(scope="module")
def home(first_world, tmp_path_factory, cache):
    return first_world.copy(tmp_path_factory.mktemp("population"))


@pytest.fixture(scope="module")
def made():
    """Whether each program that is compiled for `members` trains."""
    return []


@pytest.fixture(scope="module")
def members(home, made):
    original = member_programs.map_members

    def recorded(one, in_axes, **options):
        made.append(in_axes[2] is not None)
        return original(one, in_axes, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member_programs, "map_members", recorded)
        return taken(swept(home), ENTRIES)


def test_a_member_equals_its_single_run(home, members):
    """The one whose factors are wider than its rank."""
    found, (trial, seed) = member(members, 2), ENTRIES[2]
    single = alone(swept(home), trial, seed)
    assert found.keys() == single.keys()
    for path, leaf in single.items():
        cut = found[path][tuple(slice(size) for size in leaf.shape)]
        assert np.abs(cut - leaf).max() <= 1e-5, path


def test_the_columns_above_a_members_rank_stay_exactly_zero(members):
    found = member(members, 2)
    a, b = (next(v for path, v in found.items() if path.endswith(name)) for name in ("lora_a", "lora_b"))
    assert a[..., :2].any()
    assert b[..., :2, :].any()
    assert not a[..., 2:].any()
    assert not b[..., 2:, :].any()


def test_a_member_that_diverges_is_stopped_where_it_was_and_harms_nobody(members):
    assert members.to_host().alive.tolist() == [True, True, True, False]
    steps = members.to_host().state.step
    assert steps.tolist()[:3] == [STEPS] * 3
    assert 5 <= steps[DIVERGES] <= 10  # train.max_skipped is 5, and a step or two are taken before
    assert all(np.isfinite(leaf).all() for leaf in member(members, DIVERGES).values())
    found = members.evaluate(members.population.data.splits["validation"])
    assert np.isnan(found[DIVERGES]["loss"])
    assert np.isfinite(found[0]["loss"])


@pytest.mark.long
def test_members_continue_on_any_number_of_devices(home, members):
    saved = members.as_state(7)
    assert {len(leaf) for leaf in jax.tree.leaves((saved.trainable, saved.opt_state, saved.rng))} == {4}
    numbers = (0, 2, 3)
    first = [members.population.first(*ENTRIES[n]) for n in numbers]
    population = prepare_population(abstract_population(swept(home, "--mesh.data", "8")), len(ENTRIES))
    other = DeviceMembers(population, stored_members(saved, first, numbers))
    assert len(other.stacked.alive) == 8
    for n, number in enumerate(numbers):
        assert all((member(other, n)[path] == leaf).all() for path, leaf in member(members, number).items())
    assert other.to_host().alive.tolist() == [True, True, False]
    for path, leaf in leaves_by_path(other.as_state(7)).items():
        expected = np.array(leaves_by_path(saved)[path])
        assert (np.asarray(leaf) == (expected if path == "step" else expected[[0, 2, 3]])).all(), path


def test_the_base_is_held_once_and_each_program_compiled_once(members, made):
    assert sorted(made) == [False, True]
    frozen, state = jax.tree.leaves(members.population.parts.frozen), jax.tree.leaves(members.stacked)
    held = sum(leaf.nbytes for leaf in (*frozen, *state))
    run = members.population.run
    batches = len(ENTRIES) * run.train.batch_size * (3 * run.data.max_length + 2) * 4
    arguments = members.population.programs.step.largest.memory_analysis().argument_size_in_bytes
    assert held <= arguments <= held + batches + 64 * len(state)


class Recorded:
    """A compiled step that records which members are alive when it is called."""

    def __init__(self, step):
        self.step, self.alive = step, []

    def __getattr__(self, name):
        return getattr(self.step, name)

    def __call__(self, members, *rest):
        self.alive.append(np.asarray(members.alive).tolist())
        return self.step(members, *rest)


@pytest.mark.long
def test_where_there_is_no_cpu_a_short_measurement_chooses_the_members_at_once(home, monkeypatch):
    """The device's kind and the times are stand-ins; the programs are real."""
    monkeypatch.setattr(member_programs, "skips_measurement", lambda device: False)
    asked, measured = [], member_programs._measured

    def stand_in(step, mesh, at_once):
        asked.append(at_once)
        return {1: 1.0, 2: 0.5, 4: 0.49}[at_once]

    monkeypatch.setattr(member_programs, "_measured", stand_in)
    run = swept(home, "--train.max_skipped", "1")
    population = prepare_population(abstract_population(run), 4)
    assert asked == [1, 2, 4]
    programs = population.programs
    assert (programs.at_once, programs.size) == (2, 2)
    # Few members have a small program, the one that was measured.
    assert [population.programs_for(count).at_once for count in (4, 3, 2, 1)] == [2, 2, 2, 1]
    assert asked == [1, 2, 4]
    assert population.programs_for(2) is population.programs_for(2)
    # A sweep that began on more devices has larger units.
    assert population.programs_for(4).size == 4
    # Members on zeros have no finite loss; they would stop, and cost nothing, before the last timed call.
    recorded = Recorded(population.programs_for(2).step.largest)
    assert measured(recorded, population.mesh, 2) > 0
    assert recorded.alive == [[True, True]] * 4
