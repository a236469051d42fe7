"""Plans on the CPU: costs against programs of all layers, sizes against shapes."""

import dataclasses

import jax
import pytest

from loraplus_jax import make_mesh
from loraplus_jax.plan.plan import count_work, head_bytes, make_plan, replace_depth
from loraplus_jax.plan.programs import plan_step
from loraplus_jax.tasks.interface import row_count
from loraplus_jax.training.setup import task_module

from ..marks import long
from ..messages import mentions
from .tiny import BERT, RANK, llama, parts_of, settings_of


def cost(settings, base, data, mesh):
    return plan_step(settings, base, data, mesh).lowered.compile().cost_analysis()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "devices"), [long("llama", 2), ("bert", 1)])
def test_costs_of_all_layers_follow_from_those_of_one_and_two(tmp_path, kind, devices):
    if kind == "llama":
        settings = llama(tmp_path, model={"remat": "full"})
    else:  # on one device: on a mesh XLA's CPU compiler repeats the embedding's lookup in more and more places
        settings = settings_of(tmp_path, BERT, task="classification", targets=("query", "value"))
    mesh, (base, data) = make_mesh(devices), parts_of(settings, tmp_path)
    whole = cost(settings, replace_depth(base, base.model.config.num_hidden_layers), data, mesh)
    work = count_work(settings, base, data, mesh)
    assert work.flops == pytest.approx(whole["flops"], rel=0.01)
    assert work.bytes == pytest.approx(whole["bytes accessed"], rel=0.02)
    loop = base._replace(model=base.model.clone(unroll=False))
    assert cost(settings, loop, data, mesh)["flops"] < 0.7 * whole["flops"]  # a loop's body counts once


@pytest.mark.slow
def test_costs_where_some_layers_are_adapted(tmp_path):
    settings, mesh = llama(tmp_path, layers=(3, 4), targets="all-linear"), make_mesh(1)  # and the head is not
    base, data = parts_of(settings, tmp_path)
    whole = cost(settings, replace_depth(base, 5), data, mesh)
    work = count_work(settings, base, data, mesh)
    assert work.flops == pytest.approx(whole["flops"], rel=0.01)
    assert work.bytes == pytest.approx(whole["bytes accessed"], rel=0.02)


@pytest.mark.slow
def test_micro_batches_and_pieces_of_the_loss_are_counted(tmp_path):
    mesh = make_mesh(1)
    plain = llama(tmp_path)
    base, data = parts_of(plain, tmp_path)
    one = count_work(plain, base, data, mesh)
    cut = llama(tmp_path, train={"accumulate": 4}, model={"loss_chunk": 16})
    four = count_work(cut, base, data, mesh)
    assert four.flops == pytest.approx(one.flops, rel=0.02)
    assert four.bytes > one.bytes  # weights are read four times


@pytest.mark.slow
def test_the_head_is_read_twice_for_each_further_piece_of_the_loss(tmp_path):
    settings = llama(tmp_path, model={"loss_chunk": 64, "dtype": "bfloat16"})  # 8 rows of 8 tokens: 4 pieces
    base, data = parts_of(settings, tmp_path)
    step = plan_step(settings, base, data, make_mesh(1))
    assert head_bytes(settings, step.parts, make_mesh(1)) == 3 * 2 * 256 * 32 * 2
    assert head_bytes(settings, step.parts, make_mesh(1, 1, 2)) == 3 * 2 * 256 * 32


@pytest.mark.slow
def test_bytes_of_what_is_held_are_those_of_the_program(planned):
    plan, _ = planned
    held = {name: size for name, size in plan.memory.items() if name != "temporaries"}
    layer = 2 * (32 * 32 + 32 * 16) + 3 * 32 * 64 + 2 * 32
    assert held["frozen weights"] == 4 * (5 * layer + 2 * 256 * 32 + 32)
    adapters = 5 * RANK * ((32 + 32) + (32 + 16))
    assert held["trained"] == 4 * adapters
    assert (plan.trained, plan.total - plan.trained) == (adapters, held["frozen weights"] // 4)
    assert held["batch"] == 8 * (3 * 32 + 1) * 4 // plan.devices
    # Beside them the program takes the step, the key and the optimizer's counters, and has its own code.
    assert 0 <= plan.needed - sum(plan.memory.values()) < 4096
    assert plan.fits
    assert (plan.devices, plan.layers, plan.mesh["data"]) == (jax.device_count(), 5, jax.device_count())


@pytest.mark.slow
def test_only_gradients_of_adapters_are_communicated(planned):
    plan, _ = planned
    assert {c.kind for c in plan.collectives} == {"all-reduce"}
    total = sum(c.times * c.bytes for c in plan.collectives)
    assert 4 * plan.trained <= total <= 4 * plan.trained + 64  # and the sums of loss and weight


@pytest.mark.parametrize("task", ["classification", "regression", "instruction"])
def test_columns_without_data_are_those_of_data(tmp_path, task):
    settings = (
        llama(tmp_path)
        if task == "instruction"
        else settings_of(tmp_path, BERT, task=task, targets=("query",))
    )
    data = task_module(settings).placeholder_data(settings)
    assert row_count(data.splits["train"]) == 1
    assert data.task.kind == task


def test_an_encoder_takes_no_longer_rows_than_it_has_positions(tmp_path):
    settings = settings_of(tmp_path, BERT, task="classification", targets=("query",))
    long = dataclasses.replace(settings, data=dataclasses.replace(settings.data, max_length=65))
    with pytest.raises(ValueError, match=mentions("data.max_length", 65, 64)):
        make_plan(long)
