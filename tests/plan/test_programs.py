"""The programs beside the training step, and what they need."""

import dataclasses
from pathlib import Path

import pytest

from loraplus_jax import make_mesh
from loraplus_jax.plan.programs import bytes_between_steps, memory_sizes, plan_step
from loraplus_jax.plan.render import advice, format_plan

from ..messages import assert_mentions
from .tiny import fake, parts_of


def between_steps(settings):
    parts = parts_of(settings, Path(settings.model.path))
    return bytes_between_steps(settings, plan_step(settings, *parts, make_mesh()))


@pytest.mark.slow
def test_evaluation_and_theory_are_compiled_and_have_to_fit(planned):
    plan, settings = planned
    assert plan.theory is None
    many = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, eval_batch_size=8 * 4096, theory_every=10)
    )
    found = between_steps(many)
    assert [problem for _, problem in found.values()] == [None, None]
    large, theory = (size for size, _ in found.values())
    held = sum(plan.memory[name] for name in ("frozen weights", "trained", "optimizer"))
    assert held < plan.evaluation < 1e7
    assert large > plan.evaluation + 4095 * 3 * 32 * 4  # the batch alone
    assert theory > held
    tight = fake(plan, evaluation=large, room=2 * plan.needed)
    assert not tight.fits
    assert_mentions(format_plan(tight, settings), "does not fit", f"{(large - 2 * plan.needed) / 1e6:.2f} MB")
    (only,) = advice(tight, many)
    assert only.startswith("train.eval_batch_size below 32,768")
    assert_mentions(only, 8, "evaluation")
    assert len(advice(fake(tight, room=plan.needed - 1), many)) > 1
    tight = fake(plan, theory=10 * plan.needed, room=2 * plan.needed)
    assert not tight.fits
    assert "theory" in format_plan(tight, many)
    assert "theory" not in format_plan(plan, settings)
    (only,) = advice(tight, many)
    assert only.startswith("train.theory_every null")


@pytest.mark.parametrize(
    ("problem", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm", 20.5 * 2**30),
        ("RESOURCE_EXHAUSTED: required for HLO temporaries (8.02T) exceeds", 1000 + int(8.02 * 2**40)),
        ("RESOURCE_EXHAUSTED", 1000),
    ],
)
def test_sizes_from_the_compilers_message(problem, needed):
    assert memory_sizes(None, problem, 1000) == (needed - 1000, needed, 0)


@pytest.mark.slow
def test_evaluation_of_choices_is_reported_as_not_counted(planned):
    plan, settings = planned
    choices = dataclasses.replace(settings, task="multiple_choice")
    found = between_steps(choices)
    assert found == {"evaluation": (None, None), "theory": (None, None)}
    assert "evaluation is not counted" in format_plan(fake(plan, evaluation=None), choices)


@pytest.mark.slow
def test_the_beam_search_is_reported_as_not_counted(planned):
    plan, settings = planned
    assert "not counted" not in format_plan(plan, settings)
    assert "beam search" in format_plan(plan, dataclasses.replace(settings, task="generation"))
