"""Plans on the CPU: costs against programs of all layers, sizes against shapes."""

import dataclasses

import jax
import pytest

from loraplus_jax import make_mesh
from loraplus_jax.plan.plan import count_work, head_bytes, make_plan, replace_depth
from loraplus_jax.plan.programs import plan_step
from loraplus_jax.training.setup import task_class

from ..messages import mentions
from .tiny import BERT, LAYERS, RANK, llama, parts_of, settings_of


def cost(settings, base, task, mesh):
    return plan_step(settings, base, task, mesh).lowered.compile().cost_analysis()


@pytest.mark.slow
def test_costs_of_all_layers_follow_from_those_of_one_and_two(tmp_path):
    """On one device: on a mesh XLA's CPU compiler repeats the embedding's lookup in more and more places."""
    settings = settings_of(tmp_path, BERT, task="classification", targets=("query", "value"))
    mesh, (base, task) = make_mesh(1), parts_of(settings, tmp_path)
    whole = cost(settings, replace_depth(base, base.model.config.num_hidden_layers), task, mesh)
    work = count_work(settings, base, task, mesh)
    assert work.flops == pytest.approx(whole["flops"], rel=0.01)
    assert work.bytes == pytest.approx(whole["bytes accessed"], rel=0.02)
    loop = base._replace(model=base.model.clone(unroll=False))
    assert cost(settings, loop, task, mesh)["flops"] < 0.7 * whole["flops"]  # a loop's body counts once


@pytest.mark.slow
def test_costs_of_some_adapted_layers_micro_batches_and_pieces_of_the_loss(tmp_path):
    options, mesh = {"layers": (1, 2), "targets": "all-linear"}, make_mesh(1)  # and the head is not adapted
    settings = llama(tmp_path, **options)
    base, task = parts_of(settings, tmp_path)
    whole = cost(settings, replace_depth(base, LAYERS), task, mesh)
    work = count_work(settings, base, task, mesh)
    assert work.flops == pytest.approx(whole["flops"], rel=0.01)
    assert work.bytes == pytest.approx(whole["bytes accessed"], rel=0.02)
    cut = llama(tmp_path, train={"accumulate": 4}, model={"loss_chunk": 16}, **options)
    four = count_work(cut, base, task, mesh)
    assert four.flops == pytest.approx(work.flops, rel=0.02)
    assert four.bytes > work.bytes  # weights are read four times
    # The head is read twice for each further piece of the loss: 8 rows of 32 tokens are 4 pieces.
    cut = llama(tmp_path, model={"loss_chunk": 64, "dtype": "bfloat16"}, **options)
    parts = plan_step(cut, base, task, mesh).parts
    assert head_bytes(cut, parts, mesh) == 3 * 2 * 256 * 32 * 2
    assert head_bytes(cut, parts, make_mesh(1, 1, 2)) == 3 * 2 * 256 * 32


@pytest.mark.slow
def test_bytes_of_what_is_held_are_those_of_the_program(planned):
    plan, _ = planned
    held = {name: size for name, size in plan.memory.items() if name != "temporaries"}
    layer = 2 * (32 * 32 + 32 * 16) + 3 * 32 * 64 + 2 * 32
    assert held["frozen weights"] == 4 * (LAYERS * layer + 2 * 256 * 32 + 32)
    adapters = LAYERS * RANK * ((32 + 32) + (32 + 16))
    assert held["trained"] == 4 * adapters
    assert (plan.trained, plan.total - plan.trained) == (adapters, held["frozen weights"] // 4)
    assert held["batch"] == 8 * (3 * 32 + 1) * 4 // plan.devices
    # Beside them the program takes the step, the key and the optimizer's counters, and has its own code.
    assert 0 <= plan.needed - sum(plan.memory.values()) < 4096
    assert plan.fits
    assert (plan.devices, plan.layers, plan.mesh["data"]) == (jax.device_count(), LAYERS, jax.device_count())


@pytest.mark.slow
def test_only_gradients_of_adapters_are_communicated(planned):
    plan, _ = planned
    assert {c.kind for c in plan.collectives} == {"all-reduce"}
    total = sum(c.times * c.bytes for c in plan.collectives)
    assert 4 * plan.trained <= total <= 4 * plan.trained + 64  # and the sums of loss and weight


@pytest.mark.parametrize("task", ["classification", "regression", "instruction"])
def test_batches_without_data_have_full_rows(tmp_path, task):
    settings = (
        llama(tmp_path)
        if task == "instruction"
        else settings_of(tmp_path, BERT, task=task, targets=("query",))
    )
    planned = task_class(settings).without_data(settings.task_options)
    assert planned.kind == task
    batches, train = planned.full_batches(settings.task_options), settings.train
    assert (batches.train_rows, batches.eval_rows) == (train.batch_size, train.eval_batch_size)
    assert batches.train["input_ids"].shape == (train.batch_size, settings.data.max_length)


def test_an_encoder_takes_no_longer_rows_than_it_has_positions(tmp_path):
    settings = settings_of(tmp_path, BERT, task="classification", targets=("query",))
    long = dataclasses.replace(settings, data=dataclasses.replace(settings.data, max_length=65))
    with pytest.raises(ValueError, match=mentions("data.max_length", 65, 64)):
        make_plan(long)
