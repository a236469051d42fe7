"""`loraplus combine` on adapters that were never trained: what evaluates and exports its result."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from loraplus_jax import load_adapter, save_adapter
from loraplus_jax.cli.commands import COMBINE, main
from loraplus_jax.inference import combine
from loraplus_jax.interop import combine_adapters
from loraplus_jax.interop.adapter_directory import read_adapter_json
from loraplus_jax.interop.combination import OPTIONS, How, get_args
from loraplus_jax.tasks import causal_lm, encoder

from ..integration.runs import evaluated, near, printed, rejected
from ..interop.models import spec_of
from ..interop.test_combination import adapter as random_adapter
from ..messages import assert_mentions
from .conftest import with_adapter

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def run(first_talk, tmp_path_factory, cache):
    # The scale of a combined adapter is 1: with the same here, evaluations share their compiled program.
    return with_adapter(first_talk, tmp_path_factory.mktemp("run"), "--lora.alpha", "4")


def test_the_command_has_the_ways_and_options_of_the_library():
    assert COMBINE["--how"]["choices"] == get_args(How)
    assert {f"--{name}" for name in OPTIONS} <= COMBINE.keys()


@pytest.mark.slow
def test_parts_of_one_adapter_in_either_format_make_the_adapter(run, tmp_path, capsys):
    copy, out, to = (
        shutil.copytree(run.out / "adapter", tmp_path / "copy"),
        tmp_path / "out",
        tmp_path / "peft",
    )
    svd = ("--how", "svd", "--svd_rank", "4")
    assert_mentions(
        printed(capsys, "combine", f"{run.out}=0.5", f"{copy}=0.5", *svd, "--out", out), out, 2, 4
    )
    notes, source = read_adapter_json(out), read_adapter_json(copy)
    kept = ("settings", "task", "base", "identity")
    assert {name: notes[name] for name in kept} == {name: source[name] for name in kept}
    first, second = notes["combined"].pop("adapters")
    assert notes["combined"] == {"how": "svd", "svd_rank": 4}
    assert (first["name"], second["name"], first["weight"]) == ("out", "copy", 0.5)
    assert first["files"] == second["files"]
    assert first["files"].keys() == {"adapter.json", "adapter.safetensors"}
    exact = evaluated(capsys, run.out)
    assert near(evaluated(capsys, out), exact)
    printed(capsys, "export", out, "--to", to)
    assert "svd of 0.5 out + 0.5 copy" in (to / "README.md").read_text()
    assert json.loads((to / "loraplus.json").read_text())["combined"]["how"] == "svd"
    # The export as a source, and as PEFT itself would have written it.
    bare = shutil.copytree(to, tmp_path / "bare", ignore=lambda *_: ("loraplus.json", "README.md"))
    parts, again = (f"{bare}=0.25", f"{to}=0.75"), tmp_path / "again"
    printed(capsys, "combine", *parts, *svd, "--config", run.config, "--out", again)
    assert near(evaluated(capsys, again), exact)
    assert read_adapter_json(again)["base"] == source["base"]
    assert load_adapter(again).config.rank == 4
    # Its file names the base, and that of another one is another name.
    other, base = tmp_path / "other", json.loads((bare / "adapter_config.json").read_text())
    shutil.copytree(bare, other)
    shutil.copytree(base["base_model_name_or_path"], tmp_path / "copy of the base")
    base["base_model_name_or_path"] = str(tmp_path / "copy of the base")
    (other / "adapter_config.json").write_text(json.dumps(base))
    words = ("combine", bare, other, *svd, "--out", tmp_path / "no")
    assert_mentions(rejected(capsys, *words), "copy of the base", "--allow_different base.weights")
    error = rejected(capsys, "combine", run.out, other, *svd, "--out", tmp_path / "no")
    assert_mentions(error, "copy of the base", run.out, "--allow_different base.weights")
    printed(capsys, *words[:-1], tmp_path / "allowed", "--allow_different", "base.weights")
    twin = shutil.copytree(bare, tmp_path / "twin")
    printed(capsys, "combine", f"{bare}=0.25", f"{twin}=0.75", *svd, "--out", tmp_path / "no_config")
    found, wanted = (load_adapter(place).lora for place in (tmp_path / "no_config", again))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "reads"), [("run", 0), ("untrained", 1)])
def test_of_a_training_config_only_labels_are_read_and_once(
    request, tmp_path, capsys, monkeypatch, kind, reads
):
    """Not its texts, once for each adapter: nothing is tokenized."""
    source = request.getfixturevalue(kind)
    printed(capsys, "export", source.out, "--to", tmp_path / "peft")
    bare = [
        shutil.copytree(tmp_path / "peft", tmp_path / name, ignore=lambda *_: ("loraplus.json", "README.md"))
        for name in ("a", "b", "c")
    ]
    loaded, tasks = [], {"run": causal_lm, "untrained": encoder}
    load = tasks[kind]._load_splits
    monkeypatch.setattr(tasks[kind], "_load_splits", lambda *x: loaded.append(1) or load(*x))
    for module, name in ((causal_lm, "_encode"), (encoder, "encode_texts")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("tokenized"))
    printed(capsys, "combine", *bare, "--how", "linear", "--config", source.config, "--out", tmp_path / "out")
    assert len(loaded) == reads
    assert read_adapter_json(tmp_path / "out")["task"] == read_adapter_json(source.out / "adapter")["task"]


def saved(directory, base=None, seed=0):
    """The directory of an adapter of a loop of one's own, without settings."""
    made = random_adapter({"m": spec_of("dense", "io", (6, 7))}, seed=seed)
    save_adapter(directory, made.lora, made.specs, made.config, base=base)
    return directory


