"""`loraplus combine` on adapters that were never trained: what evaluates, generates and exports its result."""

import json
import shutil

import pytest

from loraplus_jax.cli.commands import COMBINE, main
from loraplus_jax.interop.adapter_directory import load_adapter, read_adapter_json
from loraplus_jax.interop.combination import OPTIONS, How, get_args

from ..integration.runs import ASKED, evaluated, near, printed, rejected
from ..messages import assert_mentions
from .conftest import with_adapter

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def run(first_talk, tmp_path_factory, cache):
    return with_adapter(first_talk, tmp_path_factory.mktemp("run"))


def test_the_command_has_the_ways_and_options_of_the_library():
    assert COMBINE["--how"]["choices"] == get_args(How)
    assert {f"--{name}" for name in OPTIONS} <= COMBINE.keys()


@pytest.mark.slow
def test_halves_of_one_adapter_in_either_format_make_the_adapter(run, tmp_path, capsys):
    copy, out = shutil.copytree(run.out / "adapter", tmp_path / "copy"), tmp_path / "out"
    told = printed(capsys, "combine", f"{run.out}=0.5", f"{copy}=0.5", "--how", "cat", "--out", out)
    assert_mentions(told, out, "cat", 2, 8)
    notes, source = read_adapter_json(out), read_adapter_json(copy)
    assert {name: notes[name] for name in ("settings", "task", "base", "identity")} == {
        name: source[name] for name in ("settings", "task", "base", "identity")
    }
    first, second = notes["combined"].pop("adapters")
    assert notes["combined"] == {"how": "cat"}
    assert (first["name"], second["name"], first["weight"]) == ("out", "copy", 0.5)
    assert first["files"] == second["files"]
    assert first["files"].keys() == {"adapter.json", "adapter.safetensors"}
    exact, answer = evaluated(capsys, run.out), printed(capsys, "generate", run.out, *ASKED)
    assert near(evaluated(capsys, out), exact)
    assert printed(capsys, "generate", out, *ASKED) == answer
    for name, flags in (("peft", ()), ("merged", ("--merged",))):
        printed(capsys, "export", out, "--to", tmp_path / name, *flags)
        assert near(evaluated(capsys, tmp_path / name), exact)
        assert "cat of 0.5 out + 0.5 copy" in (tmp_path / name / "README.md").read_text()
        assert json.loads((tmp_path / name / "loraplus.json").read_text())["combined"]["how"] == "cat"
    # An export as a source, and one as PEFT itself would have written it.
    bare = shutil.copytree(
        tmp_path / "peft", tmp_path / "bare", ignore=lambda *_: ("loraplus.json", "README.md")
    )
    options = ("--how", "svd", "--svd_rank", "4", "--config", run.config)
    again = tmp_path / "again"
    printed(capsys, "combine", f"{bare}=0.25", f"{tmp_path / 'peft'}=0.75", *options, "--out", again)
    assert near(evaluated(capsys, again), exact)
    assert load_adapter(again).config.rank == 4


@pytest.mark.slow
def test_adapters_of_another_base_are_rejected(run, first_talk, tmp_path, capsys):
    other = first_talk.copy(tmp_path / "other")
    other.change_tensors(
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"] * 2})
    )
    other = with_adapter(other, tmp_path / "more")
    command = ("combine", run.out, other.out, "--how", "linear", "--out", tmp_path / "out")
    assert_mentions(rejected(capsys, *command), other.out / "adapter", "base.weights")
    assert not (tmp_path / "out").exists()
    assert "linear" in printed(capsys, *command, "--allow_different", "base.weights")


@pytest.mark.slow
def test_a_head_trained_in_full_must_be_the_same(untrained, first_world, tmp_path, capsys):
    copy, out = shutil.copytree(untrained.out / "adapter", tmp_path / "copy"), tmp_path / "out"
    to = ("--how", "cat", "--out", out)
    printed(capsys, "combine", f"{untrained.out}=0.5", f"{copy}=0.5", *to)
    assert near(evaluated(capsys, out), evaluated(capsys, untrained.out))
    shutil.rmtree(out)
    other = with_adapter(first_world, tmp_path / "other", "--lora.rank", "2")  # draws another head
    assert main(["combine", *map(str, (untrained.out, other.out, *to))]) == 2
    assert_mentions(capsys.readouterr().err, "params/head/kernel", "params/head/bias", "full")
    assert not out.exists()


def test_bad_arguments_are_one_line_and_leave_nothing(run, tmp_path, capsys):
    out = tmp_path / "out"
    cat = ("--how", "cat", "--out", out)
    for words, told in (
        ((run.out, "--how", "cat", "--out", run.out), ["--out", run.out, "exists"]),
        ((run.out, "--how", "mean", "--out", out), ["--how", "'mean'", "dare_ties"]),
        ((run.out, "--out", out), ["--how"]),
        ((f"{run.out}=half", *cat), ["'half'", "number"]),
        ((f"{run.out}=nan", *cat), ["nan", "finite"]),
        ((run.out, f"{run.out}=2", *cat), ["twice", run.out]),
        ((tmp_path / "none", *cat), ["none"]),
        ((run.out, *cat, "--config", run.config), ["--config", "PEFT"]),
        ((run.out, *cat, "--density", "0.5"), ["density", "cat"]),
        ((run.out, "--how", "ties", "--out", out), ["density", "ties"]),
        ((run.out, *cat, "--allow_different", "bass"), ["--allow_different", "'bass'"]),
    ):
        assert_mentions(rejected(capsys, "combine", *words), *told)
    assert list(tmp_path.iterdir()) == []
