"""The theory's terms as metrics of whole runs, beside what `test_run.py` and `test_language.py` prove of them."""

import jax
import pytest

from loraplus_jax.settings.parsing import parse_settings

from .runs import flags, rows_of, stopped, summary_of, tensor_bytes

pytestmark = pytest.mark.long

AXES = flags("--mesh.data 2 --mesh.fsdp 2")
SHORT = flags("--train.steps 8 --train.eval_every 4 --train.log_every 4")


def apart(rows):
    """Rows of the theory, and the others."""
    theory = [row for row in rows if any(name.startswith("theory/") for name in row)]
    return theory, [row for row in rows if row not in theory]


def test_measurements_may_change_on_resume_and_the_adapter_is_that_without_any(world):
    straight = world.trained(*SHORT, out=world.directory / "straight")
    stopped(world, 5, *SHORT, "--train.theory_every", "2")
    assert world.train(*SHORT, "--train.theory_every", "1") == 0
    theory, others = apart(rows_of(world.out))
    assert [row["step"] for row in theory] == [2, 4, 6, 7, 8]
    assert others == rows_of(straight)
    assert "theory" not in summary_of(straight)
    assert tensor_bytes(world.out) == tensor_bytes(straight)


def test_a_batch_and_weights_split_over_devices_are_measured_alike(world):
    one = world.trained(*SHORT, "--train.theory_every", "8", out=world.directory / "one")
    four = world.trained(*SHORT, "--train.theory_every", "8", *AXES, out=world.directory / "four")
    (first,), (second,) = apart(rows_of(one))[0], apart(rows_of(four))[0]
    assert first == pytest.approx(second, rel=1e-3)


def test_at_every_tenth_step_it_takes_less_than_a_twentieth_of_the_training(world):
    """By the FLOPs of the compiled programs, all layers counted."""
    from loraplus_jax.training.setup import prepare

    jax.config.update("jax_disable_most_optimizations", False)
    overrides = ("--model.unroll", "true", "--train.theory_every", "10", "--output_dir", str(world.out))
    programs = prepare(parse_settings(world.config, overrides)).programs
    step, theory = (p.cost_analysis()["flops"] for p in (programs.step.largest, programs.theory))
    assert 0.05 * step < theory < 0.5 * step
