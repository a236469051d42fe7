"""Runs of variant dora: they start as the base, learn, resume, spread over devices and export."""

import jax
import numpy as np
import pytest

from loraplus_jax.adapter.tree import leaves_by_path
from loraplus_jax.sweep.settings import SweepRun
from loraplus_jax.training.setup import prepare

from ..messages import assert_mentions
from .runs import MESH, SHORT_TALK, assert_resumes, assert_same_losses, evaluated, printed, summary_of
from .test_population import assert_equal_to_single_run, member, swept, taken

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
NF4 = (*SHORT_TALK, "--model.quantize", "nf4")
DORA = (*NF4, "--lora.variant", "dora")


@pytest.mark.long
def test_a_run_on_a_quantized_base_learns_resumes_and_exports(talk, tmp_path, capsys):
    straight = talk.trained(*DORA, out=tmp_path / "straight")
    plain = talk.trained(*NF4, "--train.steps", "4", out=tmp_path / "plain")
    summary = summary_of(straight)
    assert summary["before"]["loss"] == pytest.approx(summary_of(plain)["before"]["loss"], rel=1e-6)
    assert summary["after"]["loss"] < 0.9 * summary["before"]["loss"]
    assert_resumes(talk, straight, *DORA)
    found = evaluated(capsys, talk.out)["loss"]
    assert found == pytest.approx(summary["after"]["loss"], rel=1e-5)
    for name, more in (("peft", ()), ("same", ("--merged", "--dequantized"))):
        printed(capsys, "export", talk.out, "--to", tmp_path / name, *more)
        assert evaluated(capsys, tmp_path / name)["loss"] == pytest.approx(found, rel=1e-5), name
    # The next run starts from it, and a run of variant lora does not.
    start = ("--init_adapter", str(tmp_path / "peft"))
    again = talk.trained(*DORA, *start, out=tmp_path / "again")
    assert summary_of(again)["before"]["loss"] == pytest.approx(found, rel=1e-5)
    assert talk.train(*NF4, *start, "--output_dir", str(tmp_path / "other")) == 2
    assert_mentions(capsys.readouterr().err, "lora.variant", "dora")


@pytest.mark.long
def test_eight_devices_and_one_agree(talk, tmp_path):
    one = talk.trained(*DORA, out=tmp_path / "one")
    assert_same_losses(talk.trained(*DORA, *MESH), one)


@pytest.mark.long
def test_a_member_of_a_population_equals_its_single_run(first_world, tmp_path):
    home = first_world.copy(tmp_path)
    run = swept(home, "--lora.variant", "dora", "--optimizer.magnitude_learning_rate", "2e-3")
    assert isinstance(run, SweepRun)
    entries = {0: (run.trials[0], 0), 1: (run.trials[-1], 3)}
    theirs = assert_equal_to_single_run(run, member(taken(run, entries, 20), 1), entries[1], 20)
    first = leaves_by_path(prepare(run.settings_of(*entries[1])).parts.trainable)
    assert sum("lora_magnitude" in path for path in theirs) > 1
    for path, leaf in theirs.items():
        assert not np.array_equal(leaf, jax.device_get(first[path])), path