def test_adapters_of_a_loop_of_one_s_own_must_have_one_base(tmp_path, capsys):
    a, b = saved(tmp_path / "a", "0123", 1), saved(tmp_path / "b", "4567", 2)
    c, out = saved(tmp_path / "c"), tmp_path / "out"
    to = ("--how", "linear", "--out", out)
    assert_mentions(rejected(capsys, "combine", c, a, b, *to), b, "base.weights", "0123", "4567")
    assert not out.exists()
    assert_mentions(printed(capsys, "combine", f"{c}=2", a, *to), out, "linear", 2)
    wanted = combine_adapters({"c": load_adapter(c), "a": load_adapter(a)}, [2, 1], "linear")
    jax.tree.map(np.testing.assert_array_equal, load_adapter(out).lora, wanted.lora)
    assert read_adapter_json(out)["base"] == "0123"
    assert "settings" not in read_adapter_json(out)
    shutil.rmtree(out)
    printed(capsys, "combine", a, b, *to, "--allow_different", "base.weights")


@pytest.mark.slow
def test_a_head_trained_in_full_must_be_the_same(untrained, first_world, tmp_path, capsys):
    copy, out = shutil.copytree(untrained.out / "adapter", tmp_path / "copy"), tmp_path / "out"
    to = ("--how", "cat", "--out", out)
    printed(capsys, "combine", f"{untrained.out}=0.5", f"{copy}=0.5", *to)
    found, wanted = (load_adapter(place).extras for place in (out, copy))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    shutil.rmtree(out)
    other = with_adapter(first_world, tmp_path / "other", "--lora.rank", "2")  # draws another head
    assert main(["combine", *map(str, (untrained.out, other.out, *to))]) == 2
    assert_mentions(capsys.readouterr().err, "params/head/kernel", "params/head/bias", "full")
    assert not out.exists()


def test_of_two_that_write_one_directory_the_second_fails(tmp_path, capsys, monkeypatch):
    a, b, out = saved(tmp_path / "a", seed=1), saved(tmp_path / "b", seed=2), tmp_path / "out"
    to = ("--how", "cat", "--out", out)

    def after_the_other(*arguments, **options):
        monkeypatch.undo()
        printed(capsys, "combine", b, *to)
        return combine_adapters(*arguments, **options)

    monkeypatch.setattr(combine, "combine_adapters", after_the_other)
    assert main(["combine", *map(str, (a, *to))]) == 2
    assert_mentions(capsys.readouterr().err, out, "exists")
    assert read_adapter_json(out)["combined"]["adapters"][0]["name"] == "b"
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "out"}


def test_bad_arguments_are_one_line_and_leave_nothing(tmp_path, capsys):
    run, out = saved(tmp_path / "run"), tmp_path / "out"
    cat = ("--how", "cat", "--out", out)
    for words, told in (
        ((run, "--how", "cat", "--out", run), ["--out", run, "exists"]),
        ((run, "--how", "mean", "--out", out), ["--how", "'mean'", "dare_ties"]),
        ((run, "--out", out), ["--how"]),
        ((f"{run}=half", *cat), ["'half'", "number"]),
        ((f"{run}=\uff11", *cat), ["'\uff11'", "number"]),  # a full-width digit
        ((run, "--how", "cat", "--out", run / "new"), ["--out", run / "new", "outside"]),
        ((run, "--how", "cat", "--out", tmp_path / "x.gguf"), ["--out", "x.gguf", "directory"]),
        ((run, *cat, "--allow_different", "data"), ["--allow_different", "'data'", "base.weights"]),
        ((f"{run}=nan", *cat), ["nan", "finite"]),
        ((run, f"{run}=2", *cat), ["twice", run]),
        ((run, f"{run}/../run", *cat), ["twice", run, f"{run}/../run"]),
        ((tmp_path / "none", *cat), ["none"]),
        ((run, "--how", "svd", "--out", out, "--svd_rank", "99999"), ["svd_rank", "99999", 2]),
        ((run, *cat, "--config", "config.yaml"), ["--config", "PEFT"]),
        ((run, *cat, "--density", "0.5"), ["density", "cat"]),
        ((run, "--how", "ties", "--out", out), ["density", "ties"]),
        ((run, *cat, "--allow_different", "bass"), ["--allow_different", "'bass'"]),
    ):
        assert_mentions(rejected(capsys, "combine", *words), *told)
    assert list(tmp_path.iterdir()) == [run]
