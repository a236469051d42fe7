"""Runs that are stopped, damaged or go wrong, and what is left of them."""

import json
import shutil
import signal

import pytest

from loraplus_jax.training import evaluation, trackers, trainer
from loraplus_jax.training.trainer import Trainer

from ..marks import long
from ..messages import assert_mentions
from .runs import (
    ODD,
    column,
    cut_short,
    flags,
    result_of,
    rows_of,
    saved_steps,
    stopped,
    summary_of,
    undisturbed,
)


@pytest.fixture(scope="module")
def straight(first_world, tmp_path_factory, cache):
    return result_of(undisturbed(first_world, tmp_path_factory, ODD))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, long(signal.SIGINT)])
def test_a_signal_saves_and_the_same_command_ends_bit_identical(world, straight, capsys, number):
    for step in (7, 12, 15):
        stopped(world, step, *ODD, number=number)
        assert_mentions(capsys.readouterr().err, f"step {step} of 20")
        assert (world.out / "checkpoints" / str(step)).is_dir()
    assert world.train(*ODD) == 0
    assert_mentions(capsys.readouterr().out, "step 15 of 20")
    assert result_of(world.out) == straight


class Killed(BaseException):
    """What a kill is to a process, for one that continues."""


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


@pytest.mark.slow
def test_a_run_killed_before_its_summary_has_the_rows_of_a_straight_one(world, straight, capsys, monkeypatch):
    service = Service()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda: service)  # pyright: ignore
    monkeypatch.setattr(trainer, "check_trackers", lambda names: None)
    reported = (*ODD, "--train.report_to", "[wandb]")

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "write_summary", kill)
        with pytest.raises(Killed):
            world.train(*reported)
    rows = rows_of(world.out)
    assert capsys.readouterr().out.count("before:") == 1
    assert world.train(*reported) == 0
    assert "before:" not in capsys.readouterr().out
    assert rows_of(world.out) == rows
    assert result_of(world.out) == straight
    assert len(service.rows) == len({*service.rows}) == len(rows)
    # Extended, it has the result of its new end alone; the service keeps both.
    (first,) = column(world.out, "test/loss")
    assert world.train(*reported, "--train.select", "last", "--train.steps", "24") == 0
    assert column(world.out, "test/loss") == {24: summary_of(world.out)["after"]["loss"]}
    assert [step for step, *names in service.rows if "test/loss" in names] == [first, 24]
    assert len(service.rows) == len({*service.rows})


@pytest.mark.slow
def test_a_run_may_end_at_the_step_where_it_was_stopped_and_is_validated_there(world):
    stopped(world, 15, *ODD)
    assert 15 not in column(world.out, "validation/loss")
    assert world.train(*ODD, "--train.steps", "15") == 0
    assert 15 in column(world.out, "validation/loss")
    assert summary_of(world.out)["steps"] == 15


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(world, straight, capsys):
    stopped(world, 15, *ODD)
    cut_short(world.out / "checkpoints/15")
    assert world.train(*ODD) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert_mentions(printed, "checkpoint of step 15", "step 12 of 20")
    assert (world.out / "damaged_checkpoints/15").is_dir()
    assert result_of(world.out) == straight


def signal_in(monkeypatch, split_size, place, number=signal.SIGTERM):
    """The signal comes at a batch, counted from 0, of the first evaluation of a split of so many rows."""
    evaluating, seen = evaluation.eval_batches, []

    def with_signal(arrays, *how):
        rows = len(next(iter(arrays.values())))
        seen.append(rows)
        for at, batch in enumerate(evaluating(arrays, *how)):
            if rows == split_size and seen.count(rows) == 1 and at == place:
                signal.raise_signal(number)
            evaluated.append(rows)
            yield batch

    evaluated = []
    monkeypatch.setattr(evaluation, "eval_batches", with_signal)
    return evaluated


SMALL = ("--train.eval_batch_size", "4")


