"""Losses, labels and predictions of an encoder by hand, and its data."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.data.batches import first_batches
from loraplus_jax.data.packed_rows import ragged
from loraplus_jax.data.splits import LabelledText
from loraplus_jax.models.files import open_files
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.step.sharding import make_mesh
from loraplus_jax.tasks.encoder import (
    EncoderTask,
    apply_model,
    model_config,
)
from loraplus_jax.training.setup import task_class

from ..messages import assert_mentions, mentions
from ..refusals import refusals

CLASSES = EncoderTask(kind="classification", names=("no", "yes"))
NUMBERS = EncoderTask(kind="regression", mean=10.0, std=2.0)


class Echo(nn.Module):
    """The first ids as outputs; noise with a dropout key."""

    width: int

    def __call__(self, input_ids, attention_mask, token_type_ids, texts):
        noise = jax.random.normal(self.make_rng("dropout"), ()) if self.has_rng("dropout") else 0.0
        return input_ids[:, : self.width].astype(jnp.float32) + attention_mask[:, :1] * noise


def rows(labels):
    return [LabelledText("t", label, f"f.csv:{n}") for n, label in enumerate(labels, 2)]


def batch(ids, label, weight):
    ids = jnp.array(ids)
    return {
        "input_ids": ids,
        "attention_mask": jnp.ones_like(ids),
        "token_type_ids": jnp.zeros_like(ids),
        "label": jnp.array(label),
        "weight": jnp.array(weight),
    }


def computed(task, data, **options):
    """The loss and the metrics, as one program."""
    model = Echo(2 if task is CLASSES else 1)
    return jax.jit(lambda data: task.loss_fn(model, **options)({}, data, None))(data)


def test_cross_entropy_and_accuracy_by_hand():
    data = batch([[0, 0], [0, 2], [3, 0], [9, 9]], [0, 1, 1, 1], [1.0, 1.0, 1.0, 0.0])
    (total, weight), metrics = computed(CLASSES, data)
    # -log softmax of the right class: log 2, log(1 + e^-2), log(1 + e^3); the last row has no weight.
    assert float(total) == pytest.approx(np.log(2) + np.log1p(np.exp(-2)) + np.log1p(np.exp(3)), rel=1e-6)
    assert float(weight) == 3
    assert {name: (float(s), float(w)) for name, (s, w) in metrics.items()} == {"accuracy": (2.0, 3.0)}


def test_squared_error_is_standardised_and_metrics_are_in_units_of_the_labels():
    labels = NUMBERS.labels(rows(["10", "14", "6"]))
    np.testing.assert_array_equal(labels, np.array([0, 2, -2], np.float32))
    (total, weight), metrics = computed(NUMBERS, batch([[1], [1], [7]], labels, [1.0, 1.0, 0.0]))
    # Errors 1 and -1 standardised, 2 and -2 in the labels' units.
    assert (float(total), float(weight)) == (2.0, 2.0)
    assert {name: (float(s), float(w)) for name, (s, w) in metrics.items()} == {
        "mse": (8.0, 2.0),
        "mae": (4.0, 2.0),
    }


def test_the_constant_answer_by_hand():
    task = dataclasses.replace(CLASSES, metrics=("accuracy", "f1", "matthews"))
    # Three of four train labels are "yes", so it answers "yes": right for two of three, F1 2 * 2 / (2 * 2 + 1).
    found = task.constant(np.array([1, 1, 0, 1]), np.array([0, 1, 1]))
    loss = -(np.log(1 / 4) + 2 * np.log(3 / 4)) / 3
    assert found == pytest.approx({"loss": loss, "accuracy": 2 / 3, "f1": 0.8, "matthews": 0.0})
    task = dataclasses.replace(NUMBERS, metrics=("pearson",))
    # The mean of the train split is 0 standardized; errors 1 and 3 are 2 and 6 in the labels' units.
    found = task.constant(np.array([1.0, -1.0]), np.array([1.0, -3.0]))
    assert found == pytest.approx({"loss": 5.0, "mse": 20.0, "mae": 4.0, "pearson": 0.0})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "ids", "label", "predicted"),
    [
        (CLASSES, [[3, 0], [0, 2], [9, 9]], [0, 0, 1], [0, 1, 0]),
        (NUMBERS, [[1], [4], [7]], [0, 2, -2], [1, 4, 7]),
    ],
)
def test_evaluation_keeps_predictions_and_labels(task, ids, label, predicted):
    data = batch(ids, label, [1.0, 1.0, 0.0])
    loss, metrics = computed(task, data, keep_rows=True)
    np.testing.assert_array_equal(metrics["predicted"].values, predicted)
    np.testing.assert_array_equal(metrics["label"].values, label)
    np.testing.assert_array_equal(metrics["label"].weights, [1, 1, 0])
    np.testing.assert_array_equal(metrics["predicted"].weights, metrics["label"].weights)
    plain, others = computed(task, data)
    assert (plain, others.keys()) == (loss, metrics.keys() - {"predicted", "label"})


def test_weights_are_shares_of_an_example():
    data = batch([[0, 0], [0, 2]], [0, 0], [0.5, 2.0])
    (total, weight), metrics = computed(CLASSES, data)
    assert float(total) == pytest.approx(0.5 * np.log(2) + 2 * np.log1p(np.exp(2)), rel=1e-6)
    assert float(weight) == 2.5
    assert float(metrics["accuracy"][0]) == 0.5


def test_the_key_reaches_dropout():
    data = batch([[1, 2]], [0], [1.0])
    plain, noisy, other = (
        apply_model(Echo(2), {}, data, key) for key in (None, jax.random.key(0), jax.random.key(1))
    )
    np.testing.assert_array_equal(plain, [[1, 2]])
    assert not np.array_equal(noisy, plain)
    assert not np.array_equal(noisy, other)


def test_a_task_from_splits():
    splits = {"train": rows(["b", "a", "b"]), "test": rows(["a"])}
    task = EncoderTask.from_splits("classification", splits)
    assert task == EncoderTask(kind="classification", names=("a", "b"))
    assert (task.num_outputs, task.metric, task.mode) == (2, "accuracy", "max")
    np.testing.assert_array_equal(task.labels(splits["train"]), [1, 0, 1])
    assert task.labels(splits["train"]).dtype == np.int32


def test_regression_is_standardised_by_the_train_split_only():
    splits = {"train": rows(["1", "3"]), "test": rows(["100"])}
    task = EncoderTask.from_splits("regression", splits)
    assert task == EncoderTask(kind="regression", mean=2.0, std=1.0)
    assert (task.num_outputs, task.metric, task.mode) == (1, "mse", "min")
    assert task.labels(splits["test"]).dtype == np.float32
    np.testing.assert_array_equal(task.labels(splits["test"]), [98])


def from_labels(kind, **splits):
    return lambda: EncoderTask.from_splits(kind, {name: rows(labels) for name, labels in splits.items()})


test_labels_that_do_not_fit_the_task = refusals(
    (from_labels("classification", train=["a", "b"], test=["c"]), "f.csv:2", "'c'", "train"),
    (from_labels("regression", train=["1", "2"], test=["1", "x"]), "f.csv:3", "regression", "'x'"),
    (from_labels("regression", train=["4", "4"]), "train", 4),
)


def test_predictions_are_names_with_probabilities_or_numbers():
    first, second = CLASSES.predictions(np.array([[0.0, np.log(3.0)], [5.0, -5.0]], np.float32))
    assert first == {"prediction": "yes", "probabilities": {"no": 0.25, "yes": 0.75}}
    assert second["prediction"] == "no"
    assert sum(second["probabilities"].values()) == pytest.approx(1)
    found = NUMBERS.predictions(np.array([[0.0], [-1.5]], np.float32))
    assert found == [{"prediction": 10.0}, {"prediction": 7.0}]


def test_dropout_rates_replace_the_models_own(world):
    settings = parse_settings(world.config, ["--model.dropout", "0.3"]).model
    config = model_config(settings, open_files(world.model))
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.3)
    own = model_config(dataclasses.replace(settings, dropout=None), open_files(world.model))
    assert (own.hidden_dropout_prob, own.attention_probs_dropout_prob) == (0.1, 0.1)


def test_long_texts_are_counted(world):
    data = EncoderTask.load(
        parse_settings(world.config, ["--data.max_length", "5"]).task_options, open_files(world.model)
    )
    assert data.truncated["train"] > 0
    assert max(map(len, data.splits["train"]["input_ids"])) == 5
    assert {name: arrays["input_ids"].shape for name, arrays in data.splits.items()} == {
        "train": (112,),
        "validation": (16, 8),  # rows of eight
        "test": (32, 8),
    }


def test_rows_divide_into_micro_batches_and_evaluations_have_their_own_size(world):
    words = ("batch_size", "16", "accumulate", "8", "eval_batch_size", "2")
    options = parse_settings(world.config, [f"--train.{x}" if x.isidentifier() else x for x in words])
    data = EncoderTask.load(options.task_options, open_files(world.model))
    plan = data.task.plan_batches(options.task_options, data, 10, (0,), make_mesh(1))
    assert plan.train_rows % 8 == 0
    assert plan.eval_rows <= 2


@pytest.mark.slow
def test_every_batch_of_all_epochs_and_the_largest_split_have_a_shape(world):
    settings = parse_settings(world.config, ["--train.batch_size", "16", "--train.eval_batch_size", "32"])
    data, rng = EncoderTask.load(settings.task_options, open_files(world.model)), np.random.default_rng(0)
    columns = data.splits["train"]
    lengths = rng.integers(1, 1 + settings.data.max_length, len(columns["label"]))
    columns |= {
        name: ragged([np.ones(n, np.int32) for n in lengths]) for name in ("input_ids", "token_type_ids")
    }
    data.splits["validation"] = {name: column[:2] for name, column in data.splits["validation"].items()}
    plan = data.task.plan_batches(settings.task_options, data, 100, (0, 1), make_mesh(1))
    # All lengths from 1 to the longest; batches drawn at random would leave a third of the tokens empty.
    full = lengths[first_batches(112, batch_size=16, seeds=(0, 1), count=100, lengths=lengths)].sum()
    assert full / (200 * math.prod(plan.train["input_ids"].shape)) > 0.9
    for seed in (0, 1):
        shapes = {plan.batch(seed, step)["weight"].shape for step in range(100)}
        assert shapes == {plan.train["weight"].shape}
    assert len(plan.evaluate["weight"].shape) == 2
    assert plan.evaluate["weight"].shape[0] == min(32, len(data.splits["test"]["weight"]))


def test_a_trial_on_few_texts_has_all_classes(world):
    settings = parse_settings(world.config, ["--data.limit", "1"])
    data = EncoderTask.load(settings.task_options, open_files(world.model))
    assert data.task.names == ("no", "yes")
    assert data.examples == {"train": 1, "validation": 1, "test": 1}
    split = data.task.load_split(settings.task_options, open_files(world.model), "test", None)
    assert (split.examples, split.digest) == (1, data.digests["test"])
    assert split.constant == data.constant
    assert (
        data.task.load_split(settings.task_options, open_files(world.model), None, str(world.data)).examples
        == 160
    )


def test_texts_of_emoji_alone_are_counted_before_training(world, tmp_path):
    lines = [f"{chr(0x1F600 + n)},{'yes' if n % 2 else 'no'}" for n in range(60)]
    (tmp_path / "emoji.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    settings = parse_settings(world.config, ["--data.path", str(tmp_path / "emoji.csv")])
    unknown, equal = EncoderTask.load(settings.task_options, open_files(world.model)).summary[-2:]
    assert_mentions(unknown, "warning", "60 of 60", "emoji.csv:2")
    assert_mentions(equal, "warning", "60 of 60", "label", "emoji.csv:2")


def test_own_data_chooses_its_metrics(world):
    files = open_files(world.model)
    settings = parse_settings(world.config, ["--data.metrics", "[f1, macro_f1]"])
    data = EncoderTask.load(settings.task_options, files)
    assert (data.task.metric, data.task.mode, data.task.names[1]) == ("f1", "max", "yes")
    assert data.constant.keys() == {"loss", "accuracy", "f1", "macro_f1"}
    assert_mentions(data.summary[-1], "f1", "yes")
    split = data.task.load_split(settings.task_options, files, "test", None)
    assert split.constant == data.constant
    # Of another file it is the best constant answer there.
    accuracy = data.task.load_split(settings.task_options, files, None, str(world.data)).constant["accuracy"]
    labels = [row["label"] for row in world.rows()]
    assert accuracy == max(map(labels.count, data.task.names)) / 160


@pytest.mark.parametrize("task", ["classification", "regression", "instruction", "multiple_choice"])
def test_every_task_tells_duplicates_before_training(first_world, first_talk, task):
    source = first_world if task in ("classification", "regression") else first_talk
    data = source.directory / "questions.jsonl" if task == "multiple_choice" else source.data
    args = ["--task", task, "--data.path", "null", "--data.train", str(data), "--data.test", str(data)]
    args += ["--data.duplicates", "error", *(["--data.label", "rating"] if task == "regression" else [])]
    settings = parse_settings(source.config, args)
    with pytest.raises(ValueError, match=mentions("train", "test")):
        task_class(settings).load(settings.task_options, open_files(source.model))
