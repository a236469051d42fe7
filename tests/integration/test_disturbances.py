"""Whatever stops or damages a run: an exit code, one line, and the same command ends with the same bits."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.training import anomalies, evaluation, trackers, trainer
from loraplus_jax.training.trainer import Trainer

from ..messages import assert_mentions
from .conftest import World
from .runs import (
    ODD,
    at_step,
    column,
    cut_short,
    flags,
    result_of,
    rows_of,
    summary_of,
    tensor_bytes,
    undisturbed,
)

# Checkpoints of steps 6, 12, 18 and 20; at step 15 that of step 12 is the best. Four batches of each validation.
SETTINGS = (
    *ODD,
    *flags("--model.head_dropout 0 --train.keep 4 --train.early_stopping 9 --train.eval_batch_size 4"),
)
VALIDATION, TEST = 16, 32


@dataclasses.dataclass
class Run:
    """The command in the straight run's world, with a directory of its own."""

    world: World
    out: Path
    settings: tuple[str, ...] = SETTINGS

    def train(self, *more):
        return self.world.train(*self.settings, *more, out=self.out)

    def saved(self, step):
        return self.out / "checkpoints" / str(step)


@pytest.fixture(scope="module", autouse=True)
def spikes():
    """So that sound runs have some."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SPIKE_RATIO", "SPIKE_STEPS", "HISTORY_STEPS"):
            patch.setattr(anomalies, name, 1)  # any loss above the one before
        yield


@pytest.fixture(scope="module")
def straight(spikes, first_world, tmp_path_factory, cache):
    """The run of this file that nothing disturbs."""
    out = undisturbed(first_world, tmp_path_factory, SETTINGS)
    return Run(World(out.parent), out)


@pytest.fixture
def run(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "draw_loss", lambda *_: None)
    return Run(straight.world, tmp_path / "out")


# Disturbances: context managers in which the command runs; they check what it left and put back what they took.


@contextlib.contextmanager
def signal_at(run, step, number=signal.SIGTERM):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(number), saved=True)
        yield
    assert run.saved(step).is_dir()


@contextlib.contextmanager
def signal_in_evaluation(run, rows, place, number=signal.SIGTERM):
    """At a batch, counted from 0, of the first evaluation of a split of so many rows, which is broken off."""
    evaluating, seen = evaluation.eval_batches, []

    def with_signal(arrays, *how):
        seen.append(size := len(next(iter(arrays.values()))))
        for n, batch in enumerate(evaluating(arrays, *how)):
            if size == rows and seen.count(rows) == 1 and n == place:
                signal.raise_signal(number)
            evaluated.append(size)
            yield batch

    evaluated = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "eval_batches", with_signal)
        yield
    assert evaluated.count(rows) == place + 1


@contextlib.contextmanager
def second_signal(run, step, number):
    """While the save that the first one asks for is being written."""
    save, before = trainer.save_checkpoint, signal.getsignal(number)

    def save_and_signal(*arguments, **keywords):
        save(*arguments, **keywords)
        signal.raise_signal(number)

    def act(*_):
        raise AssertionError("the second signal acted")

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(number), saved=True)
        begin = lambda: patch.setattr(trainer, "save_checkpoint", save_and_signal)  # noqa: E731
        at_step(patch, step - 1, begin, saved=True)
        signal.signal(number, act)
        try:
            yield
        finally:
            signal.signal(number, before)
    assert run.saved(step).is_dir()


@contextlib.contextmanager
def killed(run, owner, name):
    """As if by a kill, as something is about to be called: nothing is saved."""

    def kill(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, kill)
        yield
    assert not (run.out / "summary.json").exists()


def lose_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


LOST_STDOUT = {
    "closed": (lambda: None, "Bad file descriptor"),
    "broken pipe": (lose_pipe, "Broken pipe"),
    "full": (lambda: open("/dev/full", "w"), "No space left on device"),  # noqa: SIM115
}


@contextlib.contextmanager
def lost(how):
    """A stdout that cannot be written; yields the words of the error."""
    make, words = LOST_STDOUT[how]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout := make())
        yield words
    if stdout is not None:
        with contextlib.suppress(OSError):
            stdout.close()


@contextlib.contextmanager
def lost_stdout(run, step, how):
    with lost(how), pytest.MonkeyPatch.context() as patch:
        broken, sys.stdout = sys.stdout, io.StringIO()

        def lose():
            sys.stdout._stream = broken  # pyright: ignore
            print("a line")
            sys.stdout.flush()

        at_step(patch, step, lose, saved=True)
        yield
    assert run.saved(step).is_dir()


@contextlib.contextmanager
def renamed(run, step):
    """The directory, amid the steps; `tests/training/test_run_directory.py` has other ways to lose it."""
    moved = run.out.with_name("moved")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda: run.out.rename(moved), saved=True)
        yield
    assert not run.out.exists()
    moved.rename(run.out)


@contextlib.contextmanager
def cut_checkpoint(run, step):
    cut_short(run.saved(step))
    yield
    assert (run.out / "damaged_checkpoints" / str(step)).is_dir()


@contextlib.contextmanager
def changed_metrics(run):
    """Of the best checkpoint, so that another one would be chosen."""
    for step, value in ((12, 0.0), (6, 1.0)):
        path = run.saved(step) / "metrics/metrics"
        if path.exists():
            path.write_text(re.sub(r'accuracy": [\d.]+', f'accuracy": {value}', path.read_text()))
    yield


@contextlib.contextmanager
def edited_log(run):
    """With another value; the command leaves it as it is. `tests/training/test_metrics_log.py` has more."""
    path = run.out / "metrics.jsonl"
    rows = path.read_text()
    path.write_text(edited := re.sub(r'(validation/accuracy": )[\d.]+', r"\g<1>0.99", rows, count=1))
    yield
    assert path.read_text() == edited != rows
    path.write_text(rows)


class Start(NamedTuple):
    """One start of the command: its exit code, words of what it prints, and what happens before and during it."""

    code: int
    words: tuple
    disturb: tuple


def at(code, words, *disturb):
    return Start(code, words, disturb)


CHAINS = {
    "signals": [
        at(130, ("step 0 of 20",), (signal_in_evaluation, TEST, 0, signal.SIGINT)),
        at(143, ("step 6 of 20",), (signal_in_evaluation, VALIDATION, 1)),
        at(143, ("step 12 of 20",), (second_signal, 12, signal.SIGTERM)),  # at the step before an evaluation
        at(143, ("step 20 of 20",), (signal_in_evaluation, TEST, 1)),
        at(130, (), (killed, Trainer, "write_summary")),
    ],
    "damage": [
        at(141, ("stdout", "Broken pipe", "step 9 of 20"), (lost_stdout, 9, "broken pipe")),
        at(143, ("step 15 of 20",), (signal_at, 15)),
        at(2, ("metrics.jsonl", "rows", "changed", "--fresh"), (edited_log,)),
        at(143, ("checkpoint of step 15", "step 12 of 20"), (cut_checkpoint, 15), (signal_at, 15)),
        at(2, ("metrics", "checkpoint 12", "restored", "output_dir"), (changed_metrics,), (renamed, 17)),
    ],
}


def started(run, start, capsys):
    """What a disturbed start prints."""
    capsys.readouterr()
    with contextlib.ExitStack() as stack:
        for happens, *arguments in start.disturb:
            stack.enter_context(happens(run, *arguments))
        assert run.train() == start.code, start
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert_mentions(" ".join((printed.out + printed.err).split()), *start.words)
    return printed.out


def arrays(checkpoint):
    """The bytes of every array in a checkpoint."""
    tree = ocp.StandardCheckpointer().restore((checkpoint / "state").absolute())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


class Service:
    """A tracker whose rows stay when the process ends."""

    address = None

    def __init__(self):
        self.rows = []

    def start(self, directory, config, run_id):
        return "id"

    def log(self, step, values):
        self.rows.append((step, *sorted(values)))

    def finish(self, finished):
        pass


@pytest.fixture
def service(run, monkeypatch):
    """Follows the run."""
    service = Service()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda: service)  # pyright: ignore
    monkeypatch.setattr(trainer, "check_trackers", lambda names: None)
    run.settings += ("--train.report_to", "[wandb]")
    return service


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_the_same_command_ends_with_the_bits_of_the_straight_run(run, straight, request, capsys, chain):
    # Of a lost directory or checkpoint, a tracker gets rows again.
    service = request.getfixturevalue("service") if chain == "signals" else None
    printed = "".join(started(run, start, capsys) for start in CHAINS[chain])
    assert run.train() == 0
    printed += capsys.readouterr().out
    assert result_of(run.out) == result_of(straight.out)
    spikes = [row for row in rows_of(run.out) if "spike/loss" in row]
    assert spikes
    for row in spikes:
        if chain == "signals":  # in the other a start's stdout is lost, or it ends before it prints
            assert_mentions(
                " ".join(printed.split()), f"step {row['step']}", f"{row['spike/loss']:.4f}", "try"
            )
        assert row["spike/loss"] > row["spike/median"]
        assert {f"spike/grad_norm/{role}" for role in ("a", "b", "extra")} <= row.keys()
    if service:
        assert printed.count("before:") == 1
        assert len(service.rows) == len({*service.rows}) == len(rows_of(run.out))


@pytest.mark.slow
def test_a_run_that_ends_where_it_was_stopped_resumes_with_more_steps_as_if_never_ended(
    run, straight, service, capsys
):
    other = ("--train.eval_every", "5", "--train.select", "last")
    with signal_at(run, 12):
        assert run.train(*other) == 143
    assert 12 not in column(run.out, "validation/loss")
    capsys.readouterr()
    assert run.train(*other, "--train.steps", "8") == 2
    assert_mentions(capsys.readouterr().err, "step 8", 12)
    assert "steps: 20" in (run.out / "config.yaml").read_text()
    assert run.train(*other, "--train.steps", "12") == 0
    assert 12 in column(run.out, "validation/loss")
    assert summary_of(run.out)["steps"] == 12
    ended = tensor_bytes(run.out)
    capsys.readouterr()
    assert run.train(*other, "--train.steps", "12") == 2
    assert "finished" in capsys.readouterr().err
    assert run.train("--train.select", "last") == 0
    assert_mentions(
        capsys.readouterr().out, "train.steps is 12", 20, "train.eval_every is 5", 6, "step 12 of 20"
    )
    steps = [[row for row in rows_of(out) if "loss" in row] for out in (run.out, straight.out)]
    assert steps[0] == steps[1]
    assert arrays(run.saved(20)) == arrays(straight.saved(20))
    assert tensor_bytes(run.out) != ended
    # What the finished run had made is kept, but for the result of its end; the service has both.
    assert (run.out / "adapter_step_12/adapter.safetensors").read_bytes() == ended
    assert json.loads((run.out / "summary_step_12.json").read_text())["seconds"] > 0
    assert "steps: 20" in (run.out / "config.yaml").read_text()
    assert column(run.out, "test/loss") == {20: summary_of(run.out)["after"]["loss"]}
    assert [step for step, *names in service.rows if "test/loss" in names] == [12, 20]
    assert len(service.rows) == len({*service.rows})


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_named_and_the_next_best_chosen(run, straight, capsys, monkeypatch):
    """Of a run of which only the end is left to do."""
    shutil.copytree(straight.out, run.out)
    (run.out / "summary.json").unlink()
    finish, damaged = Trainer.finish, []

    def with_damage(self):
        damaged.append(self.manager.best_step())
        cut_short(run.saved(damaged[0]))
        return finish(self)

    monkeypatch.setattr(Trainer, "finish", with_damage)
    assert run.train() == 0
    assert f"checkpoint of step {damaged[0]}" in " ".join(capsys.readouterr().out.split())
    assert (run.out / "damaged_checkpoints" / str(damaged[0])).is_dir()
    scores = column(run.out, "validation/accuracy")
    chosen = scores[summary_of(run.out)["selected_step"]]
    assert chosen == max(score for step, score in scores.items() if step != damaged[0])


@pytest.mark.slow
def test_a_diverged_run_names_the_cause_and_keeps_the_last_good_state(run, capsys):
    seldom = flags("--train.log_every 20 --train.eval_every 20 --train.max_skipped 2")
    # The first step has a rate of 0, and the fourth is under way when the third is checked.
    assert run.train(*seldom, "--optimizer.learning_rate", "5e37") == 1
    error = capsys.readouterr().err
    words = ("training failed", "2 steps", "step 3", "skipped", "update_norm/b", "optimizer.learning_rate")
    assert_mentions(error, *words, "lora.lr_ratio", 4)
    assert "max_grad_norm" not in error  # the gradients are finite, their update is not
    assert "Traceback" not in error
    assert not (run.out / "summary.json").exists()
    # It ends at the step that it says, however seldom it logs.
    (last,) = [row for row in rows_of(run.out) if "skipped" in row]
    assert (last["step"], last["skipped"]) == (4, 3)


# results that cannot be printed


@pytest.mark.parametrize("how", LOST_STDOUT)
@pytest.mark.parametrize("arguments", [["fetch"], ["--help"], ["train", "--help"]])
def test_a_command_that_cannot_print_says_so_in_one_line(capsys, how, arguments):
    with lost(how) as words:
        code = main(arguments)
    assert code == 141
    error = capsys.readouterr().err
    assert error.startswith("loraplus: ")
    assert error.count("\n") == 1
    assert_mentions(error, "stdout", words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "arguments"),
    [("closed", ["predict", "--text", "good"]), ("broken pipe", ["eval"]), ("full", ["eval"])],
)
def test_results_that_cannot_be_printed_are_one_line(straight, capsys, how, arguments):
    command, *more = arguments
    capsys.readouterr()
    with lost(how) as words:
        assert main([command, str(straight.out), *more]) == 141
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_mentions(error, "stdout", words)