@pytest.mark.long
@pytest.mark.slow
def test_a_signal_in_an_evaluation_breaks_it_off_and_the_resumed_run_makes_it_up(world, capsys):
    straight = result_of(world.trained(*ODD, *SMALL, out=world.directory / "straight"))
    every_step = saved_steps(world.directory / "straight")
    with pytest.MonkeyPatch.context() as patch:
        evaluated = signal_in(patch, 16, 1)  # the first of validation: at step 6
        assert world.train(*ODD, *SMALL) == 143
    assert evaluated.count(16) == 2  # of four batches
    assert_mentions(capsys.readouterr().err, "step 6 of 20")
    assert (world.out / "checkpoints/6").is_dir()
    assert not any("validation/loss" in row for row in rows_of(world.out))
    with pytest.MonkeyPatch.context() as patch:
        signal_in(patch, 16, 3)  # in the evaluation that is made up
        assert world.train(*ODD, *SMALL) == 143
    assert_mentions(capsys.readouterr().err, "step 6 of 20")
    stopped(world, 7, *ODD, *SMALL)  # after it
    shutil.rmtree(world.out / "checkpoints/7")  # so that it is made up once more
    stopped(world, 18, *ODD, *SMALL)  # while the step before an evaluation is done
    assert_mentions(capsys.readouterr().err, "step 18 of 20")
    with pytest.MonkeyPatch.context() as patch:
        evaluated = signal_in(patch, 32, 1)  # the end's, on the test split
        assert world.train(*ODD, *SMALL) == 143
    assert evaluated.count(32) == 2
    assert_mentions(capsys.readouterr().err, "step 20 of 20")
    assert world.train(*ODD, *SMALL) == 0
    assert result_of(world.out) == straight
    assert saved_steps(world.out) == every_step


@pytest.mark.slow
def test_a_signal_before_the_first_step_leaves_nothing_that_is_not_made_again(world, straight, capsys):
    with pytest.MonkeyPatch.context() as patch:
        evaluated = signal_in(patch, 32, 0, signal.SIGINT)
        assert world.train(*ODD) == 130
    assert len(evaluated) == 1
    assert_mentions(capsys.readouterr().err, "step 0 of 20")
    assert rows_of(world.out) == []
    assert world.train(*ODD) == 0
    assert result_of(world.out) == straight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        long(lambda text: None, ["0 complete rows"]),
        long(lambda text: b"".join(text.splitlines(True)[:2]), ["2 complete rows"]),
        (lambda text: text.replace(b"}\n", b"}", 1), ["rows", "changed"]),
        long(lambda text: b"5\n" + text, ["rows", "changed"]),
        long(lambda text: text.replace(b'"step": 0', b'"step": 1'), ["rows", "changed"]),
    ],
)
def test_a_log_that_was_edited_is_rejected_and_left_as_it_is(world, straight, capsys, spoil, words):
    stopped(world, 9, *ODD)
    path = world.out / "metrics.jsonl"
    rows = path.read_bytes()
    path.unlink()
    if (spoilt := spoil(rows)) is not None:
        path.write_bytes(spoilt)
    assert_mentions(world.rejected(capsys, *ODD), path, *words)
    assert (path.read_bytes() if path.exists() else None) == spoilt
    path.write_bytes(rows)
    assert world.train(*ODD) == 0
    assert result_of(world.out) == straight


@pytest.mark.slow
def test_a_moved_run_resumes(world, straight):
    stopped(world, 8, *ODD)
    moved = world.directory / "moved"
    shutil.move(world.out, moved)
    assert result_of(world.trained(*ODD, out=moved)) == straight


@pytest.mark.slow
def test_a_diverged_run_names_the_cause_and_keeps_the_last_good_state(world, capsys):
    assert world.train(*ODD, "--optimizer.learning_rate", "1e30", "--train.max_skipped", "3") == 1
    error = capsys.readouterr().err
    assert_mentions(error, "training failed", "optimizer.learning_rate", "lora.lr_ratio")
    assert not (world.out / "summary.json").exists()
    assert "Traceback" not in error


@pytest.mark.slow
def test_an_update_that_is_not_finite_never_reaches_what_is_saved(world, capsys):
    assert world.train(*ODD, "--optimizer.learning_rate", "5e37", "--train.max_skipped", "3") == 1
    error = capsys.readouterr().err
    assert "update_norm/" in error
    assert_mentions(error, "lora.lr_ratio", 4)
    assert "max_grad_norm" not in error


@pytest.mark.slow
def test_a_run_ends_at_the_step_that_it_says_however_seldom_it_logs(world, capsys):
    seldom = flags("--train.log_every 20 --train.eval_every 20 --train.max_skipped 2")
    assert world.train(*ODD, *seldom, "--optimizer.learning_rate", "5e37") == 1
    # The first step has a rate of 0, and the fourth is under way when the third is checked.
    assert_mentions(capsys.readouterr().err, "2 steps", "step 3", "skipped")
    (last,) = [row for row in rows_of(world.out) if "skipped" in row]
    assert (last["step"], last["skipped"]) == (4, 3)


