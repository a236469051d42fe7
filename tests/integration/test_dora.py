"""Runs of variant dora: they start as the base, learn, resume, spread over devices and export."""

import jax
import numpy as np
import pytest

from loraplus_jax.adapter.tree import leaves_by_path
from loraplus_jax.cli.commands import main
from loraplus_jax.sweep.settings import SweepRun
from loraplus_jax.training.setup import prepare

from ..messages import assert_mentions
from .test_population import alone, member, swept, taken
from .test_quantized_base import SHORT
from .test_run import column, interrupt_at, printed_json, summary_of, tensor_bytes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]
DORA = (*SHORT, "--lora.variant", "dora")


def test_a_run_on_a_packed_base_learns_resumes_and_exports(talk, tmp_path, capsys):
    straight = talk.trained(*DORA, out=tmp_path / "straight")
    plain = talk.trained(*SHORT, out=tmp_path / "plain")
    summary = summary_of(straight)
    assert summary["before"]["loss"] == pytest.approx(summary_of(plain)["before"]["loss"], rel=1e-6)
    assert summary["after"]["loss"] < 0.9 * summary["before"]["loss"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 6)
        assert talk.train(*DORA) == 130
    assert talk.train(*DORA) == 0
    assert tensor_bytes(talk.out) == tensor_bytes(straight)
    capsys.readouterr()
    found = printed_json(capsys, "eval", str(talk.out))["loss"]
    assert found == pytest.approx(summary["after"]["loss"], rel=1e-5)
    assert main(["export", str(talk.out), "--to", str(tmp_path / "peft")]) == 0
    same = ("--merged", "--dequantized", "--to", str(tmp_path / "same"))
    assert main(["export", str(talk.out), *same]) == 0
    capsys.readouterr()
    for directory in (tmp_path / "peft", tmp_path / "same"):
        loss = printed_json(capsys, "eval", str(directory))["loss"]
        assert loss == pytest.approx(found, rel=1e-5), directory
    # The next run starts from it, and a run of variant lora does not.
    start = ("--init_adapter", str(tmp_path / "peft"))
    again = talk.trained(*DORA, *start, out=tmp_path / "again")
    assert summary_of(again)["before"]["loss"] == pytest.approx(found, rel=1e-5)
    assert talk.train(*SHORT, *start, "--output_dir", str(tmp_path / "other")) == 2
    assert_mentions(capsys.readouterr().err, "lora.variant", "dora")


@pytest.mark.long
@pytest.mark.parametrize("mesh", [("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")])
def test_eight_devices_and_one_agree(talk, tmp_path, mesh):
    one = talk.trained(*DORA, out=tmp_path / "one")
    many = talk.trained(*DORA, *mesh)
    for step, loss in column(one, "loss").items():
        assert column(many, "loss")[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.long
def test_a_member_of_a_population_equals_its_single_run(first_world, tmp_path):
    home = first_world.copy(tmp_path)
    run = swept(home, "--lora.variant", "dora", "--optimizer.magnitude_learning_rate", "2e-3")
    assert isinstance(run, SweepRun)
    entries = {0: (run.trials[0], 0), 1: (run.trials[-1], 3)}
    members = taken(run, entries, 20)
    ours, theirs = member(members, 1), alone(run, *entries[1], 20)
    first = leaves_by_path(prepare(run.settings_of(*entries[1])).parts.trainable)
    assert sum("lora_magnitude" in path for path in theirs) > 1
    for path, leaf in theirs.items():
        cut = ours[path][tuple(slice(size) for size in leaf.shape)]
        assert np.abs(cut - leaf).max() <= 1e-5, path
        assert not np.array_equal(leaf, jax.device_get(first[path])), path
