"""The search for a layout: what it may change, and that it drops no layout that could be the fastest."""

import dataclasses
import itertools
import random

import jax
import pytest

from loraplus_jax.plan import search as module
from loraplus_jax.plan.plan import Plan, Work, plan_for
from loraplus_jax.plan.search import MARGIN, SETTINGS, TOO_LARGE, Layout, Search, least_bytes
from loraplus_jax.plan.text import explain_no_fit, format_search, search_command
from loraplus_jax.plan.tpu import Chip
from loraplus_jax.settings.parsing import parse_settings

from ..messages import assert_mentions
from .tiny import BERT, config, llama, settings_of

CHIP = Chip("tiny", hbm_bytes=1e7, flops=1e9, hbm_rate=1e9, ici_rate=1e9, dimensions=2, most=8)
NO_CHANGE = {"model.attention", "model.loss_chunk"}


@pytest.fixture(scope="module")
def all_layouts(tmp_path_factory):
    settings = llama(tmp_path_factory.mktemp("model"))
    return settings, Search(settings, CHIP, jax.devices())


def layouts_of(search):
    return [trial.layout for trial in search.trials]


def test_a_layout_uses_all_devices_and_keeps_the_tokens_of_a_step(all_layouts):
    settings, search = all_layouts
    assert {layout.size for layout in layouts_of(search)} == {8}
    assert {layout.tensor for layout in layouts_of(search)} == {1, 2}  # of two key heads
    assert {layout.remat for layout in layouts_of(search)} == {"none", "dots", "full"}
    # auto is xla at 32 tokens, so xla is no further layout.
    assert {layout.attention for layout in layouts_of(search)} == {"auto", "blocked"}
    for layout in layouts_of(search):
        changed = layout.apply(settings)
        assert (8 // layout.accumulate) % (layout.data * layout.fsdp) == 0
        assert (
            dataclasses.replace(
                changed,
                mesh=settings.mesh,
                model=dataclasses.replace(changed.model, remat="none", attention="auto", loss_chunk=512),
                train=dataclasses.replace(changed.train, accumulate=1),
            )
            == settings
        )


def test_the_command_parses_to_the_layout_and_names_only_what_differs(tmp_path, all_layouts):
    _, search = all_layouts
    path, pinned = config(tmp_path, mesh={"data": 1, "fsdp": -1}), ["--lora.rank", "3"]
    settings = parse_settings(path, pinned)
    current = Layout(1, 8, 1, 1, "none", "auto", 512)
    assert current.options(settings, current) == []
    for layout in layouts_of(search):
        options = layout.options(settings, current)
        parsed = parse_settings(path, [*pinned, *options])
        assert (
            Layout(
                *(8 if size == -1 else size for size in dataclasses.astuple(parsed.mesh)),
                parsed.train.accumulate,
                parsed.model.remat,
                parsed.model.attention,
                parsed.model.loss_chunk,
            )
            == layout
        )
        assert {option.removeprefix("--") for option in options[::2]} <= set(SETTINGS.values())
    assert Layout(4, 2, 1, 1, "none", "auto", 512).options(settings, current) == [
        *("--mesh.data", "4", "--mesh.fsdp", "2")
    ]


def test_fixed_settings_stay_and_what_cannot_fit_is_out(tmp_path):
    settings = llama(tmp_path, model={"remat": "full"})
    chip = dataclasses.replace(CHIP, hbm_bytes=1000)
    search = Search(settings, chip, jax.devices(), {"model.remat", "mesh.tensor", *NO_CHANGE})
    assert {layout[2:3] + layout[4:] for layout in layouts_of(search)} == {(1, "full", "auto", 512)}
    assert {layout.mesh for layout in layouts_of(search)} == {(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1)}
    assert {trial.problem for trial in search.trials} == {TOO_LARGE}
    search.run()
    assert (search.complete, search.best) == (True, None)
    least = min(trial.needed for trial in search.trials)
    assert_mentions(explain_no_fit(search), f"{least / 1e3:.2f} kB")


def test_an_encoder_has_no_layouts_of_language_models(tmp_path):
    settings = settings_of(tmp_path, BERT, task="classification", targets=("query",))
    search = Search(settings, CHIP, jax.devices())
    assert {layout[4:] for layout in layouts_of(search)} == {("none", "auto", 512)}
    assert {layout.tensor for layout in layouts_of(search)} == {1, 2}


def costs(generator):
    """Made-up costs of a layout that obey what a search assumes: (work, received bytes, memory)."""
    part = {name: generator.uniform(0.1, 3) for name in ("acts", "repeated", "weights", "logits")}
    flops = {"none": 1.0, "dots": generator.uniform(1, 1.3), "full": generator.uniform(1, 1.5)}
    slow = {"auto": 1.0, "xla": 1.0, "blocked": generator.uniform(0.8, 1.2)}
    saves = {"none": 3.0, "dots": 2.0, "full": 1.0}
    network = {mesh: generator.uniform(0, 1.5) for mesh in itertools.product((1, 2, 4, 8), repeat=3)}

    def cost(layout):
        work, weights = flops[layout.remat], part["weights"] * layout.accumulate / layout.tensor
        data = part["acts"] * slow[layout.attention] + part["repeated"] * layout.tensor
        data += weights * (1.0 if layout.fsdp > 1 else 0.5)
        memory = saves[layout.remat] / layout.accumulate + part["weights"] / layout.fsdp / layout.tensor
        return (
            Work(2e9 * work * slow[layout.attention], 1e9 * data * work),
            1e9 * network[layout.mesh],
            4e6 * memory + 4 * part["logits"] * 256 * layout.loss_chunk,
        )

    return cost


def layout_of(settings):
    mesh, model = settings.mesh, settings.model
    data = 8 // mesh.fsdp // mesh.tensor
    return Layout(
        data,
        mesh.fsdp,
        mesh.tensor,
        settings.train.accumulate,
        *(model.remat, model.attention, model.loss_chunk),
    )


@pytest.fixture
def fake_search(monkeypatch, all_layouts):
    """A function that makes a search over made-up costs, and the plan of a layout by them."""
    settings, search = all_layouts

    def make(seed):
        cost, compiled = costs(random.Random(seed)), []

        def make_plan(settings, chip, devices, counted):
            layout = layout_of(settings)
            work, received, needed = cost(layout)
            compiled.append(layout)
            roofline = {"compute": work.flops / chip.flops, "memory": work.bytes / chip.hbm_rate}
            fields = dict.fromkeys(Plan.__dataclass_fields__)
            fields |= {"needed": needed, "room": chip.hbm_bytes, "work": work}
            return Plan(**fields | {"roofline": roofline | {"network": received / chip.ici_rate}})

        monkeypatch.setattr(module, "plan_for", make_plan)
        monkeypatch.setattr(module, "count_work", lambda settings, *_: cost(layout_of(settings))[0])
        fresh = Search.__new__(Search)
        trials = [dataclasses.replace(trial) for trial in search.trials]
        fresh.__dict__ |= vars(search) | {"trials": trials, "_bytes": {}}
        return fresh, compiled, lambda layout: make_plan(layout.apply(settings), CHIP, None, None)

    return make


@pytest.mark.parametrize("seed", range(8))
def test_no_layout_is_faster_than_the_one_that_is_found(fake_search, all_layouts, seed):
    search, compiled, plan_of = fake_search(seed)
    search.run()
    number = len(compiled)
    assert search.complete
    assert compiled[0] == search.current
    plans = [plan_of(layout) for layout in layouts_of(search)]
    fastest = min(max(plan.roofline.values()) for plan in plans if plan.fits)
    assert search.best.seconds <= fastest / (1 - MARGIN)
    assert number < len(plans) / 4
    command = ["loraplus", "train", "a b.yaml"]
    text = search_command(search, all_layouts[0], command)
    assert text.startswith("loraplus train 'a b.yaml'")
    assert_mentions(format_search(search, all_layouts[0], command), f"{search.best.seconds:.3f}", text)


def test_a_compiled_small_chunk_bounds_the_memory_of_large_ones(fake_search):
    search, _, plan_of = fake_search(0)
    before = [trial.needed for trial in search.trials]
    search._compile(min(search.trials, key=lambda trial: trial.layout.loss_chunk))
    assert [trial.needed for trial in search.trials] != before
    for trial, first in zip(search.trials, before, strict=True):
        assert trial.needed <= max(first, plan_of(trial.layout).needed)


def test_an_interrupt_keeps_the_best_so_far(fake_search, all_layouts, monkeypatch):
    search, compiled, _ = fake_search(0)

    count_work = module.count_work

    def interrupt_second(*arguments):
        if compiled:
            raise KeyboardInterrupt
        return count_work(*arguments)

    monkeypatch.setattr(module, "count_work", interrupt_second)
    search.run()
    assert not search.complete
    assert [trial.layout for trial in search.trials if trial.plan] == compiled == [search.current]
    assert_mentions(format_search(search, all_layouts[0], []), "interrupted")


def test_bytes_follow_from_counts_of_other_layouts():
    def layout(tensor, accumulate, fsdp=4, attention="xla"):
        return Layout(1, fsdp, tensor, accumulate, "none", attention, 0)

    def count(tensor, accumulate, fsdp=4, attention="xla"):
        weights = (20 + 10 * (fsdp > 1)) * accumulate / tensor
        return {"xla": 60, "blocked": 50}[attention] + 5 * tensor + weights

    first = {layout(1, 1): count(1, 1)}  # 95, of which all may be weights
    assert least_bytes(first, layout(2, 2)) == pytest.approx(95, rel=2 * MARGIN)
    assert least_bytes(first, layout(2, 1)) == pytest.approx(95 / 2, rel=2 * MARGIN)
    assert least_bytes(first, layout(1, 1, attention="blocked")) == pytest.approx(0)
    cases = [(1, 1), (2, 1), (4, 1), (1, 1, 1), (1, 1, 4, "blocked")]
    counts = {layout(*case): count(*case) for case in cases}
    for case in [(8, 1), (4, 2), (2, 1, 1), (4, 1, 4, "blocked"), (8, 2, 1, "blocked")]:
        assert least_bytes(counts, layout(*case)) == pytest.approx(count(*case), rel=0.1)
        assert least_bytes(counts, layout(*case)) <= count(*case)
    assert least_bytes({layout(1, 1): 1.0, layout(2, 2): 0.5}, layout(4, 4)) == 0  # no such bytes


@pytest.mark.long
def test_bounds_hold_and_the_best_of_all_is_found(tmp_path, monkeypatch):
    settings, devices, counted = llama(tmp_path), jax.devices()[:2], {}
    search = Search(settings, CHIP, devices, {"train.accumulate", "mesh.tensor", *NO_CHANGE})
    bounds = {trial.layout: (trial.needed, dict(trial.times)) for trial in search.trials}
    plans = {layout: plan_for(layout.apply(settings), CHIP, devices, counted) for layout in bounds}
    for layout, (needed, times) in bounds.items():
        assert needed <= plans[layout].needed
        assert all(seconds <= plans[layout].roofline[name] for name, seconds in times.items())
    search._counted = counted  # and no program is compiled twice
    by_settings = {str(layout.apply(settings)): plan for layout, plan in plans.items()}
    monkeypatch.setattr(module, "plan_for", lambda settings, *_: by_settings[str(settings)])
    search.run()
    fastest = min(max(plan.roofline.values()) for plan in plans.values())
    assert search.best.seconds <= fastest / (1 - MARGIN)
    assert sum(trial.plan is not None for trial in search.trials) < len(plans)
