"""Whose a run directory is, which settings may change when a run resumes, and what is kept of a finished run."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import threading
from pathlib import Path

import filelock
import jax
import numpy as np
import pytest
import yaml
from rich.console import Console

from loraplus_jax._utils.records import read_record, write_record
from loraplus_jax.settings.parsing import settings_from_json
from loraplus_jax.settings.schema import (
    RESUMABLE_FIELDS,
    STOP_FIELDS,
    DataOptions,
    ModelOptions,
    Settings,
    TrainSettings,
)
from loraplus_jax.step.checkpoint import save_checkpoint
from loraplus_jax.step.run_metadata import describe_run
from loraplus_jax.step.train_step import TrainState
from loraplus_jax.sweep.settings import SweepRun
from loraplus_jax.training.place import ADAPTERS, look
from loraplus_jax.training.provenance import FORMAT
from loraplus_jax.training.run_directory import (
    archive_results,
    check_directory,
    describe_unfinished,
    lock_directory,
    open_output_directory,
    origins_of,
    rename_run,
    saved_record,
)
from loraplus_jax.training.run_files import TrainingFailed

from ..messages import assert_mentions, mentions
from ..refusals import refusals
from ..settings.values import FIELDS, LEAST, nested
from .preparation import lock_of_another_process

SETTINGS = Settings(
    model=ModelOptions(path="m"),
    data=DataOptions(path="d"),
    train=TrainSettings(keep=3, compilation_cache=False),
    output_dir="o",
    seed=3,
)


def run_of(directory, values=SETTINGS, *, finished=False):
    """The directory of a run with these settings."""
    directory.mkdir()
    settings = settings_from_json(values) if isinstance(values, dict) else values
    (directory / "config.yaml").write_text(yaml.safe_dump(settings.to_json()))
    if finished:
        (directory / "summary.json").write_text('{"steps": 9}')
    return directory


def check(directory, settings=SETTINGS, *, fresh=False):
    return check_directory(directory, settings, fresh=fresh)


def with_result(directory):
    """The directory of a sweep of which one unit has ended."""
    write_record(directory / "identity.json", ORIGIN | {"format": FORMAT, "settings": {}, "jax_config": {}})
    with_file(directory / "units/search-8-0", "result.json", "{}")


def with_file(directory, name, text="mine"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)
    return directory


def spoilt(act, text):
    return lambda tmp_path: act(with_file(tmp_path, "config.yaml", text))


def of_cls(**fields):
    return dataclasses.replace(SETTINGS, model=ModelOptions(path="m", pooling="cls"), **fields)


FIELDS_OF_TWO = ("model.pooling", '"cls" in that run', '"mean" here', "seed", 4, 3)

test_directories_that_are_rejected = refusals(
    (lambda: check(Path("/proc/loraplus/out")), "output_dir", "/proc/loraplus/out"),
    (lambda tmp_path: check(tmp_path / "a" / ("b" * 300)), "output_dir", "name too long"),
    (lambda tmp_path: check(with_file(tmp_path, "file") / "file"), "file", "a file"),
    (lambda tmp_path: check(with_file(tmp_path, "file") / "file", fresh=True), "file", "a file"),
    (lambda tmp_path: check(with_file(tmp_path / "mine", "thesis.txt")), "mine", "files"),
    (lambda tmp_path: check(with_file(tmp_path / "mine", "thesis.txt"), fresh=True), "mine", "files"),
    (
        lambda tmp_path, monkeypatch: (
            monkeypatch.chdir(run_of(tmp_path / "mine")),
            check(Path(), fresh=True),
        ),
        *("output_dir .", "--fresh", "from elsewhere"),
    ),
    (lambda tmp_path: check(run_of(tmp_path / "mine", finished=True)), "mine", "summary.json", "--fresh"),
    (lambda tmp_path: check(run_of(tmp_path / "mine", of_cls(seed=4))), "mine", *FIELDS_OF_TWO),
    (
        lambda tmp_path: check(with_file(run_of(tmp_path / "mine"), "metrics.jsonl", "{}\n")),
        *("mine", "checkpoints", "--fresh"),
    ),
    *(
        (spoilt(act, text), "config.yaml", "settings")
        for text in ("[1]", "5", "", "train: 5", "train: [1]")
        for act in (check, lambda path: look(path).require(*ADAPTERS))
    ),
    lines=9,
)


@pytest.mark.parametrize("fresh", [False, True])
def test_directories_where_a_run_may_start_are_not_created(tmp_path, fresh):
    assert check(tmp_path, fresh=fresh) == check(tmp_path / "a/b/c", fresh=fresh) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_second_process_is_rejected_with_the_pid_of_the_first_before_any_preparation(tmp_path):
    directory = run_of(tmp_path / "out")
    with lock_of_another_process(directory) as first:
        with pytest.raises(ValueError, match=mentions(first.pid, directory)), lock_directory(directory):
            pass
        for fresh in (False, True):
            with pytest.raises(ValueError, match=mentions(first.pid, directory)):
                check(directory, fresh=fresh)
    # The system let go of the lock when the process was killed. A check writes no pid.
    check(directory)
    (directory / ".pid").write_text("mine")
    check(directory)
    assert (directory / ".pid").read_text() == "mine"
    with lock_directory(directory):
        assert (directory / ".pid").read_text() == f"{os.getpid()}\n"
    assert not (directory / ".pid").exists()


@pytest.mark.usefixtures("ten_seconds")
@pytest.mark.parametrize("name", [".lock", ".pid"])
@pytest.mark.parametrize("kind", ["FIFO", "symbolic link", "directory"])
def test_a_lock_that_is_no_regular_file_is_rejected_and_no_link_followed(tmp_path, name, kind):
    directory, mine = run_of(tmp_path / "out", LEAST), tmp_path / "mine"
    mine.write_text("mine")
    path = directory / name
    {"FIFO": lambda: os.mkfifo(path), "directory": path.mkdir}.get(kind, lambda: path.symlink_to(mine))()
    before = sorted(directory.iterdir())
    with pytest.raises(ValueError, match=mentions(path, kind)):
        check(directory, settings_from_json(LEAST))
    with pytest.raises(ValueError, match=mentions(path, kind)), lock_directory(directory):
        pass
    assert mine.read_text() == "mine"
    assert sorted(directory.iterdir()) == before


@pytest.mark.parametrize("names", [[".lock"], [".lock", ".pid"], [".lock", ".config.yaml.partial"]])
def test_a_run_killed_before_its_first_file_starts_over(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    check(tmp_path)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=mentions(tmp_path, "files")):
        check(tmp_path)


MOVED = ("model.path", "data.path", "data.train", "data.template")
"""Files that both settings have, so that their content is compared later."""


@pytest.mark.parametrize("name", FIELDS)
def test_what_may_change_when_a_run_resumes_and_a_finished_one_when_its_end_moves(tmp_path, name):
    given, needed = FIELDS[name]
    directory = run_of(tmp_path / "run", nested(needed))
    settings = settings_from_json(nested(needed | {name: given}))
    if name == "output_dir" or name.startswith("distributed."):
        assert check(directory, settings) == []
    elif name in RESUMABLE_FIELDS or name in MOVED:
        (change,) = check(directory, settings)
        assert_mentions(change, name, json.dumps(given))
        (directory / "summary.json").write_text('{"steps": 9}')
        with (
            contextlib.nullcontext()
            if name in STOP_FIELDS
            else pytest.raises(ValueError, match=mentions(directory, "finished", "train.steps"))
        ):
            assert check(directory, settings)
    else:
        with pytest.raises(ValueError, match=mentions(name, directory, "--fresh")):
            check(directory, settings)


def test_results_of_a_finished_run_are_kept_under_names_of_their_own(tmp_path):
    archive_results(tmp_path)  # nothing is finished
    for text in ("one", "two"):
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter/adapter.json").write_text(text)
        (tmp_path / "loss.png").write_text(text)
        (tmp_path / "summary.json").write_text('{"steps": 9}')
        archive_results(tmp_path)
    assert (tmp_path / "adapter_step_9/adapter.json").read_text() == "one"
    assert (tmp_path / "adapter_step_9.1/adapter.json").read_text() == "two"
    assert {path.name for path in tmp_path.glob("[ls]*")} == {
        *("loss_step_9.png", "loss_step_9.1.png", "summary_step_9.json", "summary_step_9.1.json"),
    }


def test_an_unfinished_run_of_the_same_settings_resumes_in_any_directory(tmp_path):
    directory = run_of(tmp_path / "run")
    assert check(directory) == []
    moved = Settings.to_json(SETTINGS) | {"output_dir": "another"}
    (directory / "config.yaml").write_text(yaml.safe_dump(moved))
    assert check(directory) == []


def opened(directory, settings=SETTINGS, **how):
    settings = dataclasses.replace(settings, output_dir=str(directory))
    return open_output_directory(settings, Console(file=io.StringIO(), width=300), **how)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"\0" * 4096])
def test_a_summary_that_is_empty_or_damaged_does_not_mark_a_run_as_finished(tmp_path, content):
    directory = run_of(tmp_path / "run")
    (directory / "summary.json").write_bytes(content)
    assert check(directory) == []
    assert_mentions(describe_unfinished(directory), directory, f"loraplus train {directory}/config.yaml")
    archive_results(directory)
    with opened(directory) as output:
        output.claim()
        assert_mentions(output.console.file.getvalue(), directory / "summary.json", "resumes")
    assert (directory / "summary.json").read_bytes() == content


@pytest.mark.parametrize("replacement", [None, "empty", "copy"])
def test_a_directory_that_is_renamed_or_deleted_is_named_by_the_next_check(tmp_path, replacement):
    directory = run_of(tmp_path / "run")
    with lock_directory(directory) as check:
        check()
        moved = directory.rename(tmp_path / "moved")
        if replacement == "empty":
            directory.mkdir()
        elif replacement == "copy":
            shutil.copytree(moved, directory)
        with pytest.raises(ValueError, match=mentions(directory, "renamed")):
            check()
        shutil.rmtree(directory, ignore_errors=True)
        moved.rename(directory)
        check()


def test_an_older_run_gets_the_first_free_number(tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=300)
    directory = tmp_path / "run.v2"
    rename_run(directory, console)
    assert text.getvalue() == ""
    for number in (1, 2):
        run_of(directory)
        (directory / "mark").write_text(str(number))
        rename_run(directory, console)
        assert not directory.exists()
        assert (tmp_path / f"run.v2.{number}" / "mark").read_text() == str(number)
        assert f"{directory}.{number}" in text.getvalue()


def test_a_setting_that_a_run_did_not_have_has_its_default(tmp_path):
    directory = run_of(tmp_path / "run")
    old = yaml.safe_load((directory / "config.yaml").read_text())
    del old["train"]["max_skipped"], old["model"]["pooling"], old["generation"]
    (directory / "config.yaml").write_text(yaml.safe_dump(old))
    assert check(directory) == []
    with pytest.raises(ValueError, match=mentions("model.pooling", '"mean" in that run', '"cls" here')):
        check(directory, of_cls())
    (directory / "config.yaml").write_text(yaml.safe_dump(old | {"renamed": 1}))
    with pytest.raises(ValueError, match=mentions("another version", "config.yaml", "renamed", "--fresh")):
        check(directory)


def test_a_sweep_may_change_less_and_a_finished_one_stays_finished(tmp_path):
    def sweep(**train):
        return settings_from_json({**LEAST, "sweep": {}, "train": {"steps": 9} | train}, SweepRun)

    def changes(**train):
        return check_directory(directory, sweep(**train), fresh=False)

    directory = run_of(tmp_path / "run", sweep())

    assert len(changes(keep=5)) == 1
    with pytest.raises(ValueError, match=mentions("train.steps", 9, 10)):
        changes(steps=10)
    (directory / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=mentions("finished")) as caught:
        changes(keep=5)
    assert "train.steps" not in str(caught.value)


def test_results_of_units_may_be_of_another_origin_too(tmp_path):
    directory = run_of(tmp_path / "out")
    with (
        pytest.raises(ValueError, match=mentions("no effect")),
        opened(directory, allow_different=["tokenizer"]),
    ):
        pass
    with_result(directory)
    with opened(directory, allow_different=["tokenizer"]):
        pass


def test_nothing_is_written_before_the_claim_and_the_lock_ends_with_the_context(tmp_path):
    directory = tmp_path / "out"
    with opened(directory) as output:
        assert not directory.exists()
        output.claim()
        output.check()
        assert (directory / "config.yaml").exists()
        with pytest.raises(ValueError, match=mentions(directory, os.getpid())), lock_directory(directory):
            pass
    with lock_directory(directory):
        pass


def test_a_lock_that_is_held_for_a_moment_is_waited_for(tmp_path):
    held, release = threading.Event(), threading.Event()

    def probe():
        with filelock.FileLock(tmp_path / ".lock"):
            held.set()
            release.wait(0.2)

    thread = threading.Thread(target=probe)
    thread.start()
    held.wait()
    with lock_directory(tmp_path):
        pass
    thread.join()


def test_a_reason_that_cannot_be_written_does_not_hide_the_failure(tmp_path):
    def fail():
        with opened(tmp_path / "run") as output:
            output.claim()
            (tmp_path / "run").rename(tmp_path / "moved")
            raise TrainingFailed("the loss is not finite")

    with pytest.raises(TrainingFailed, match="not finite"):
        fail()


METADATA = describe_run({}, None, task={"kind": "a"})
ORIGIN = {"base": "b", "identity": {"data": {"train": "x"}}}


def state(step):
    return TrainState({"w": np.full(3, step, np.float32)}, (), np.int32(step), jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize(("best", "steps"), [(False, (3, 2, 1)), (True, (2, 3, 1))])
def test_damaged_checkpoints_are_moved_and_the_next_restored_but_the_last_stays(tmp_path, best, steps):
    with opened(tmp_path) as output:
        output.claim()
        output.open_manager(best="loss")
        assert output.restore(state(0), METADATA, best=best) is None
        for step, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
            save_checkpoint(output.manager, state(step), metadata=METADATA, metrics={"loss": loss})
        output.manager.wait_until_finished()
        for step in steps:
            restored = output.restore(state(0), METADATA, best=best)
            assert restored.state.trainable["w"].tolist() == [step] * 3
            for path in (tmp_path / f"checkpoints/{step}/state").rglob("*"):
                if path.is_file():
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=mentions("step 1", "no other checkpoint", "--fresh")):
            output.restore(state(0), METADATA, best=best)
    moved = {tmp_path / f"damaged_checkpoints/{step}" for step in steps[:-1]}
    assert set((tmp_path / "damaged_checkpoints").iterdir()) == moved
    assert_mentions(output.console.file.getvalue(), *moved)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_directory_of_another_format_is_not_read(tmp_path):
    with opened(tmp_path) as output:
        output.claim()
        output.check_origin(ORIGIN)
        (tmp_path / "checkpoints/1").mkdir(parents=True)
        record = read_record(tmp_path / "identity.json")
        for found in ({}, {"format": 99}):
            rest = {name: value for name, value in record.items() if name != "format"}
            write_record(tmp_path / "identity.json", rest | found)
            with pytest.raises(
                ValueError, match=mentions("format", found.get("format", 1), "export", "--fresh")
            ):
                output.check_origin(ORIGIN)
    with pytest.raises(ValueError, match=mentions("format 99")):
        check(tmp_path)
    assert check(tmp_path, fresh=True) == []
    (tmp_path / "identity.json").unlink()
    with pytest.raises(ValueError, match=mentions("identity.json", "missing", "--fresh")):
        check(tmp_path)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda content: content.pop("jax_config"), ["jax_config"]),
        (lambda content: content.update(identity=[]), ["identity"]),
        (lambda content: content.update(allowed=[{"digest": 1}]), ["allowed.0.differences"]),
        (lambda content: content.pop("digest"), ["changed"]),
        (lambda content: content["identity"].clear(), ["changed"]),
    ],
)
def test_a_record_that_was_edited_is_an_error(tmp_path, edit, words):
    with opened(tmp_path) as output:
        output.claim()
        output.check_origin(ORIGIN)
        before = (tmp_path / "identity.json").read_text()
        output.check_origin(ORIGIN)
        # Results have its digest.
        assert (tmp_path / "identity.json").read_text() == before
        edit(content := json.loads(before))
        (tmp_path / "identity.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=mentions("identity.json", *words, "--fresh")):
            output.check_origin(ORIGIN)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (jax.disable_jit(), ["jax_disable_jit", True, "JAX_DISABLE_JIT"]),
        (jax.numpy_dtype_promotion("strict"), ["jax_numpy_dtype_promotion", "strict", "standard"]),
    ],
)
def test_options_of_jax_that_no_step_runs_with_are_an_early_error(tmp_path, option, words):
    with option, pytest.raises(ValueError, match=mentions(*words)), opened(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


def test_a_path_is_no_identity_and_its_content_is(tmp_path):
    moved = dataclasses.replace(SETTINGS, model=ModelOptions(path="n"), data=DataOptions(path="e"))
    with opened(tmp_path) as output:
        output.claim()
        output.check_origin(ORIGIN)
        output.path.joinpath("checkpoints/1").mkdir(parents=True)
    with opened(tmp_path, moved) as output:
        output.claim()
        output.check_origin(ORIGIN)
        words = ("data.train", "x", "y", "--allow_different data", '"d" in that run and "e" here', "--fresh")
        with pytest.raises(ValueError, match=mentions(*words)):
            output.check_origin(ORIGIN | {"identity": {"data": {"train": "y"}}})
    files = dataclasses.replace(SETTINGS, data=DataOptions(train="d"))
    with pytest.raises(ValueError, match=mentions("data.path", "data.train", "--fresh")):
        check(tmp_path, files)


def test_a_difference_is_allowed_where_there_is_something_to_compare_with(tmp_path):
    new, out, part = (tmp_path / name for name in ("new", "out", "part"))
    changed = ORIGIN | {"identity": {"data": {"train": "y"}}}
    with opened(out) as output:
        output.claim()
        output.check_origin(ORIGIN)
        with pytest.raises(ValueError, match=mentions("data", "--allow_different")):
            output.check_origin(changed)
        output.path.joinpath("checkpoints/1").mkdir(parents=True)
    for allowed in (("data",), ()):  # accepted once
        with opened(out, allow_different=allowed) as output:
            output.check_origin({**changed, "base": None})  # weights that were not read
            assert output.differences == ['data.train is "x" there and "y" here']
            assert len(origins_of(saved_record(out))) == 2
    with opened(out) as output, pytest.raises(ValueError, match=mentions("base.weights", "b", "c")):
        output.check_origin({**changed, "base": "c"})
    with_result(run_of(part))
    with opened(part, allow_different=("data",)):
        pass
    without_effect = (new, {}), (out, {"fresh": True}), (part, {"fresh": True})
    for directory, how in without_effect:
        with (
            pytest.raises(ValueError, match=mentions("--allow_different", "data", "no effect")),
            opened(directory, allow_different=("data",), **how),
        ):
            pass
    with (
        pytest.raises(ValueError, match=mentions("--allow_different", "dat")),
        opened(new, allow_different=("dat",)),
    ):
        pass
