import io
import types

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from rich.console import Console

from loraplus_jax.settings.schema import DataSettings, ModelSettings, Settings, TrainSettings
from loraplus_jax.sharding import make_mesh, shard_batch
from loraplus_jax.training.evaluation import evaluate
from loraplus_jax.training.run_directory import check_directory, rename_run
from loraplus_jax.training.trainer import Trainer

SETTINGS = Settings(model=ModelSettings(path="m"), data=DataSettings(path="d"), output_dir="o", seed=3)


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100])
def test_a_split_is_averaged_over_all_rows_once(size):
    rng = np.random.default_rng(size)
    arrays = {"x": rng.normal(size=size).astype(np.float32)}

    def eval_fn(trainable, frozen, batch):
        weight = batch["weight"]
        scaled = trainable * frozen * batch["x"] * weight
        return {"loss": (scaled.sum(), weight.sum()), "one": (weight.sum(), weight.sum())}

    found = evaluate(eval_fn, 2.0, 3.0, arrays, 4, make_mesh(4))
    assert found == pytest.approx({"loss": 6 * arrays["x"].mean(), "one": 1.0}, rel=1e-5, abs=1e-6)
    assert all(type(value) is float for value in found.values())


def test_a_batch_is_split_over_the_mesh():
    mesh = make_mesh(4)
    placed = shard_batch({"x": np.arange(8)}, mesh)["x"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2,)}
    assert len({shard.device for shard in placed.addressable_shards}) == 4
    np.testing.assert_array_equal(placed, np.arange(8))


def trainer(values, patience, mode="max"):
    """Only what early stopping looks at."""
    log = types.SimpleNamespace(values=lambda name: list(enumerate(values)) if name == "validation/m" else [])
    task = types.SimpleNamespace(metric="m", mode=mode)
    return types.SimpleNamespace(settings=TrainSettings(early_stopping=patience), task=task, log=log)


@pytest.mark.parametrize(
    ("values", "patience", "stops"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, False),
        ([0.5, 0.6], 1, False),
        ([0.5, 0.6, 0.55], 1, True),
        ([0.5, 0.6, 0.55], 2, False),
        ([0.5, 0.6, 0.55, 0.6], 2, False),
        ([0.5, 0.4, 0.6], 2, False),
        ([0.9, 0.1, 0.1, 0.1], None, False),
    ],
)
def test_early_stopping_counts_evaluations_without_a_better_one(values, patience, stops):
    assert Trainer.should_stop(trainer(values, patience)) is stops  # pyright: ignore
    down = trainer([-value for value in values], patience, "min")
    assert Trainer.should_stop(down) is stops  # pyright: ignore


def run_in(directory, settings=SETTINGS, *, finished=False):
    directory.mkdir()
    (directory / "config.yaml").write_text(yaml.safe_dump(settings.to_json()))
    if finished:
        (directory / "summary.json").write_text("{}")
    return directory


@pytest.mark.parametrize("fresh", [False, True])
def test_directories_where_a_run_may_start(tmp_path, fresh):
    check_directory(tmp_path / "absent", SETTINGS, fresh=fresh)
    (tmp_path / "empty").mkdir()
    check_directory(tmp_path / "empty", SETTINGS, fresh=fresh)


def test_an_unfinished_run_of_the_same_settings_goes_on_wherever_it_lies(tmp_path):
    directory = run_in(tmp_path / "run")
    check_directory(directory, SETTINGS, fresh=False)
    moved = Settings.to_json(SETTINGS) | {"output_dir": "another"}
    (directory / "config.yaml").write_text(yaml.safe_dump(moved))
    check_directory(directory, SETTINGS, fresh=False)


def test_runs_that_are_refused_and_pass_with_fresh(tmp_path):
    finished = run_in(tmp_path / "finished", finished=True)
    with pytest.raises(
        ValueError, match=r"finished is finished, its results are in summary\.json; .*--fresh"
    ):
        check_directory(finished, SETTINGS, fresh=False)
    other = Settings(
        model=ModelSettings(path="m", pooling="cls"), data=DataSettings(path="d"), output_dir="o", seed=4
    )
    unlike = run_in(tmp_path / "unlike", other)
    with pytest.raises(ValueError, match="unlike holds a run with other settings") as caught:
        check_directory(unlike, SETTINGS, fresh=False)
    message = str(caught.value)
    assert 'model.pooling is "cls" in that run and "mean" here' in message
    assert "seed is 4 in that run and 3 here" in message
    for directory in (finished, unlike):
        check_directory(directory, SETTINGS, fresh=True)


@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_no_runs_is_never_touched(tmp_path, fresh):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file"):
        check_directory(tmp_path / "file", SETTINGS, fresh=fresh)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="foreign holds files that are not a run's"):
        check_directory(tmp_path / "foreign", SETTINGS, fresh=fresh)


def test_an_older_run_gets_the_first_free_number(tmp_path):
    text = io.StringIO()
    console = Console(file=text, width=300)
    directory = tmp_path / "run.v2"
    rename_run(directory, console)
    assert text.getvalue() == ""
    for number in (1, 2):
        run_in(directory)
        (directory / "mark").write_text(str(number))
        rename_run(directory, console)
        assert not directory.exists()
        assert (tmp_path / f"run.v2.{number}" / "mark").read_text() == str(number)
        assert f"the older run is now {directory}.{number}" in text.getvalue()


def test_sums_and_not_means_of_batches_are_averaged():
    arrays = {"x": np.array([1.0, 1.0, 1.0, 5.0, 5.0], np.float32)}

    def eval_fn(trainable, frozen, batch):
        return {"x": (jnp.sum(batch["x"] * batch["weight"]), jnp.sum(batch["weight"]))}

    assert evaluate(eval_fn, None, None, arrays, 3, make_mesh(1)) == {"x": pytest.approx(13 / 5)}