@pytest.mark.long
@pytest.mark.slow
def test_spikes_are_logged_at_their_steps_also_by_a_resumed_run(world, monkeypatch, capsys):
    # So that a sound run has some.
    monkeypatch.setattr("loraplus_jax.training.anomalies.MIN_SPIKE_RATIO", 0.9)
    monkeypatch.setattr("loraplus_jax.training.anomalies.NOISE", 0.0)
    straight = result_of(world.trained(*ODD, "--train.log_every", "7", out=world.directory / "straight"))
    spikes = [row for row in straight[1] if "spike/loss" in row]
    assert spikes
    printed = " ".join(capsys.readouterr().out.split())
    for row in spikes:
        assert_mentions(printed, f"step {row['step']}", f"{row['spike/loss']:.4f}")
        assert row["spike/loss"] > 0.9 * row["spike/median"]
        assert {f"spike/grad_norm/{role}" for role in ("a", "b", "extra")} <= row.keys()
    for step in (8, 13):
        stopped(world, step, *ODD, "--train.log_every", "7")
    assert result_of(world.trained(*ODD, "--train.log_every", "7")) == straight


@pytest.mark.long
def test_a_step_that_is_damaged_twice_is_quarantined_twice(world, straight):
    for _ in range(2):
        stopped(world, 15, *ODD)
        cut_short(world.out / "checkpoints/15")
    assert world.train(*ODD) == 0
    assert {path.name for path in (world.out / "damaged_checkpoints").iterdir()} == {"15", "15.1"}
    assert result_of(world.out) == straight


def test_a_tokenizer_with_more_words_than_the_model_is_rejected(world, capsys):
    path = world.model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["good"] = 500
    path.write_text(json.dumps(content))
    assert_mentions(world.rejected(capsys, *ODD), "'good'", 500)


@pytest.mark.slow
def test_a_finished_run_resumes_with_more_steps_as_if_never_ended(world, capsys):
    short = (*ODD, "--train.select", "last")
    more = (*short, "--train.steps", "30")
    straight = result_of(world.trained(*more, out=world.directory / "straight"))
    world.trained(*short, "--train.eval_every", "10")
    old = result_of(world.out)
    capsys.readouterr()
    assert world.train(*short, "--train.eval_every", "10") == 2
    assert "finished" in capsys.readouterr().err
    assert world.train(*more) == 0
    printed = capsys.readouterr().out
    assert_mentions(printed, "train.steps", 20, 30, "train.eval_every", 10, 6, "step 20 of 30")
    assert result_of(world.out)[0] == straight[0]
    trained = [row for row in rows_of(world.out) if "loss" in row]
    assert trained == [row for row in straight[1] if "loss" in row]
    # What the finished run had made is kept.
    assert (world.out / "adapter_step_20/adapter.safetensors").read_bytes() == old[0]
    assert json.loads((world.out / "summary_step_20.json").read_text())["seconds"] > 0
    assert "steps: 30" in (world.out / "config.yaml").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_logging_and_evaluation_may_change_half_way_and_training_does_not(world, straight, capsys):
    last = ("--train.select", "last")
    stopped(world, 9, *ODD)
    changes = ("--train.log_every", "3", "--train.eval_every", "5", "--train.keep", "1", *last)
    assert world.train(*ODD, *changes, "--train.steps", "8") == 2
    assert_mentions(capsys.readouterr().err, "step 8", 9)
    assert "steps: 20" in (world.out / "config.yaml").read_text()
    assert world.train(*ODD, *changes) == 0
    last_of_straight = world.trained(*ODD, *last, out=world.directory / "last")
    assert result_of(world.out)[0] == result_of(last_of_straight)[0]
    assert {row["step"] for row in rows_of(world.out) if "loss" in row} == {4, 8, 12, 15, 18, 20}


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_named_and_the_next_best_chosen(world, capsys, monkeypatch):
    finish, damaged = Trainer.finish, []

    def with_damage(self):
        self.manager.wait_until_finished()
        damaged.append(self.manager.best_step())
        cut_short(world.out / "checkpoints" / str(damaged[0]))
        return finish(self)

    monkeypatch.setattr(Trainer, "finish", with_damage)
    world.trained(*ODD, "--train.keep", "5")
    assert f"checkpoint of step {damaged[0]}" in " ".join(capsys.readouterr().out.split())
    assert (world.out / "damaged_checkpoints" / str(damaged[0])).is_dir()
    chosen = summary_of(world.out)["selected_step"]
    scores = column(world.out, "validation/accuracy")
    best = max(score for step, score in scores.items() if step != damaged[0])
    assert scores[chosen] == best
