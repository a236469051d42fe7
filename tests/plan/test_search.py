"""The search for a layout: what it may change, which layouts it counts and compiles, and what it selects."""

import dataclasses
import itertools
import random
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from loraplus_jax.plan import search as module
from loraplus_jax.plan.devices import GPUS, Tpu
from loraplus_jax.plan.plan import Plan, Work
from loraplus_jax.plan.render import explain_no_fit, format_search, search_command
from loraplus_jax.plan.search import COUNTED, LARGER, SETTINGS, TOO_LARGE, Layout, Search
from loraplus_jax.settings.parsing import parse_settings

from ..messages import assert_mentions
from .tiny import config, llama

pytestmark = pytest.mark.slow

CHIP = Tpu("tiny", memory=1e7, flops=1e9, memory_rate=1e9, link_rate=1e9, dimensions=2, most=8)


@pytest.fixture(scope="module")
def all_layouts(tmp_path_factory):
    settings = llama(tmp_path_factory.mktemp("model"))
    return settings, Search(settings, CHIP, jax.devices())


def layouts_of(search):
    return [trial.layout for trial in search.trials]


def test_a_layout_uses_all_devices_and_keeps_the_tokens_of_a_step(all_layouts):
    settings, search = all_layouts
    # All weights are split, or none; the tensor axis divides the two key heads.
    meshes = {(8, 1, 1), (1, 8, 1), (4, 1, 2), (1, 4, 2)}
    assert {layout.mesh for layout in layouts_of(search)} == meshes
    assert {layout.remat for layout in layouts_of(search)} == {"none", "dots", "full"}
    for layout in layouts_of(search):
        changed = layout.apply(settings)
        assert (8 // layout.accumulate) % (layout.data * layout.fsdp) == 0
        model = dataclasses.replace(changed.model, remat="none")
        train = dataclasses.replace(changed.train, accumulate=1)
        assert dataclasses.replace(changed, mesh=settings.mesh, model=model, train=train) == settings


def test_the_command_parses_to_the_layout_and_names_only_what_differs(tmp_path, all_layouts):
    _, search = all_layouts
    path, pinned = config(tmp_path, mesh={"data": 1, "fsdp": -1}), ["--lora.rank", "3"]
    settings = parse_settings(path, pinned)
    current = Layout(1, 8, 1, 1, "none")
    assert current.options(settings, current) == []
    for layout in layouts_of(search):
        options = layout.options(settings, current)
        assert layout_of(parse_settings(path, [*pinned, *options])) == layout
        assert {option.removeprefix("--") for option in options[::2]} <= set(SETTINGS.values())
    changed = ["--mesh.data", "4", "--mesh.fsdp", "2"]
    assert Layout(4, 2, 1, 1, "none").options(settings, current) == changed


def layout_of(settings):
    sizes = [8 if size == -1 else size for size in dataclasses.astuple(settings.mesh)]
    sizes[0] = 8 // sizes[1] // sizes[2]
    return Layout(*sizes, settings.train.accumulate, settings.model.remat)


def test_fixed_settings_stay_and_what_cannot_fit_is_out(tmp_path):
    settings = llama(tmp_path, model={"remat": "full"})
    chip = dataclasses.replace(CHIP, memory=1000)
    search = Search(settings, chip, jax.devices(), {"model.remat", "mesh.tensor"})
    assert {layout[2:3] + layout[4:] for layout in layouts_of(search)} == {(1, "full")}
    assert {trial.problem for trial in search.trials} == {TOO_LARGE}
    search.run()
    assert (search.complete, search.best) == (True, None)
    least = min(trial.needed for trial in search.trials)
    assert_mentions(explain_no_fit(search), f"{least / 1e3:.2f} kB")


def test_a_fixed_axis_is_kept_though_it_splits_some_weights_only(tmp_path):
    settings = parse_settings(config(tmp_path), ["--mesh.data=2", "--mesh.fsdp=-1"])
    search = Search(settings, CHIP, jax.devices(), {"mesh.data", "train.accumulate", "model.remat"})
    assert {layout.mesh for layout in layouts_of(search)} == {(2, 4, 1), (2, 2, 2)}


@pytest.mark.parametrize(
    ("sizes", "spanned"), [((1, 8, 1), (1, 2, 1)), ((2, 4, 1), (2, 1, 1)), ((2, 2, 2), (2, 1, 1))]
)
def test_hosts_along_the_axes_of_a_mesh(sizes, spanned):
    devices = np.array([SimpleNamespace(process_index=n // 4) for n in range(8)]).reshape(sizes)
    names = ("data", "fsdp", "tensor")
    mesh = SimpleNamespace(devices=devices, axis_names=names, shape=dict(zip(names, sizes, strict=True)))
    assert tuple(module.hosts_along(mesh, name) for name in names) == spanned


def test_what_crosses_hosts_is_estimated_at_the_rate_of_their_network(tmp_path, monkeypatch):
    settings = llama(tmp_path)
    gpu = dataclasses.replace(GPUS["h100"], link_rate=1e9, host_rate=1e6)

    def times(axis_between):
        monkeypatch.setattr(module, "hosts_along", lambda mesh, axis: 2 if axis == axis_between else 1)
        search = Search(settings, gpu, jax.devices(), {"train.accumulate", "model.remat"})
        return {trial.layout.mesh: trial.times["network"] for trial in search.trials}

    within, fsdp, tensor = times(None), times("fsdp"), times("tensor")
    assert within[8, 1, 1] == fsdp[8, 1, 1] == tensor[8, 1, 1] == 0
    assert fsdp[1, 8, 1] == pytest.approx(1000 * within[1, 8, 1])
    assert tensor[4, 1, 2] == pytest.approx(1000 * within[4, 1, 2])
    assert tensor[1, 8, 1] == within[1, 8, 1]


def costs(generator):
    """Made-up costs of a layout: (work, received bytes, memory)."""
    part = {name: generator.uniform(0.1, 3) for name in ("acts", "repeated", "weights")}
    flops = {"none": 1.0, "dots": generator.uniform(1, 1.3), "full": generator.uniform(1, 1.5)}
    saves = {"none": 3.0, "dots": 2.0, "full": 1.0}
    network = {mesh: generator.uniform(0, 1.5) for mesh in itertools.product((1, 2, 4, 8), repeat=3)}

    def cost(layout):
        work, weights = flops[layout.remat], part["weights"] * layout.accumulate / layout.tensor
        data = part["acts"] + part["repeated"] * layout.tensor
        data += weights * (1.0 if layout.fsdp > 1 else 0.5)
        memory = saves[layout.remat] / layout.accumulate + part["weights"] / layout.fsdp / layout.tensor
        return Work(2e9 * work, 1e9 * data * work), 1e9 * network[layout.mesh], 4e6 * memory

    return cost


@pytest.fixture
def fake_search(monkeypatch, all_layouts):
    """A function that makes a search over made-up costs, and returns the layouts that it compiles."""
    _, search = all_layouts

    def make(seed):
        cost, compiled = costs(random.Random(seed)), []

        def make_plan(settings, chip, devices, counted):
            layout = layout_of(settings)
            work, received, needed = cost(layout)
            compiled.append(layout)
            roofline = {"compute": work.flops / chip.flops, "memory": work.bytes / chip.memory_rate}
            fields = dict.fromkeys(Plan.__dataclass_fields__)
            fields |= {"needed": needed, "room": chip.memory, "work": work}
            return Plan(**fields | {"roofline": roofline | {"network": received / chip.link_rate}})

        monkeypatch.setattr(module, "plan_for", make_plan)
        monkeypatch.setattr(module, "count_work", lambda settings, *_: cost(layout_of(settings))[0])
        fresh = Search.__new__(Search)
        trials = [dataclasses.replace(trial, times=dict(trial.times)) for trial in search.trials]
        fresh.__dict__ |= vars(search) | {"trials": trials}
        return fresh, compiled

    return make


@pytest.mark.parametrize("seed", range(8))
def test_none_of_the_counted_layouts_is_faster_than_the_one_that_is_found(fake_search, all_layouts, seed):
    search, compiled = fake_search(seed)
    search.run()
    assert search.complete
    assert compiled[0] == search.current
    counted = [trial for trial in search.trials if trial.work is not None]
    assert len(compiled) <= len(counted)
    assert all(trial.problem or trial.seconds >= search.best.seconds for trial in counted)
    # What is left was no candidate, unless a compiled one of the last batch fits.
    left = [trial for trial in search.trials if trial.work is None and trial.problem is None]
    assert len(counted) >= COUNTED or all(trial.seconds >= search.best.seconds for trial in left)
    command = ["loraplus", "train", "a b.yaml"]
    text = search_command(search, all_layouts[0], command)
    assert text.startswith("loraplus train 'a b.yaml'")
    assert_mentions(format_search(search, all_layouts[0], command), f"{search.best.seconds:.3f}", text)


def test_what_does_not_fit_rules_out_larger_estimates_of_the_same_remat(fake_search):
    search, compiled = fake_search(0)
    search._chip = dataclasses.replace(CHIP, memory=1.0)
    search.run()
    assert (search.complete, search.best) == (True, None)
    assert_mentions(explain_no_fit(search), "no layout that was tried fits")
    assert len(compiled) < len(search.trials)
    assert {trial.problem for trial in search.trials} == {"does not fit", LARGER}


def test_an_interrupt_keeps_the_best_so_far(fake_search, all_layouts, monkeypatch):
    search, compiled = fake_search(0)

    count = module.count_work

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return count(*arguments)

    monkeypatch.setattr(module, "count_work", interrupted)
    search.run()
    assert (search.complete, search.received) == (False, signal.SIGINT)
    assert [trial.layout for trial in search.trials if trial.plan] == compiled == [search.current]
    assert sum(trial.work is not None for trial in search.trials) == 2  # the one in work was counted
    assert_mentions(format_search(search, all_layouts[0], []), "not compiled")
